"""The output folder appears whole or not at all."""

import os
import signal
import threading
from pathlib import Path

import pytest

from moelora.demo.errors import DemoError
from moelora.demo.workspace import Terminated, sigterm_raises, whole_folder


def test_a_finished_folder_appears_under_its_name_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "out") as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "file").read_text() == "new"


def test_an_earlier_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with whole_folder(out) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Terminated])
def test_a_failed_run_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")

    def fail() -> None:
        with whole_folder(out) as partial:
            (partial / "half").write_text("half")
            raise error

    with pytest.raises(error, match=r"^$"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


def test_a_failed_replacement_brings_the_earlier_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk full"), whole_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_leftover_of_a_killed_run_does_not_disturb(tmp_path: Path) -> None:
    leftover = tmp_path / f".out.{os.getpid()}.partial"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with whole_folder(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DemoError, match=r"cannot be written: (File exists|Not a directory)"),
        whole_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_sigterm_raises_inside_the_block_and_keeps_its_meaning_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match=r"^$"), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_may_run_a_demo_without_a_handler() -> None:
    entered = []

    def enter() -> None:
        with sigterm_raises():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]
