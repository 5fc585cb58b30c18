"""An output folder that appears whole or not at all."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moelora.demo.errors import DemoError


class Terminated(BaseException):
    """SIGTERM, as an exception, so that it cleans up as Ctrl-C does."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` that becomes ``out`` when the block succeeds.

    When the block raises, the temporary folder is removed and ``out`` stays what it was. A run
    that is killed leaves at most a ``.<out>.<pid>.partial`` folder, which nothing reads.

    Args:
        out: the folder to create or replace.

    Raises:
        DemoError: if the temporary folder cannot be created.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # a leftover under this name comes from a killed process that had our number
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written: {error.strerror}.") from error
    try:
        yield partial
        _replace(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(out: Path, new: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = new.with_suffix(".old")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` inside the block, in the main thread of a process."""

    def raise_terminated(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, raise_terminated)
    except ValueError:
        # only the main thread may set handlers; elsewhere SIGTERM keeps its meaning
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
