"""The code blocks of a page, and how they are run.

A page may say, in HTML comments that no reader sees:

- ``<!-- given: my-mixture, letters.txt -->`` (once): what of :mod:`tests.docs.given` lies in the
  folder that the page runs in.
- ``<!-- not run: needs two GPUs -->`` before a block: it is left alone, for that reason.
- ``<!-- raises: ValueError -->`` before a Python block: it ends in that error.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cli.adapters import Outcome, moelora
from tests.docs.given import MODEL_NAMES, make_given

ROOT = Path(__file__).resolve().parents[2]
RUN = frozenset({"python", "bash", "console", "json"})
SHOWN = frozenset({"text", "diff", "yaml", "toml", "bibtex", "ini", "mermaid", "html"})

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"<!-- (?P<kind>not run|raises): (?P<text>[^>]*?) -->\s*\Z")
_GIVEN = re.compile(r"<!-- given: ([^>]*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the marks before it."""

    language: str
    code: str
    line: int
    not_run: str | None = None
    raises: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether the block does anything in a test."""
        return self.language in RUN and self.not_run is None


@dataclass
class After:
    """What a page left: its folder, its variables, and what its commands told."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    outcomes: list[Outcome] = field(default_factory=list)


def pages() -> list[str]:
    """README.md and every page of the documentation, by their paths."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks in their order, those in lists and tabs too."""
    found = []
    for match in _BLOCK.finditer(text):
        mark = _MARK.search(text[: match.start()])
        marks = {} if mark is None else {mark["kind"].replace(" ", "_"): mark["text"].strip()}
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], textwrap.dedent(match["code"]), line, **marks))
    return found


def prose_of(text: str) -> str:
    """A page without its code, fenced or in a line: what of it can hold links."""
    return re.sub(r"`[^`\n]+`", "``", _BLOCK.sub("", text))


def given_of(text: str) -> list[str]:
    """The names that a page asks for."""
    return [name.strip() for names in _GIVEN.findall(text) for name in names.split(",")]


def run_page(page: str, folder: Path) -> After:
    """Run all blocks of a page in their order, in one namespace, inside ``folder``."""
    text = read(page)
    after = After(folder)
    model = make_given(given_of(text), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks_of(text):
            if block.is_run:
                code = MODEL_NAMES.sub(model.as_posix(), block.code)
                _RUNNERS[block.language](code, block, f"{page}:{block.line}", after)
    return after


def _run_python(code: str, block: Block, place: str, after: After) -> None:
    compiled = compile("\n" * block.line + code, place.rsplit(":", 1)[0], "exec")
    if block.raises is None:
        exec(compiled, after.names)
        return
    with pytest.raises(Exception, match=r"\A") as caught:
        exec(compiled, after.names)
    classes = {kind.__name__ for kind in type(caught.value).__mro__}
    assert block.raises in classes, f"{place} raised {caught.value!r}"


def _run_bash(code: str, _: Block, place: str, after: After) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            _run_command(words, place, after)


def _run_console(code: str, block: Block, place: str, after: After) -> None:
    commands = [line[2:] for line in code.splitlines() if line.startswith("$ ")]
    assert commands, f"{place}: no line starts with '$ '"
    _run_bash("\n".join(commands), block, place, after)


def _run_command(words: list[str], place: str, after: After) -> None:
    command, *arguments = words
    if command == "moelora":
        outcome = moelora(*arguments)
        assert outcome.code == 0, f"{place}: {shlex.join(words)}\n{outcome.err}"
        after.outcomes.append(outcome)
    elif command == "make":
        targets = re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE)
        assert arguments[0] in targets, f"{place}: make has no target {arguments[0]!r}"
    else:
        is_pip = command == "pip" and arguments[0] in {"install", "uninstall"}
        assert is_pip, (
            f"{place}: cannot run {command!r}; say <!-- not run: why --> before the block"
        )


def _run_json(code: str, _: Block, place: str, after: After) -> None:
    try:
        json.loads(code)
    except ValueError as error:
        pytest.fail(f"{place}: {error}")


_RUNNERS = {
    "python": _run_python,
    "bash": _run_bash,
    "console": _run_console,
    "json": _run_json,
}


def all_blocks() -> Iterator[tuple[str, Block]]:
    """Every block of every page, with its place."""
    for page in pages():
        for block in blocks_of(read(page)):
            yield f"{page}:{block.line}", block
