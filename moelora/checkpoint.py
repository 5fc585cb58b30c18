"""A mixture on disk: the adapter's config and weights as PEFT writes them, and the router's file.

PEFT writes and reads ``adapter_config.json`` and ``adapter_model.safetensors``. Here the router is
written once more on its own, and everything is checked before the model changes: which tensors
there are, their shapes, dtypes and values, and that both copies of the router agree. Only
safetensors and JSON are read.
"""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moelora import _peft
from moelora.attached import get_router
from moelora.attached_file import (
    check_attached,
    is_attached_file,
    restore_attached,
    save_attached,
)
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig
from moelora.errors import CheckpointError
from moelora.model_card import add_to_model_card
from moelora.rollback import unchanged_on_error
from moelora.router_file import (
    MIXTURE,
    ROUTER_FILE,
    read_router_file,
    read_tensors,
    write_router_file,
)

_ROUTER_KEY = ".lora_router."


# The adapter's tensors in and out of the model -----------------------------------------------


def get_adapter_state_dict(
    original: Callable[..., dict[str, Tensor]],
    cls: type,
    model: nn.Module,
    config: Any,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    unwanted_adapter_names: list[str],
) -> dict[str, Tensor]:
    """Select an adapter's tensors, also where another adapter's name drops keys by accident.

    PEFT has already removed every key that contains ``.<another adapter>.``, so an adapter named
    ``"0"`` or ``"layers"`` takes this one's keys along. Beside a mixture, names match exactly.

    Raises:
        CheckpointError: if keys are gone and ``state_dict`` is not the model's own.
    """
    attached = _attached_keys(model)
    state_dict = {key: value for key, value in state_dict.items() if key not in attached}
    configs = getattr(model, "peft_config", {}).values()
    if any(isinstance(other, MoELoraConfig) for other in configs):
        state_dict = _exact_state_dict(model, adapter_name, state_dict, unwanted_adapter_names)
    return original(cls, model, config, adapter_name, state_dict, unwanted_adapter_names)


def _attached_keys(model: nn.Module) -> set[str]:
    """An attached router is a child of the tuner, which PEFT takes for a part of each adapter."""
    if not isinstance(model, _peft.PeftModel | _peft.LoraModel):
        return set()
    router = get_router(model)
    prefix = "base_model.router." if isinstance(model, _peft.PeftModel) else "router."
    return set() if router is None else {prefix + key for key in router.state_dict()}


def _exact_state_dict(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], others: list[str]
) -> dict[str, Tensor]:
    foreign = {key for other in others for key in _adapter_keys(model, other)}
    kept = {key: value for key, value in state_dict.items() if key not in foreign}
    missing = [key for key in _adapter_keys(model, adapter_name) if key not in kept]
    if not missing:
        return kept
    own = model.state_dict()
    probe = next((key for key in state_dict if key in own), None)
    if probe is not None and state_dict[probe].data_ptr() != own[probe].data_ptr():
        raise CheckpointError(
            f"Adapter {adapter_name!r} cannot be saved: PEFT drops {len(missing)} of its tensors "
            f"(e.g. {missing[0]!r}) since another adapter's name, one of {others}, is part of "
            "their names. Rename that adapter."
        )
    return {**kept, **{key: own[key] for key in missing}}


def remap_adapter_state_dict_for_load(
    original: Callable[..., dict[str, Tensor]],
    cls: type,
    model: nn.Module,
    config: Any,
    adapter_name: str,
    state_dict: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Map checkpoint keys to the model's, and check a mixture's tensors before any is loaded.

    Raises:
        CheckpointError: if tensors are missing, of another shape or dtype kind, not finite, or
            meant for layers that the model does not have.
    """
    remapped = original(cls, model, config, adapter_name, state_dict)
    if isinstance(config, MoELoraConfig):
        _check_tensors(model, adapter_name, remapped)
    return remapped


def _adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """All tensors of one adapter in the model's layers, by their name in its state dict."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _peft.LoraLayer):
            continue
        layer_name = name.removeprefix("_fsdp_wrapped_module.")
        for container_name in layer.adapter_layer_names:
            container = getattr(layer, container_name, None)
            if container is None or adapter_name not in container:
                continue
            prefix = f"{layer_name}.{container_name}.{adapter_name}"
            item = container[adapter_name]
            if isinstance(item, Tensor):
                found[prefix] = item
            else:
                found.update({f"{prefix}.{k}": v for k, v in item.state_dict().items()})
    return found


def _check_tensors(model: nn.Module, adapter_name: str, loaded: dict[str, Tensor]) -> None:
    expected = _adapter_keys(model, adapter_name)
    missing = [key for key in expected if key not in loaded]
    if missing:
        kind = "router" if any(_ROUTER_KEY in key for key in missing) else "adapter"
        raise CheckpointError(
            f"The checkpoint of mixture {adapter_name!r} lacks {len(missing)} {kind} tensors, e.g. "
            f"{missing[0]!r}. A missing router is not replaced by a random one."
        )
    unknown = [key for key in loaded if ".lora_" in key and key not in expected]
    if unknown:
        raise CheckpointError(
            f"The checkpoint of mixture {adapter_name!r} has {len(unknown)} tensors for which this "
            f"model has no place, e.g. {unknown[0]!r}."
        )
    for key, parameter in expected.items():
        _check_tensor(key, loaded[key], parameter)


def _check_tensor(key: str, loaded: Tensor, expected: Tensor) -> None:
    if loaded.shape != expected.shape:
        raise CheckpointError(
            f"Tensor {key!r} has shape {tuple(loaded.shape)} in the checkpoint, but the config "
            f"asks for {tuple(expected.shape)}."
        )
    if loaded.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(
            f"Tensor {key!r} has dtype {loaded.dtype} in the checkpoint, but must be like "
            f"{expected.dtype}."
        )
    if loaded.is_floating_point() and not bool(torch.isfinite(loaded).all()):
        raise CheckpointError(f"Tensor {key!r} holds NaN or infinity in the checkpoint.")


# Saving --------------------------------------------------------------------------------------


def save_pretrained(
    original: Callable[..., None],
    model: Any,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save as PEFT does, then write each mixture's router beside its adapter.

    Raises:
        CheckpointError: if pickle files are asked for, or a fixed mixture would be saved beside
            another mixture's router; nothing is written then.
    """
    call = inspect.signature(original).bind(model, save_directory, *args, **kwargs)
    call.apply_defaults()
    selected = call.arguments["selected_adapters"]
    names = list(model.peft_config) if selected is None else list(selected)
    configs = {name: model.peft_config[name] for name in names if name in model.peft_config}
    mixtures = {n: c for n, c in configs.items() if isinstance(c, MoELoraConfig)}
    for name in mixtures:
        if not call.arguments["safe_serialization"]:
            raise CheckpointError(
                f"Mixture {name!r} is saved as safetensors only, got safe_serialization=False: "
                "pickle files can run code when they are loaded."
            )
        check_folder_name(name)
    attached = get_router(model) is not None
    if attached:
        check_attached(model, Path(save_directory), mixtures)
    for name, config in configs.items():
        folder = _folder(save_directory, name)
        replaced = attached and folder == Path(save_directory)
        if not replaced and (name not in mixtures or not config.has_router):
            _check_no_stale_router(name, folder)
    if not call.arguments["is_main_process"] or not (mixtures or attached):
        original(model, save_directory, *args, **kwargs)
        return
    with _written_whole(Path(save_directory)) as folder:
        original(model, folder, *args, **kwargs)
        for name, config in mixtures.items():
            if config.has_router:
                _write_router(_folder(folder, name), name, config)
        if attached:
            save_attached(model, folder)
        add_to_model_card(folder, mixtures)


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, whose files replace those of ``target`` one by one when all are there.

    A crash or a full disk half way leaves the earlier files as they were.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
        folder = Path(name)
        card = target / "README.md"
        if card.is_file():
            shutil.copy2(card, folder / card.name)
        yield folder
        for path in sorted(folder.rglob("*")):
            place = target / path.relative_to(folder)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                path.replace(place)


def _write_router(folder: Path, name: str, config: MoELoraConfig) -> None:
    """Copy the router out of the adapter file just written, so that both agree to the bit."""
    tensors = read_tensors(folder / _peft.SAFETENSORS_WEIGHTS_NAME, only=_ROUTER_KEY)
    experts = [f"{name}.{index}" for index in range(config.num_experts)]
    write_router_file(folder, tensors, kind=MIXTURE, experts=experts)


def _folder(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    root = Path(save_directory)
    return root if adapter_name == "default" else root / adapter_name


def check_folder_name(name: str) -> None:
    """Refuse a name that, as a folder, would lie elsewhere.

    Raises:
        CheckpointError: if ``name`` is empty, absolute, a dot name or holds a separator.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(
            f"{name!r} cannot be saved under its name: it must be a plain folder name, without "
            "separators, '..' or a drive."
        )


def _check_no_stale_router(name: str, folder: Path) -> None:
    if (folder / ROUTER_FILE).exists():
        raise CheckpointError(
            f"Adapter {name!r} has no router, but {folder / ROUTER_FILE} holds the router of "
            "another one. Save to another folder, or remove that file."
        )


# Loading -------------------------------------------------------------------------------------


def load_adapter(
    original: Callable[..., Any],
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load as PEFT does, after checking a mixture's files; a failed load leaves no trace.

    Raises:
        CheckpointError: if a file of a mixture is missing, damaged or contradicts another.
    """
    if not check_folder(model_id, **_hub_arguments(kwargs)):
        return original(model, model_id, adapter_name, *args, **kwargs)
    with unchanged_on_error(model):
        return original(model, model_id, adapter_name, *args, **kwargs)


def load_adapter_into_base(
    original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Transformers' own ``model.load_adapter``: the same checks before and after.

    Raises:
        CheckpointError: if a file of a mixture is missing, damaged or contradicts another, or the
            file has no tensor for a layer of this model.
    """
    call = inspect.signature(original).bind(base, *args, **kwargs).arguments
    folder = call.get("peft_model_id")
    extra = {**call.get("adapter_kwargs", {}), **kwargs} if folder is not None else {}
    if folder is None or not check_folder(folder, **_hub_arguments(extra)):
        return original(base, *args, **kwargs)
    with unchanged_on_error(base):
        before = set(getattr(base, "peft_config", {}))
        result = original(base, *args, **kwargs)
        loaded = set(_read_shapes(_Locator(os.fspath(folder), **_hub_arguments(extra))))
        configs: Any = base.peft_config
        for name in set(configs) - before:
            expected = {_without_adapter(key, name) for key in _adapter_keys(base, name)}
            missing = sorted(key for key in expected if f"base_model.model.{key}" not in loaded)
            if missing:
                raise CheckpointError(
                    f"{folder} lacks {len(missing)} tensors for this model, e.g. {missing[0]!r}. A "
                    "missing router is not replaced by a random one."
                )
        return result


def _without_adapter(key: str, name: str) -> str:
    head, _, tail = key.rpartition(f".{name}")
    return head + tail


def from_pretrained(
    original: Callable[..., Any],
    cls: type,
    model: nn.Module,
    model_id: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a PEFT model; if a mixture's files are refused, the base model is as it was.

    Raises:
        CheckpointError: if a file of a mixture is missing, damaged or contradicts another.
    """
    router = kwargs.pop("router", None)
    hub = _hub_arguments(kwargs)
    is_mixture = check_folder(model_id, **hub)
    file = None if is_mixture and router is None else _attached_file(model_id, **hub)
    if not is_mixture and router is None and file is None:
        return original(cls, model, model_id, *args, **kwargs)
    with unchanged_on_error(model):
        loaded = original(cls, model, model_id, *args, **kwargs)
        restore_attached(loaded, file, router)
        return loaded


def _attached_file(
    model_id: str | os.PathLike[str], *, subfolder: str | None, hub: dict[str, Any]
) -> Path | None:
    """The file of a router attached over this LoRA adapter: in its folder, or one above."""
    here = _Locator(os.fspath(model_id), subfolder, hub)
    config_path = here(_peft.CONFIG_NAME)
    if config_path is None or '"LORA"' not in config_path.read_text("utf-8", "replace"):
        return None
    above = _Locator(os.fspath(model_id), None, hub)
    places = [here(ROUTER_FILE), here.above(ROUTER_FILE), above(ROUTER_FILE) if subfolder else None]
    return next((path for path in places if path is not None and is_attached_file(path)), None)


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
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
    locate = _Locator(os.fspath(model_id), subfolder, hub or {})
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
    routers = read_tensors(weights_path, only=_ROUTER_KEY)
    router_path = locate(ROUTER_FILE)
    if router_path is not None:
        _check_agreement(router_path, weights_path, routers)
    return True


class _Locator:
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
        path = self.local.parent / filename
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
        except (EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError):
            # neither a folder nor a repository: PEFT says so in its own words
            return None


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


def _read_shapes(source: "Path | _Locator") -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter file's tensors, from its header alone."""
    path = source if isinstance(source, Path) else source(_peft.SAFETENSORS_WEIGHTS_NAME)
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def _check_shapes(path: Path, config: MoELoraConfig) -> None:
    """Hold the file's tensors against the config, before a model is made after it."""
    shapes = _read_shapes(path)
    layers = {key.partition(".lora_")[0] for key in shapes if ".lora_" in key}
    if not layers:
        raise CheckpointError(f"{path} holds no LoRA tensors.")
    routed = {key.partition(".lora_")[0] for key in shapes if _ROUTER_KEY in key}
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


def _check_agreement(path: Path, weights_path: Path, routers: dict[str, Tensor]) -> None:
    """Hold the router's two copies against each other: if they differ, someone edited one."""
    file = read_router_file(path)
    if file.kind != MIXTURE:
        return
    same = file.tensors.keys() == routers.keys() and all(
        tensor.dtype == routers[key].dtype and torch.equal(tensor, routers[key])
        for key, tensor in file.tensors.items()
    )
    if not same:
        raise CheckpointError(
            f"The router in {path} differs from the one in {weights_path}: one of them was "
            "changed. Restore the pair, or delete the wrong router.safetensors to use the other."
        )
