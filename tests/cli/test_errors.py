"""Every subcommand: bad input is one line with code 2, nothing is left; JSON is one object."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moelora import cli
from tests.adapters import edit_config
from tests.cli.adapters import assert_one_line_error, moelora, save_loras
from tests.lm import run_python


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_loras(tmp_path_factory.mktemp("loras"), tiny_model)


@pytest.fixture(scope="module")
def mixture(loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "M"
    assert moelora("compose", *loras, "--out", out).code == 0
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("SELECT name FROM users;\n" * 9)
    return path


def _commands(source: object, lora: Path, text: Path) -> dict[str, tuple[object, ...]]:
    """Each subcommand that reads an adapter, with ``source`` as the adapter."""
    return {
        "compose": (lora, source, "--out", "out"),
        "inspect": (source,),
        "export": (source, "--expert", 0, "--out", "out"),
        "merge": (source, "--weights", "1,1", "--out", "out", "--data", text),
        "report": (source, "--data", text, "--out", "out"),
        "validate": (source, "--out", "out"),
        "convert": (source, "--out", "out"),
    }


def test_a_bad_adapter_is_told_by_every_subcommand(
    loras: list[Path], mixture: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as a user without a network
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name, content in {
        "json": b"{",
        "list": b"[]",
        "bytes": b"\xff",
        "deep": b"[" * 10**5,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes(content)
    (tmp_path / "empty").mkdir()
    bad: list[object] = [tmp_path / name for name in ("json", "list", "bytes", "deep", "empty")]
    bad += [tmp_path / "nowhere", text, "owner/name", "a b/c?", "", "../up", "x" * 5000]
    for source in bad:
        for command, arguments in _commands(source, loras[0], text).items():
            assert_one_line_error(moelora(command, *arguments), command)
    assert list(work.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    loras: list[Path], mixture: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    commands = {
        "compose": tuple(loras),
        "export": (mixture, "--expert", 0),
        "merge": (mixture, "--weights", "1,1", "--yes"),
        "convert": (mixture,),
        "validate": (mixture,),
        "report": (mixture, "--data", text),
        "demo": ("--model", mixture),
    }
    for out in (text, text / "below", "full", "y" * 5000):
        for command, arguments in commands.items():
            if (command, out) != ("report", "full"):
                assert_one_line_error(moelora(command, *arguments, "--out", out), command)
    assert [str(path) for path in sorted(tmp_path.rglob("*"))] == [
        str(tmp_path / name) for name in ("full", "full/mine.txt")
    ]


def test_a_base_model_that_is_no_name_is_refused(mixture: Path, tmp_path: Path) -> None:
    before = json.loads((mixture / "adapter_config.json").read_text())["base_model_name_or_path"]
    edit_config(mixture, base_model_name_or_path=5)
    try:
        for command in ("inspect", "export"):
            more = ("--expert", 0, "--out", tmp_path / "out") if command == "export" else ()
            outcome = moelora(command, mixture, *more)
            assert_one_line_error(outcome, command, "base_model_name_or_path must be a string")
    finally:
        edit_config(mixture, base_model_name_or_path=before)


def test_json_is_one_object_of_every_subcommand(
    loras: list[Path], mixture: Path, text: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out", "--json")
    commands = {
        "compose": (*loras, "--out", tmp_path / "new", "--json"),
        "inspect": (mixture, "--json"),
        "export": (mixture, "--expert", 1, *out),
        "merge": (mixture, "--weights", "1,1", "--yes", "--out", tmp_path / "mean", "--json"),
        "report": (mixture, "--data", text, "--out", tmp_path / "one.html", "--json"),
    }
    for command, arguments in commands.items():
        outcome = moelora(command, *arguments)
        assert outcome.code == 0, outcome.err
        assert isinstance(outcome.json, dict)
    # the others' own tests run them with --json; `run` prints what its program prints
    other = {"demo", "convert", "validate", "run"}
    assert {each.__name__.rpartition(".")[2] for each in cli.COMMANDS} == other | commands.keys()


def test_what_the_system_refuses_is_one_line(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "file"))

    monkeypatch.setattr("moelora.describe", full)
    assert_one_line_error(moelora("inspect", mixture), "inspect", f"{os.strerror(28)}: {tmp_path}")


HELP = {
    "demo": "--model --data --steps --experts --top-k --rank --device --out --seed"
    " --compare-total-rank --json --max-length",
    "validate": "--base --device --experts --batch --seq --dtype --out",
}


def test_help_imports_no_part_of_a_job() -> None:
    code = (
        "import sys\nfrom moelora.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    try:\n        main([command, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "    print('NEXT')\n"
        "heavy = ('matplotlib', 'moelora.demo.job', 'moelora.validation.job')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = run_python(code, *HELP)
    assert done.returncode == 0, done.stderr
    *told, imported = done.stdout.split("NEXT\n")
    assert imported == "[]\n"
    for flags, text in zip(HELP.values(), told, strict=True):
        assert [flag for flag in flags.split() if flag not in text] == []
