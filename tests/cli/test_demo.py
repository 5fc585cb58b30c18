"""`moelora demo` as a person runs it: exit codes, one line for a mistake, and interruption."""

import dataclasses
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moelora.cli import demo, main
from moelora.demo.results import DemoResults, from_json
from tests.demo.tiny import made_up_results

BadCase = tuple[Callable[[Path], list[str]], str]


def _file(path: Path, content: bytes = b"") -> str:
    path.write_bytes(content)
    return str(path)


def _skill(folder: Path, line: bytes) -> str:
    (folder / "skills" / "one").mkdir(parents=True)
    for split in ("train", "valid"):
        _file(folder / "skills" / "one" / f"{split}.jsonl", line)
    return str(folder / "skills")


BAD_ARGUMENTS: dict[str, BadCase] = {
    "word for a number": (lambda _: ["--steps", "many"], "argument --steps: invalid int value"),
    "unknown flag": (lambda _: ["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    "steps": (lambda _: ["--steps", "0"], "--steps must be at least 1, got 0."),
    "top-k": (lambda _: ["--top-k", "9"], "--top-k must be between 1 and --experts=4, got 9."),
    "out is a file": (lambda p: ["--out", _file(p / "f")], "--out must be a folder"),
    "no data": (lambda p: ["--data", str(p / "none")], "is not a folder."),
    "empty data": (lambda p: ["--data", str(p)], "holds no skill"),
    "bad json": (lambda p: ["--data", _skill(p, b"{")], "train.jsonl:1: invalid JSON"),
    "no field": (lambda p: ["--data", _skill(p, b"{}")], "the field 'prompt' is missing"),
    "latin-1": (lambda p: ["--data", _skill(p, b'"\xe9"')], "train.jsonl:1: not UTF-8"),
    "device": (
        lambda p: ["--device", "abacus", "--data", _skill(p, b'{"prompt":"a","completion":"b"}')],
        "--device abacus is not available",
    ),
    "model": (
        lambda p: ["--model", str(p), "--data", _skill(p, b'{"prompt":"a","completion":"b"}')],
        "is a folder without config.json",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_mistake_is_told_in_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make_arguments, message = BAD_ARGUMENTS[case]
    (tmp_path / "in").mkdir()
    arguments = make_arguments(tmp_path / "in")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    try:
        code = main(["demo", *out, *arguments])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert re.fullmatch(r"moelora( demo)?: error: [^\n]+\n", told.err)
    assert message in told.err
    assert not (tmp_path / "out").exists()


def test_no_command_is_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main([])
    assert capsys.readouterr().err == (
        "moelora: error: the following arguments are required: command\n"
    )


@pytest.mark.slow
def test_a_run_prints_the_table_and_writes_the_folder(
    tiny_model: Path, toy_skills: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(tiny_model), "--data", str(toy_skills), "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--rank", "2"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("validation loss  frozen base  one LoRA of rank 4")
    assert "largest difference of the logits 0.0." in told.out
    assert "training mixture of 4 x rank 2, top 2" in told.err
    assert (tmp_path / "out" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@contextmanager
def _training(tiny_model: Path, toy_skills: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process of its own, some way into its training."""
    command = [sys.executable, "-m", "moelora", "demo", "--steps", "3000", "--out", str(out)]
    command += ["--model", str(tiny_model), "--data", str(toy_skills)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # a test run in the background ignores interruptions, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        told = ""
        try:
            while "loss=" not in told and process.poll() is None:
                told += process.stderr.read(1)
            assert process.poll() is None, told
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_an_interrupted_run_says_so_in_one_line_and_leaves_nothing(
    tiny_model: Path, toy_skills: Path, tmp_path: Path
) -> None:
    with _training(tiny_model, toy_skills, tmp_path / "out") as process:
        # so a run that is killed leaves no output folder either
        assert not (tmp_path / "out").exists()
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told == ""
    assert errors.endswith("\nmoelora demo: interrupted, nothing was written.\n")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


Pretend = Callable[[Callable[[], DemoResults]], list[str]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretend:
    """Replace the job by a function, and return arguments for it."""

    def replace(job: Callable[[], DemoResults]) -> list[str]:
        monkeypatch.setattr(demo, "_run", lambda options, skills: job())
        return ["demo", "--out", str(tmp_path / "out")]

    return replace


def test_json_is_all_that_is_printed_when_asked_for(
    pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pretend(made_up_results), "--json"]) == 0
    assert from_json(capsys.readouterr().out) == made_up_results()


def test_a_difference_after_reloading_is_exit_code_1(
    pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    off = dataclasses.replace(made_up_results(), reload_difference=0.5)
    assert main(pretend(lambda: off)) == 1
    assert "largest difference of the logits 0.5." in capsys.readouterr().out


def test_a_terminated_run_says_so_in_one_line(
    pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_terminated() -> DemoResults:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    assert main(pretend(be_terminated)) == 143
    assert capsys.readouterr().err == "moelora demo: terminated, nothing was written.\n"
