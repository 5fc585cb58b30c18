"""What is known of an expert besides its tensors: its skill, and how much it was trained."""

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moelora.config import FORMAT_VERSION, is_int
from moelora.errors import CheckpointError, ConfigError
from moelora.router_file import check_folder_name

EXPERTS_FILE = "experts.json"
_RECORDS = "_moelora_expert_records"
_FORMAT = "moelora_format"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ExpertRecord:
    """What an :class:`~moelora.ExpertManager` remembers of an expert; saved as JSON.

    Attributes:
        skill: what it was trained for, in the user's words.
        steps: optimiser steps it was trained for.
        tokens_seen: tokens it was trained on.
        created: when it was made, ISO 8601 in UTC.
        mature: marked mature. Where routers keep this as a tensor, theirs counts.
        frozen: it is not to be trained.
        extra: anything else that JSON can hold.

    Raises:
        ConfigError: if a value is of another kind.

    Example:
        >>> ExpertRecord(skill="sql", steps=100).skill
        'sql'
    """

    skill: str | None = None
    steps: int = 0
    tokens_seen: int = 0
    created: str = field(default_factory=_now)
    mature: bool = False
    frozen: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "skill": (self.skill is None or isinstance(self.skill, str), "a string or None"),
            "steps": (is_int(self.steps) and self.steps >= 0, "an integer of at least 0"),
            "tokens_seen": (
                is_int(self.tokens_seen) and self.tokens_seen >= 0,
                "an integer of at least 0",
            ),
            "created": (_is_date(self.created), "a date in ISO 8601"),
            "mature": (isinstance(self.mature, bool), "True or False"),
            "frozen": (isinstance(self.frozen, bool), "True or False"),
            "extra": (_is_json(self.extra), "a dict that JSON can hold"),
        }
        for name, (is_right, allowed) in checks.items():
            if not is_right:
                raise ConfigError(f"{name} must be {allowed}, got {getattr(self, name)!r}.")


def _is_date(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_json(value: Any) -> bool:
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def records_of(tuner: Any) -> dict[str, ExpertRecord]:
    """The records of a model's adapters, by name, in the order of its adapters."""
    kept: dict[str, ExpertRecord] = tuner.__dict__.setdefault(_RECORDS, {})
    names = list(tuner.peft_config)
    ordered = {name: kept.get(name) or ExpertRecord() for name in names}
    kept.clear()
    kept.update(ordered)
    return kept


def changed(record: ExpertRecord, **changes: Any) -> ExpertRecord:
    """Return the record with some fields changed.

    Raises:
        ConfigError: for a field that records do not have, or a wrong value.
    """
    names = [f.name for f in fields(ExpertRecord)]
    for name in changes:
        if name not in names:
            raise ConfigError(f"A record has the fields {', '.join(names)}, got {name!r}.")
    return replace(record, **changes)


def write_records(folder: Path, records: dict[str, ExpertRecord]) -> None:
    """Write ``experts.json`` into ``folder`` in one step, the experts in routing order."""
    content = {
        _FORMAT: FORMAT_VERSION,
        "experts": [{"name": name, **asdict(record)} for name, record in records.items()],
    }
    path = folder / EXPERTS_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_records(path: Path) -> dict[str, ExpertRecord]:
    """Read ``experts.json``.

    Raises:
        CheckpointError: if it is no JSON, of a newer format, or describes no experts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    version: Any = content.get(_FORMAT) if isinstance(content, dict) else None
    if not is_int(version) or version < 1:
        raise CheckpointError(f"{path} is no list of experts: it has no {_FORMAT}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this release reads up to {FORMAT_VERSION}. Upgrade "
            "moelora."
        )
    entries = content.get("experts")
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path} names no experts.")
    records: dict[str, ExpertRecord] = {}
    for entry in entries:
        name, record = _read_entry(path, entry)
        if name in records:
            raise CheckpointError(f"{path} names expert {name!r} twice.")
        records[name] = record
    return records


def _read_entry(path: Path, entry: Any) -> tuple[str, ExpertRecord]:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: each expert must be an object with a name, got {entry!r}.")
    check_folder_name(name, where=f"{path}: among its experts, ")
    try:
        record = ExpertRecord(**{key: value for key, value in entry.items() if key != "name"})
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: expert {name!r}: {error}") from error
    return name, record
