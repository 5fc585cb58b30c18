"""Loads over a training, from the log of a trainer."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from moelora.config import is_int, is_number
from moelora.errors import ReportError
from moelora.report.results import TrainingLoads

#: Keys of single experts in a flat log: ``expert_load/0``, ``moe/load_1`` ...
_KEY = re.compile(r"(?:.*/)?(?:expert_)?load[/_](\d{1,4})")
#: Keys of single experts of single routers, as :class:`moelora.MoETrainerCallback` logs them.
_ROUTER_KEY = re.compile(r"(?:.*/)?load/(.*[^/\d].*)/(\d{1,4})")
_FIELDS = ("expert_load", "expert_loads", "loads", "load")


def read_training_loads(path: "str | os.PathLike[str]", *, experts: int) -> TrainingLoads:
    """Read loads per step.

    The file is JSON lines, a JSON list, or a ``trainer_state.json`` (its ``log_history``). Records
    without loads are passed over; the others hold a ``step`` and either ``expert_load`` (also
    ``expert_loads``, ``loads``, ``load``): one number per expert, or such a list by name
    of a router, whose mean is taken; or one number per key ``expert_load/0``,
    ``expert_load/1`` ..., or per router ``moe/load/<layer>/0`` ... as
    :class:`~moelora.MoETrainerCallback` logs them. Each step's loads are divided by their sum.

    Args:
        path: of the log.
        experts: how many loads a record must have.

    Raises:
        ReportError: if the file cannot be read, or a record's loads are no loads of that many
            experts, or no record has any.
    """
    steps: list[int] = []
    loads: list[list[float]] = []
    for where, record in _records(Path(path)):
        load = _load(record, where)
        if load is None:
            continue
        step: Any = record.get("step")
        if not is_int(step) or step < 0:
            raise ReportError(f"{where}: step must be a whole number, got {step!r}.")
        if steps and step <= steps[-1]:
            raise ReportError(f"{where}: step {step} follows step {steps[-1]}.")
        if len(load) != experts:
            raise ReportError(f"{where}: has loads of {len(load)} experts, must be {experts}.")
        steps.append(step)
        loads.append(load)
    if not steps:
        raise ReportError(f"{path} holds no loads: no record has {_FIELDS[0]!r}.")
    return TrainingLoads(steps, loads)


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8.") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = [
            _line(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line
        ]
    if isinstance(content, dict):
        content = content.get("log_history", [content])
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise ReportError(f"{path} must hold a list of records, or one record in each line.")
    return [(f"{path}, record {number}", record) for number, record in enumerate(content, 1)]


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: invalid JSON.") from error


def _load(record: dict[str, Any], where: str) -> list[float] | None:
    for name in _FIELDS:
        value = record.get(name)
        if isinstance(value, dict) and value:
            return _mean([_normalised(one, where) for one in value.values()], where)
        if isinstance(value, list):
            return _normalised(value, where)
    flat: dict[str, dict[int, Any]] = {}
    for key, value in record.items():
        if match := _KEY.fullmatch(key):
            flat.setdefault("", {})[int(match[1])] = value
        elif match := _ROUTER_KEY.fullmatch(key):
            flat.setdefault(match[1], {})[int(match[2])] = value
    return _mean([_in_order(loads, where) for loads in flat.values()], where)


def _in_order(flat: dict[int, Any], where: str) -> list[float]:
    if sorted(flat) != list(range(len(flat))):
        raise ReportError(f"{where}: has loads of the experts {sorted(flat)}, some are missing.")
    return _normalised([flat[expert] for expert in range(len(flat))], where)


def _mean(rows: list[list[float]], where: str) -> list[float] | None:
    """The mean over routers; None without any."""
    if not rows:
        return None
    if len(set(map(len, rows))) != 1:
        raise ReportError(f"{where}: routers of different sizes have no mean load.")
    return [round(sum(column) / len(rows), 6) for column in zip(*rows, strict=True)]


def _normalised(values: Any, where: str) -> list[float]:
    fine = isinstance(values, list) and all(is_number(v) and v >= 0 for v in values)
    if not fine or not math.isfinite(total := math.fsum(values)) or total <= 0:
        raise ReportError(f"{where}: loads must be numbers of at least 0, got {values!r:.80}.")
    return [round(value / total, 6) for value in values]
