"""The command line: as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-case"], "No case matches 'no-such-case'"),
        (["list", "--suite", "everything"], "Unknown suite 'everything': choose one of bar"),
        (["run"], "Name cases, or a suite: --suite {bar,"),
        (["run", "--suite", "tiny", "--device", "tpu"], "Unknown device 'tpu'"),
        (["run", "--suite", "tiny", "--label", "../x"], "--label takes letters, digits"),
    ],
)
def test_unknown_names_are_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: Any
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"benchmarks: {message}")


def test_list_shows_suites_and_names(capsys: Any) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "bar",
        "sweep",
        "ops",
        "memory",
        "cpu",
        "smoke",
        "tiny",
    ]
    assert main(["list", "--suite", "tiny", "leak"]) == 0
    assert capsys.readouterr().out.split() == [
        "leak/tiny/2x8/fp32/eager/lora-r16",
        "leak/tiny/2x8/fp32/eager/moelora-e8-k2-r16",
    ]


def test_run_writes_json_with_its_environment_and_shows_tables(tmp_path: Path, capsys: Any) -> None:
    arguments = ["run", "--suite", "tiny", "prefill/tiny/2x8/fp32/eager/base", "decode*lora-r16"]
    arguments += ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--label", "x"]
    assert main(arguments) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("tiny-x-cpu-")
    run = json.loads(path.read_text())
    assert run["environment"]["commit"] == "abc"
    assert [result["status"] for result in run["results"]] == ["ok", "ok"]
    captured = capsys.readouterr()
    assert "| base | " in captured.out
    assert "2/2] decode/tiny" in captured.err


def test_a_wrong_result_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import benchmarks.correctness as correctness

    monkeypatch.setitem(correctness.TOLERANCES, "fp32", (0.0, 0.0))
    arguments = ["run", "--suite", "tiny", "decode*lora-r16", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "wrong results: decode/tiny/2x8/fp32/eager/lora-r16" in capsys.readouterr().err
