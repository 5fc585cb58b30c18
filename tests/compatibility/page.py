"""The page made from the cases, and the methods it has to speak of."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraModel
from torch import nn

from tests.compatibility import calling, elsewhere, files, managing, merging, options
from tests.compatibility.registry import KINDS, Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peft-compatibility.md"
AREAS = [
    managing.AREA,
    calling.AREA,
    merging.AREA,
    files.AREA,
    options.AREA,
    elsewhere.AREA,
]

_HEAD = """# What works with PEFT, and what is refused

Generated from the cases in `tests/compatibility` by `python -m tests.compatibility`; every cell is
a test that runs with the others. *Refused* cells raise an error that begins with the quoted
sentence and leave the model as it was. Nothing is ignored in silence.
"""


def all_cases() -> list[Case]:
    """The cases of all areas, in the order of the page."""
    return [case for area in AREAS for case in area.cases]


def public_methods() -> set[str]:
    """Every public method and property of a causal ``PeftModel`` and of ``LoraModel``."""
    found = set()
    for label, cls in (("PeftModel", PeftModelForCausalLM), ("LoraModel", LoraModel)):
        for owner in cls.__mro__:
            if owner in (nn.Module, object):
                continue
            for name, value in vars(owner).items():
                is_method = callable(value) or isinstance(value, property | classmethod)
                if is_method and (not name.startswith("_") or name == "__call__"):
                    found.add(f"{label}.{name}")
    return found


def rows() -> dict[tuple[str, str], dict[str, Case]]:
    """The cells of each row, by area and name, then by column."""
    table: dict[tuple[str, str], dict[str, Case]] = {}
    for case in all_cases():
        table.setdefault((case.area, case.name), {})[case.kind.title] = case
    return table


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    area = ""
    for (title, name), cells in rows().items():
        if title != area:
            area = title
            columns = " | ".join(kind.title for kind in KINDS)
            parts.append(f"\n## {title}\n\n| | {columns} |\n| --- | --- | --- |\n")
        parts.append(f"| {name} | {' | '.join(_cell(cells.get(k.title)) for k in KINDS)} |\n")
    parts.append("\n## Every public method\n\n| method | rows above |\n| --- | --- |\n")
    for method in sorted(public_methods()):
        names = dict.fromkeys(case.name for case in all_cases() if method in case.covers)
        parts.append(f"| `{method}` | {'; '.join(names)} |\n")
    return "".join(parts)


def _cell(case: Case | None) -> str:
    if case is None:
        return ""
    if case.error is None:
        return f"works: {_escaped(case.note)}"
    return f"refused, `{case.error.__name__}`: “{_escaped(case.note)}”"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
