"""Reading what others wrote: JSON, safetensors, and ``.pt`` files that can run nothing."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelora.errors import CheckpointError
from moelora.router_file import read_tensors

#: Configs are a few kilobytes; a larger one is not read into memory.
MAX_JSON_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it cannot be read, is larger than 16 MiB, or is no JSON object.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_JSON_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if text is None:
        raise CheckpointError(
            f"{path} has {size} bytes; a config of more than {MAX_JSON_BYTES} is not read."
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_pt(path: Path) -> dict[Any, Any]:
    """Read the dict of a ``.pt`` or ``.bin`` file without running anything that is in it.

    Only torch's zip format is read, uncompressed as torch writes it, and only with
    ``weights_only=True``, which knows tensors and plain values and calls nothing else. A tensor
    that claims more values than its storage holds is refused before anyone copies it.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is damaged, in another format, holds anything but tensors and plain
            values, or is no dict.
    """
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and loading it could "
            f"run code ({reason}). Load and save it anew where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason}") from error
    except (AttributeError, IndexError, AssertionError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dict, got {type(content).__name__}.")
    _check_values(content, str(path), depth=0)
    return content


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [i.filename for i in archive.infolist() if i.file_size > i.compress_size]
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged or not in the zip format that torch.save writes."
        ) from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if compressed:
        raise CheckpointError(
            f"{path} is refused: {compressed[0]!r} in it is compressed, which torch never does."
        )


def _check_values(value: Any, where: str, *, depth: int) -> None:
    """Refuse tensors that are larger than what they hold; other containers stay small."""
    if isinstance(value, Tensor):
        check_tensor(value, where)
    elif isinstance(value, dict) and depth < 4:
        for key, item in value.items():
            _check_values(item, f"{key!r} of {where}", depth=depth + 1)
    elif isinstance(value, list | tuple) and depth < 4:
        for item in value:
            _check_values(item, where, depth=depth + 1)


def check_tensor(tensor: Tensor, where: str) -> None:
    """Refuse a tensor whose shape claims more values than its storage holds.

    Raises:
        CheckpointError: for that, and for sparse or quantised tensors.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{where} is no ordinary tensor ({tensor.layout}, {tensor.device}).")
    claimed = tensor.numel() * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if claimed > held:
        raise CheckpointError(
            f"{where} is refused: its shape {tuple(tensor.shape)} claims {claimed} bytes, but only "
            f"{held} are there."
        )


def read_state(path: Path) -> dict[Any, Any]:
    """Read a safetensors file, or a ``.pt`` file by :func:`read_pt`.

    Raises:
        CheckpointError: as the one or the other.
    """
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    return read_pt(path)


def check_floats(tensors: dict[str, Tensor], where: str) -> None:
    """Refuse what is no float tensor, or not finite.

    Raises:
        CheckpointError: naming the tensor.
    """
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{key!r} of {where} must be a float tensor, got {kind}.")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"Tensor {key!r} of {where} holds NaN or infinity.")
