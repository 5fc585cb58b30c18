"""Reading skills: what is accepted, and one clear message for everything else."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moelora.demo.errors import DemoError
from moelora.demo.skills import Example, read_skills
from tests.demo.tiny import write_examples


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    home = tmp_path / "skills" / "shout"
    home.mkdir(parents=True)
    write_examples(home / "train.jsonl", [("a", "A"), ("b", "B")])
    write_examples(home / "valid.jsonl", [("c", "C")])
    return home


def test_skills_come_in_the_order_of_their_names_with_their_examples(skill: Path) -> None:
    other = skill.parent / "echo"
    other.mkdir()
    (skill.parent / ".cache").mkdir()
    for split in ("train", "valid"):
        write_examples(other / f"{split}.jsonl", [("x", "x")])
    skills = read_skills(skill.parent)
    assert [each.name for each in skills] == ["echo", "shout"]
    assert skills[1].train == (Example("a", "A"), Example("b", "B"))
    assert skills[1].valid == (Example("c", "C"),)


def test_a_line_separator_inside_a_string_and_windows_line_ends_are_read(skill: Path) -> None:
    line = '{"prompt": "a\u2028b", "completion": "c", "domain": "else"}\r\n'
    (skill / "valid.jsonl").write_bytes(line.encode())
    assert read_skills(skill.parent)[0].valid == (Example("a\u2028b", "c"),)


BAD_LINES = {
    "not json": (b'{"prompt": "a"', "invalid JSON: Expecting ',' delimiter"),
    "blank": (b"", "invalid JSON: Expecting value"),
    "too deep": (b"[" * 200_000, "invalid JSON: nested too deeply"),
    "array": (b'["a", "b"]', "expected a JSON object, got list"),
    "no prompt": (b'{"completion": "A"}', "the field 'prompt' is missing"),
    "no completion": (b'{"prompt": "a"}', "the field 'completion' is missing"),
    "number": (b'{"prompt": 7, "completion": "A"}', "'prompt' must be a non-empty string, got 7"),
    "null": (
        b'{"prompt": "a", "completion": null}',
        "'completion' must be a non-empty string, got None",
    ),
    "empty": (b'{"prompt": "a", "completion": ""}', "'completion' must be a non-empty string"),
    "white": (b'{"prompt": " \\n", "completion": "A"}', "'prompt' must be a non-empty string"),
    "latin-1": (b'{"prompt": "caf\xe9", "completion": "A"}', "not UTF-8 (byte 16 of the line)"),
    "surrogate": (
        b'{"prompt": "\\ud800", "completion": "A"}',
        "'prompt' holds half a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_told_with_its_file_and_number(skill: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    path = skill / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "A"}\n' + line + b"\n")
    with pytest.raises(DemoError, match=re.escape(f"{path}:2: {message}")):
        read_skills(skill.parent)


def _remove_valid(skill: Path) -> None:
    (skill / "valid.jsonl").unlink()


def _empty_valid(skill: Path) -> None:
    (skill / "valid.jsonl").write_bytes(b"")


def _folder_for_valid(skill: Path) -> None:
    _remove_valid(skill)
    (skill / "valid.jsonl").mkdir()


def _no_files(skill: Path) -> None:
    _remove_valid(skill)
    (skill / "train.jsonl").unlink()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing file": (_remove_valid, "valid.jsonl is missing; a skill needs train.jsonl and"),
    "empty file": (_empty_valid, "valid.jsonl is empty; a skill needs at least one example"),
    "folder": (_folder_for_valid, "valid.jsonl cannot be read: Is a directory"),
    "empty skill": (_no_files, "train.jsonl is missing"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_skill_folder_is_told_with_the_file(skill: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(skill)
    with pytest.raises(DemoError, match=re.escape(message)):
        read_skills(skill.parent)


def test_a_folder_that_is_missing_or_holds_no_skill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="is not a folder"):
        read_skills(tmp_path / "nowhere")
    with pytest.raises(DemoError, match=r"holds no skill; a skill is a folder with train.jsonl"):
        read_skills(tmp_path)
