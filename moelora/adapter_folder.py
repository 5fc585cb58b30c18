"""The files of an adapter: where they are, and whether those of a mixture belong together."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moelora import _peft
from moelora.attached_file import is_attached_file
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig
from moelora.errors import CheckpointError
from moelora.router_file import MIXTURE, ROUTER_FILE, read_router_file, read_tensors

ROUTER_KEY = ".lora_router."

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What :func:`check_folder` needs of the arguments of a load."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    return {"subfolder": kwargs.get("subfolder"), "hub": hub}


def check_folder(
    model_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    hub: dict[str, Any] | None = None,
) -> bool:
    """Check a mixture's files; return False if the folder (or hub id) holds no mixture.

    Raises:
        CheckpointError: if a file is missing, damaged, of a newer format, or contradicts another.
    """
    locate = Locator(os.fspath(model_id), subfolder, hub or {})
    config_path = locate(_peft.CONFIG_NAME)
    if config_path is None:
        return False
    config = _read_config(config_path)
    if config is None:
        return False
    weights_path = locate(_peft.SAFETENSORS_WEIGHTS_NAME)
    if weights_path is None:
        raise CheckpointError(
            f"{locate.where} holds no {_peft.SAFETENSORS_WEIGHTS_NAME}. A mixture is read from "
            "safetensors only."
        )
    _check_shapes(weights_path, config)
    routers = read_tensors(weights_path, only=ROUTER_KEY)
    router_path = locate(ROUTER_FILE)
    if router_path is not None:
        _check_agreement(router_path, weights_path, routers, num_experts=config.num_experts)
    return True


def read_folder(
    model_id: str | os.PathLike[str] | None,
    *,
    subfolder: str | None = None,
    hub: dict[str, Any] | None = None,
) -> tuple[MoELoraConfig | None, set[str]]:
    """The config of a mixture in a folder (or hub id), and the names of its tensors.

    Raises:
        CheckpointError: as :func:`check_folder`.
    """
    if model_id is None or not check_folder(model_id, subfolder=subfolder, hub=hub):
        return None, set()
    locate = Locator(os.fspath(model_id), subfolder, hub or {})
    config_path, weights_path = locate(_peft.CONFIG_NAME), locate(_peft.SAFETENSORS_WEIGHTS_NAME)
    if config_path is None or weights_path is None:
        return None, set()
    return _read_config(config_path), set(read_shapes(weights_path))


class Locator:
    """Finds the files of an adapter in a local folder, else on the hub as PEFT does."""

    def __init__(self, model_id: str, subfolder: str | None, hub: dict[str, Any]) -> None:
        self.model_id = model_id
        self.subfolder = subfolder
        self.hub = hub
        self.local = Path(model_id, subfolder) if subfolder else Path(model_id)

    @property
    def where(self) -> str:
        """The folder or hub id, for messages."""
        return str(self.local) if self.local.is_dir() else self.model_id

    def above(self, filename: str) -> Path | None:
        """Return ``filename`` in the folder above the adapter's, if that is a local one."""
        path = self.local.resolve().parent / filename
        return path if self.local.is_dir() and path.exists() else None

    def __call__(self, filename: str) -> Path | None:
        """Return a local path of ``filename``, or None if there is none."""
        if self.local.is_dir():
            path = self.local / filename
            return path if path.exists() else None
        try:
            return Path(
                hf_hub_download(self.model_id, filename, subfolder=self.subfolder, **self.hub)
            )
        except EntryNotFoundError:
            return None
        except (OSError, ValueError):
            if filename == _peft.CONFIG_NAME:
                # neither a folder nor a repository: PEFT says so in its own words
                return None
            raise


def attached_file(
    model_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    hub: dict[str, Any] | None = None,
) -> Path | None:
    """The file of a router attached over a LoRA adapter: in the adapter's folder, or one above.

    One above, it must name the adapter's folder among its experts.
    """
    here = Locator(os.fspath(model_id), subfolder, hub or {})
    config_path = here(_peft.CONFIG_NAME)
    if config_path is None or not re.search(
        '"peft_type": "(MOE)?LORA"', config_path.read_text("utf-8", "replace")
    ):
        return None
    beside = here(ROUTER_FILE)
    if beside is not None and is_attached_file(beside):
        return beside
    root = Locator(os.fspath(model_id), None, hub or {})
    above = root(ROUTER_FILE) if subfolder else here.above(ROUTER_FILE)
    name = subfolder or here.local.resolve().name
    if above is None or not is_attached_file(above):
        return None
    return above if name in read_router_file(above).experts else None


def _read_config(path: Path) -> MoELoraConfig | None:
    """The config if it is a mixture's; None for every other adapter."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("peft_type") != DISK_PEFT_TYPE:
        return None
    try:
        config = MoELoraConfig.from_peft_type(**content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(config, MoELoraConfig):
        raise CheckpointError(f"{path} does not describe a mixture.")
    return config


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter file's tensors, from its header alone.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def _check_shapes(path: Path, config: MoELoraConfig) -> None:
    """Hold the file's tensors against the config, before a model is made after it."""
    shapes = read_shapes(path)
    layers = {key.partition(".lora_")[0] for key in shapes if ".lora_" in key}
    if not layers:
        raise CheckpointError(f"{path} holds no LoRA tensors.")
    routed = {key.partition(".lora_")[0] for key in shapes if ROUTER_KEY in key}
    unrouted = sorted(layers - routed) if config.router_scope == "module" else []
    if config.has_router and (not routed or unrouted):
        where = f"of layer {unrouted[0]!r}" if routed and unrouted else "at all"
        raise CheckpointError(
            f"{path} holds no router tensors {where}, but its config asks for router_type="
            f"{config.router_type!r}. A missing router is not replaced by a random one."
        )
    for key, shape in shapes.items():
        rows = _expected_rows(key, config)
        if rows is not None and (not shape or shape[0] != rows):
            raise CheckpointError(
                f"Tensor {key!r} of {path} has shape {shape}, but its config, with num_experts="
                f"{config.num_experts}, r={config.r} and router_hidden_size="
                f"{config.router_hidden_size}, asks for {rows} rows."
            )


def _expected_rows(key: str, config: MoELoraConfig) -> int | None:
    if key.endswith((".lora_A.weight", ".lora_embedding_A")):
        return None if config.rank_pattern else config.num_experts * config.r
    if key.endswith(".lora_router.hidden_weight"):
        return config.router_hidden_size
    if key.endswith((".lora_router.weight", ".lora_router.mature")):
        return config.num_experts
    return None


def _check_agreement(
    path: Path, weights_path: Path, routers: dict[str, Tensor], *, num_experts: int
) -> None:
    """Hold the router's two copies against each other: if they differ, someone edited one."""
    file = read_router_file(path)
    if file.kind != MIXTURE:
        return
    if len(file.experts) != num_experts:
        raise CheckpointError(
            f"{path} names {len(file.experts)} experts, but the config has num_experts="
            f"{num_experts}."
        )
    same = file.tensors.keys() == routers.keys() and all(
        tensor.dtype == routers[key].dtype and torch.equal(tensor, routers[key])
        for key, tensor in file.tensors.items()
    )
    if not same:
        raise CheckpointError(
            f"The router in {path} differs from the one in {weights_path}: one of them was "
            "changed. Restore the pair, or delete the wrong router.safetensors to use the other."
        )
