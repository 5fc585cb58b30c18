"""Running another program: what is found, what it sees, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moelora.launch import LaunchError, run_module

ECHO = """
import json, sys
json.dump({"argv": sys.argv[1:], "name": __name__, "moelora": "moelora" in sys.modules}, sys.stdout)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is not importable yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def package(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for file, code in {"__init__": "", **files}.items():
        (folder / name / f"{file}.py").write_text(code)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--", "-h", "--"],
        ["--model_args", "pretrained=a,peft=b", "-x", "-1", "", "a b", "--x=--"],
    ],
)
@pytest.mark.parametrize("name", ["launched_module", "launched_package", "launched_module.py"])
def test_a_program_sees_its_own_arguments_as_they_are(
    name: str, arguments: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "launched_module.py").write_text(ECHO)
    package(here, "launched_package", __main__=ECHO)
    before = list(sys.argv), list(sys.path)
    assert run_module(name, arguments) == 0
    assert (sys.argv, sys.path) == before
    printed = capfd.readouterr().out
    assert printed == ECHO_OF % str(arguments).replace("'", '"')


ECHO_OF = '{"argv": %s, "name": "__main__", "moelora": true}'


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit", 0),
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import sys; sys.exit(True)", 1),
        ("pass", 0),
    ],
)
def test_the_exit_code_is_the_programs(code: str, expected: int, here: Path) -> None:
    (here / "ending.py").write_text(code)
    assert run_module("ending") == expected


def test_a_program_may_end_with_a_message(here: Path) -> None:
    (here / "message.py").write_text("raise SystemExit('no data')")
    with pytest.raises(SystemExit, match="no data"):
        run_module("message")


def test_errors_of_the_program_are_its_own(here: Path) -> None:
    (here / "failing.py").write_text("raise OSError('disk')")
    before = list(sys.argv), list(sys.path)
    with pytest.raises(OSError, match="disk"):
        run_module("failing")
    assert (sys.argv, sys.path) == before


def test_a_module_that_a_program_lacks_is_told_by_the_program(here: Path) -> None:
    package(here, "lacking", __init__="import nothing_of_the_kind", __main__="")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        run_module("lacking")


def test_a_package_without_main_is_run_by_its_console_script(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(here, "scripted", tool="import sys\ndef main():\n    print(sys.argv)\n    return 4\n")
    info = here / "scripted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nscripted = scripted.tool:main\n")
    monkeypatch.syspath_prepend(str(here))
    assert run_module("scripted", ["serve"]) == 4
    assert capsys.readouterr().out == "['scripted', 'serve']\n"


def test_the_module_comes_before_a_script_of_its_name(here: Path) -> None:
    # pytest is both
    (here / "pytest.py").write_text("raise SystemExit(9)")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pytest")
        assert run_module("pytest") == 9


@pytest.mark.parametrize(
    "name", ["no_such_program", "no.such", "json", "nothing.py", "", "-c", "."]
)
def test_what_cannot_be_run_is_named(name: str, here: Path) -> None:
    with pytest.raises(LaunchError, match="Cannot run '.*': it is no module or package with"):
        run_module(name)
