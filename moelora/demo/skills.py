"""Skills: prompts with completions, and how they are read from a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from moelora.demo.errors import DemoError

FIELDS = ("prompt", "completion")
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Example:
    """One task of a skill: what the model reads and what it shall write."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Skill:
    """A named skill with disjoint training and validation examples, and where they come from."""

    name: str
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    source: str


def read_skills(folder: Path) -> list[Skill]:
    """Read every skill of a folder ``<skill>/{train,valid}.jsonl``, in the order of their names.

    A line of a file is a JSON object with the non-empty strings ``prompt`` and ``completion``;
    further fields are allowed. Subfolders whose names start with a dot are no skills.

    Args:
        folder: the folder that holds one subfolder for each skill.

    Raises:
        DemoError: if the folder or a file is missing, empty, unreadable, not UTF-8, or if a line
            is not such an object; the message names the file and the line.
    """
    if not folder.is_dir():
        raise DemoError(f"--data must be a folder of skills, but {folder} is not a folder.")
    try:
        homes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DemoError(f"{folder} cannot be read: {error.strerror}.") from error
    if not homes:
        raise DemoError(
            f"{folder} holds no skill; a skill is a folder with train.jsonl and valid.jsonl."
        )
    return [_read_skill(home) for home in homes]


def _read_skill(home: Path) -> Skill:
    train, valid = (_read_examples(home / f"{split}.jsonl") for split in SPLITS)
    return Skill(home.name, train, valid, source=f"{home.parent.name}/{home.name}")


def _read_examples(path: Path) -> tuple[Example, ...]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DemoError(f"{path} is missing; a skill needs train.jsonl and valid.jsonl.") from error
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}.") from error
    # bytes are split, not text: str.splitlines would also split at U+2028 inside a string
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if not lines:
        raise DemoError(f"{path} is empty; a skill needs at least one example in it.")
    return tuple(
        _parse_example(line, place=f"{path}:{number}") for number, line in enumerate(lines, start=1)
    )


def _parse_example(line: bytes, *, place: str) -> Example:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DemoError(f"{place}: not UTF-8 (byte {error.start + 1} of the line).") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DemoError(f"{place}: invalid JSON: {reason}.") from error
    if not isinstance(record, dict):
        raise DemoError(f"{place}: expected a JSON object, got {type(record).__name__}.")
    return Example(*(_text_field(record, field, place=place) for field in FIELDS))


def _text_field(record: dict[str, object], field: str, *, place: str) -> str:
    if field not in record:
        raise DemoError(f"{place}: the field {field!r} is missing.")
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise DemoError(f"{place}: {field!r} must be a non-empty string, got {value!r:.40}.")
    try:
        # json accepts half a surrogate pair, which no tokenizer does
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DemoError(f"{place}: {field!r} holds half a surrogate pair.") from error
    return value
