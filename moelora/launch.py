"""Running other programs with moelora imported, so that they load mixtures as any adapter."""

import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moelora.errors import MoELoraError

_SCRIPTS = "console_scripts"


class LaunchError(MoELoraError, ImportError):
    """No module, console script or file of that name can be run."""


def run_module(name: str, arguments: Sequence[str] = ()) -> int:
    """Run a program in this process, as ``python -m name *arguments`` would.

    What is run, the first that fits: a file that ends in ``.py``; a module or a package with
    ``__main__`` (``lm_eval``); a console script (``transformers``, whose package cannot be run).
    The program sees its own ``sys.argv``; its exceptions are not touched.

    Args:
        name: the module, script or file.
        arguments: handed on as they are.

    Returns:
        The exit code: 0 if the program just ends.

    Raises:
        LaunchError: if nothing of that name can be run.
        SystemExit: if the program ends with a message instead of a code.

    Example:
        >>> run_module("calendar", ["2026", "11"])
           November 2026
        Mo Tu We Th Fr Sa Su
                           1
         2  3  4  5  6  7  8
         9 10 11 12 13 14 15
        16 17 18 19 20 21 22
        23 24 25 26 27 28 29
        30
        0
    """
    start, first_path = _find(name)
    with _command_line(name, arguments, first_path):
        try:
            result = start()
        except SystemExit as end:
            result = end.code
            if result is not None and not isinstance(result, int):
                raise
    return result if isinstance(result, int) else 0


def _find(name: str) -> tuple[Callable[[], Any], str]:
    """What to call, and the folder that its imports are looked for in first."""
    path = Path(name)
    # before the module: to look for `job.py` as one would import `job`
    if path.suffix == ".py" and path.is_file():
        return lambda: _run_path(name), str(path.resolve().parent)
    with _importable_here():
        if _is_runnable(name):
            return lambda: _run_name(name), _here()
    script = _console_script(name)
    if script is not None:
        return lambda: script.load()(), _here()
    raise LaunchError(
        f"Cannot run {name!r}: it is no module or package with __main__, no console script of an "
        "installed package, and no .py file."
    )


def _run_name(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_path(name: str) -> None:
    runpy.run_path(name, run_name="__main__")


def _is_runnable(name: str) -> bool:
    """Whether ``python -m name`` would find something to run."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        # a package on the way is missing; one that it imports itself is another matter
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return False
    return spec is not None


def _console_script(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=_SCRIPTS, name=name)), None)


def _here() -> str:
    """``python -m`` looks in the working folder first, unless it is told not to."""
    # a flag of Python 3.11
    return "" if getattr(sys.flags, "safe_path", False) else str(Path.cwd())


@contextmanager
def _importable_here() -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = [_here()] if _here() else []
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _command_line(name: str, arguments: Sequence[str], first_path: str) -> Iterator[None]:
    """The program's own ``sys.argv`` and first import folder; this one's again afterwards."""
    argv, path = list(sys.argv), list(sys.path)
    sys.argv[:] = [name, *arguments]
    sys.path[:0] = [first_path] if first_path else []
    try:
        yield
    finally:
        sys.argv[:] = argv
        sys.path[:] = path
