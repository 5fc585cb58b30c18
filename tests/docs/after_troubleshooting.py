"""What ``docs/troubleshooting.md`` must leave, and say."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.blocks import ROOT, After, read

# strings that are broken over lines are one message
_JOINT = re.compile(r'"\s*\n\s*[rf]?"')


def _text_of(folder: str) -> str:
    files = sorted((ROOT / folder).rglob("*.py"))
    return "".join(_JOINT.sub("", path.read_text(encoding="utf-8")) for path in files)


def check_every_quoted_message_is_one_of_ours(_: After) -> None:
    """In the library, or, where it is put together from pieces, in a test that matches it."""
    page = read("docs/troubleshooting.md")
    cells = re.findall(r"^\| ([^|]+) \|", page, flags=re.MULTILINE)
    headings = re.findall(r"^### .*?(`[A-Z][^`]{15,}`)$", page, flags=re.MULTILINE)
    quoted = re.findall(r"`([^`]+)`", "\n".join([*cells, *headings]))
    assert len(quoted) > 50
    known = _text_of("moelora") + _text_of("tests").replace("\\", "")
    pieces = [
        piece.strip()
        for quote in quoted
        for piece in quote.removeprefix("KeyError: ").split("...")
        if piece.strip()
    ]
    assert [piece for piece in pieces if piece not in known] == []


def check_the_trainer_ran_with_the_callback(after: After) -> None:
    assert (Path(after.folder) / "run").is_dir()
    assert after.names["model"].active_adapters == ["sql", "french"]
