"""``router.safetensors``: a router on its own, checked to the last bit when it is read."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moelora.config import FORMAT_VERSION
from moelora.errors import CheckpointError

ROUTER_FILE = "router.safetensors"
#: The file of a mixture's own routers, which are in its adapter file too.
MIXTURE = "mixture"
#: The file of a router that was attached over several adapters; nowhere else.
ATTACHED = "attached"
_FORMAT = "moelora_format"


@dataclass(frozen=True)
class RouterFile:
    """What a router file holds: its tensors by name, and its header."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def kind(self) -> str:
        """``"mixture"`` or ``"attached"``."""
        return self.metadata.get("kind", MIXTURE)

    @property
    def experts(self) -> list[str]:
        """The names of the experts, in routing order."""
        names: list[str] = json.loads(self.metadata["experts"])
        return names


def check_folder_name(name: str, *, where: str = "") -> None:
    """Refuse a name that, as a folder, would lie elsewhere.

    Raises:
        CheckpointError: if ``name`` is empty, absolute, a dot name or holds a separator.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(
            f"{where}{name!r} cannot be saved under its name: it must be a plain folder name, "
            "without separators, '..' or a drive."
        )


def write_router_file(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    kind: str,
    experts: list[str],
    extra: dict[str, str] | None = None,
) -> None:
    """Write ``router.safetensors`` into ``folder`` in one step: whole, or not at all.

    Args:
        folder: an existing folder.
        tensors: the router's tensors by name.
        kind: ``"mixture"`` or ``"attached"``.
        experts: their names, in routing order.
        extra: more of the header.
    """
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    metadata = {
        "format": "pt",
        _FORMAT: str(FORMAT_VERSION),
        "kind": kind,
        "experts": json.dumps(experts),
        "sha256": _digest(tensors),
        **(extra or {}),
    }
    path = folder / ROUTER_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether a readable safetensors file has moelora's header.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def read_router_file(path: Path) -> RouterFile:
    """Read and check a router file.

    Raises:
        CheckpointError: if it cannot be read, is not ours, of a newer format, damaged, or holds
            values that are not finite.
    """
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    version = metadata.get(_FORMAT)
    if version is None or not re.fullmatch("[0-9]{1,9}", version):
        raise CheckpointError(f"{path} is no router file of moelora: its header has no version.")
    if int(version) < 1:
        raise CheckpointError(f"{path} has format {version}, which never was.")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this release reads up to {FORMAT_VERSION}. Upgrade "
            "moelora."
        )
    if metadata.get("sha256") != _digest(tensors):
        raise CheckpointError(f"{path} is damaged: its tensors do not match its digest.")
    if metadata.get("kind", MIXTURE) not in (MIXTURE, ATTACHED):
        raise CheckpointError(
            f"{path} is of kind {metadata['kind']!r}, must be {MIXTURE!r} or {ATTACHED!r}."
        )
    _check_experts(path, metadata.get("experts"))
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"Tensor {key!r} of {path} holds NaN or infinity.")
    return RouterFile(tensors, metadata)


def _check_experts(path: Path, text: str | None) -> None:
    try:
        names = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: experts in its header is no JSON list.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: experts in its header must be a list of names.")
    for name in names:
        check_folder_name(name, where=f"{path}: among its experts, ")


def read_tensors(path: Path, *, only: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names contain ``only``.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if only in key}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous().cpu()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
