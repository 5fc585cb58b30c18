"""Numbers out of range, output folders that must not be touched, and packages not installed."""

import re
from pathlib import Path
from typing import Any

import pytest

from moelora.demo.errors import DemoError
from moelora.demo.options import DemoOptions, check_out, check_packages

BAD_NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "--steps must be at least 1, got 0."),
    "experts": ({"experts": 1, "top_k": 1}, "--experts must be at least 2, got 1."),
    "rank": ({"rank": -1}, "--rank must be at least 1, got -1."),
    "length": ({"max_length": 8}, "--max-length must be at least 16, got 8."),
    "seed": ({"seed": -1}, "--seed must be at least 0, got -1."),
    "top_k": ({"top_k": 5}, "--top-k must be between 1 and --experts=4, got 5."),
    "no top_k": ({"top_k": 0}, "--top-k must be between 1 and --experts=4, got 0."),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_a_number_out_of_range_is_refused_by_its_flag(case: str) -> None:
    values, message = BAD_NUMBERS[case]
    with pytest.raises(DemoError, match=re.escape(message)):
        DemoOptions(out=Path("out"), **values)


def test_a_new_an_empty_and_an_earlier_output_folder_are_accepted(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "deeper")
    check_out(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "report.html").write_text("")
    check_out(tmp_path)


def test_a_file_and_a_folder_of_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DemoError, match="--out must be a folder to create or replace"):
        check_out(tmp_path / "letter.txt")
    with pytest.raises(DemoError, match="holds files that no demo wrote"):
        check_out(tmp_path)


def test_an_output_folder_below_a_file_or_a_closed_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="is not a writable folder"):
        check_out(tmp_path / "file" / "out")
    # root may write anywhere, so the answer of the system is replaced
    monkeypatch.setattr("moelora.demo.options.os.access", lambda path, mode: False)
    with pytest.raises(DemoError, match="cannot be written"):
        check_out(tmp_path / "out")


def test_missing_packages_are_told_all_at_once() -> None:
    check_packages("json", "torch")
    with pytest.raises(DemoError, match="needs no_such_a, no_such_b: run `make demo`"):
        check_packages("json", "no_such_a", "no_such_b")
