"""Loads over a training, from the logs that trainers write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelora import ReportError
from moelora.report.results import TrainingLoads
from moelora.report.training_log import read_training_loads

EXPECTED = TrainingLoads([1, 5], [[0.25, 0.75], [0.5, 0.5]])


def _file(tmp_path: Path, content: Any, *, lines: bool = False) -> Path:
    path = tmp_path / "log"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return path


RECORDS = {
    "a list": [{"step": 1, "expert_load": [1, 3]}, {"step": 5, "expert_load": [0.5, 0.5]}],
    "by router": [
        {"step": 1, "loads": {"a": [0, 1], "b": [0.5, 0.5]}},
        {"step": 5, "loads": {"a": [1, 0], "b": [0, 1]}},
    ],
    "of the callback": [
        {
            "step": 1,
            "moe/load/model.layers.0.q_proj/0": 0.5,
            "moe/load/model.layers.0.q_proj/1": 0.5,
            "moe/load/model.layers.1.q_proj/0": 0.0,
            "moe/load/model.layers.1.q_proj/1": 1.0,
            "moe/load_max": 1.0,
        },
        {"step": 5, "moe/load/model/0": 0.1, "moe/load/model/1": 0.1, "moe/entropy/model": 1.0},
    ],
    "flat": [
        {"step": 1, "moe/expert_load/0": 1, "moe/expert_load/1": 3},
        {"step": 5, "load_0": 2, "load_1": 2},
    ],
}


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("form", ["lines", "list", "trainer state"])
def test_loads_are_read_in_every_form(
    tmp_path: Path, records: list[dict[str, Any]], form: str
) -> None:
    records = [{"step": 0, "loss": 2.0}, *records, {"train_runtime": 1.0}]
    content: Any = {"log_history": records} if form == "trainer state" else records
    path = _file(tmp_path, content, lines=form == "lines")
    assert read_training_loads(path, experts=2) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"step": 1, "loss": 2}], "holds no loads"),
        ([{"expert_load": [1, 1]}], "step must be a whole number, got None"),
        ([{"step": 1, "expert_load": [1, 1, 1]}], "has loads of 3 experts, must be 2"),
        ([{"step": 2, "load": [1, 1]}, {"step": 2, "load": [1, 1]}], "step 2 follows step 2"),
        ([{"step": 1, "load": [-1, 1]}], "must be numbers of at least 0"),
        ([{"step": 1, "load": [0, 0]}], "must be numbers of at least 0"),
        ([{"step": 1, "load": ["a", 1]}], "must be numbers of at least 0"),
        ([{"step": 1, "load": {"a": [1, 1], "b": [1]}}], "different sizes"),
        ([{"step": 1, "load": {"a": 1}}], "must be numbers of at least 0"),
        ([{"step": 1, "load/1": 1}], r"loads of the experts \[1\], some are missing"),
        ([1], "must hold a list of records"),
        ("text", "must hold a list of records"),
    ],
)
def test_what_holds_no_loads_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        read_training_loads(_file(tmp_path, content), experts=2)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_training_loads(tmp_path / "none", experts=2)
    path = tmp_path / "odd"
    path.write_bytes(b"\xff")
    with pytest.raises(ReportError, match="not UTF-8"):
        read_training_loads(path, experts=2)
    path.write_text('{"step": 1}\n{')
    with pytest.raises(ReportError, match=r"odd:2: invalid JSON"):
        read_training_loads(path, experts=2)
