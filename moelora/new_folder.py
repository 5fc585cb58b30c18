"""A folder that is written whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from moelora import _peft
from moelora.errors import CheckpointError
from moelora.router_file import ROUTER_FILE

# what an adapter folder holds; anything else in it is somebody's and is not deleted
_OURS = frozenset(
    {
        _peft.CONFIG_NAME,
        _peft.SAFETENSORS_WEIGHTS_NAME,
        _peft.WEIGHTS_NAME,
        ROUTER_FILE,
        "README.md",
        ".gitattributes",
    }
)


def check_new_folder(
    out: "str | os.PathLike[str]",
    *,
    force: bool = False,
    sources: Sequence["str | os.PathLike[str]"] = (),
) -> Path:
    """Refuse, before any work, a place that cannot be written to.

    Args:
        out: the folder to make.
        force: replace an adapter that is there.
        sources: folders that are read, and must not be replaced.

    Returns:
        Its path, without links.

    Raises:
        CheckpointError: if ``out`` is a file or lies below one, is one of the sources, or not empty
            (with ``force``: if it holds something else than an adapter).
    """
    if not os.fspath(out):
        raise CheckpointError("The folder to write to must have a name, got ''.")
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{out} is a file, not a folder to write to.")
    existing = next(each for each in path.parents if each.exists())
    if not existing.is_dir():
        raise CheckpointError(f"{out} cannot be written: {existing} is a file.")
    for source in sources:
        if Path(source).is_dir() and Path(source).resolve() == path:
            raise CheckpointError(f"{out} is read from and not replaced: choose another folder.")
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if found and not force:
        raise CheckpointError(
            f"{out} is not empty. Choose another folder, or replace the adapter in it with force "
            "(--force)."
        )
    foreign = sorted(found - _OURS)
    if foreign or (found and _peft.CONFIG_NAME not in found):
        raise CheckpointError(
            f"{out} holds more than an adapter ({', '.join(foreign[:3]) or 'no config'}) and is "
            "not replaced, even with force. Choose another folder."
        )
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: as :func:`check_new_folder` returned it.

    Raises:
        CheckpointError: if nothing can be written there.
    """
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _take_place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Rename; an adapter that is there steps aside until the new one has its name."""
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    existed = path.exists()
    if existed:
        path.replace(old)
    try:
        new.replace(path)
    except OSError:
        if existed:
            with suppress(OSError):
                old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
