"""Arguments out of their range are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moelora.validation.errors import ValidationError
from moelora.validation.options import ValidationOptions, check_out, numbers

BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch": 0}, "--batch must be at least 1, got 0"),
    ({"seq": 1}, "--seq must be at least 2, got 1"),
    ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ({"warmup": -1}, "--warmup must be at least 0, got -1"),
    ({"batches": 0}, "--batches must be at least 1, got 0"),
    ({"seed": -1}, "--seed must be at least 0, got -1"),
    ({"experts": (1, 2)}, "--experts must be numbers from 2 to 256, got 1"),
    ({"experts": (2, 999)}, "--experts must be numbers from 2 to 256, got 999"),
    ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16, float64, got int8"),
    ({"tolerance": -1.0}, "--tolerance must be at least 0, got -1.0"),
    ({"tolerance": float("nan")}, "--tolerance must be at least 0, got nan"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_value_out_of_its_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ValidationOptions(Path("out"), **fields)


def test_numbers_are_read_sorted_and_once() -> None:
    assert numbers(" 8, 2,2,") == (2, 8)
    assert numbers("") == ()
    for text in ("2;4", "two", "-2", "2.5", "²", "123456"):
        with pytest.raises(ValidationError, match="--experts must be numbers with commas"):
            numbers(text)


def test_only_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    check_out(tmp_path / "new")
    check_out(tmp_path)
    (tmp_path / "report.md").write_text("old")
    check_out(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValidationError, match=r"files that no validation wrote \(thesis.txt\)"):
        check_out(tmp_path)
    with pytest.raises(ValidationError, match="must be a folder to create or replace"):
        check_out(tmp_path / "thesis.txt")
