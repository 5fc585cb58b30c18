"""A mixture on disk: the adapter's config and weights as PEFT writes them, and the router's file.

PEFT writes and reads ``adapter_config.json`` and ``adapter_model.safetensors``. Here the router is
written once more on its own, and everything is checked before the model changes: which tensors
there are, their shapes, dtypes and values, and that both copies of the router agree. Only
safetensors and JSON are read.
"""

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.adapter_folder import (
    ROUTER_KEY,
    attached_file,
    check_folder,
    hub_arguments,
    read_folder,
)
from moelora.attached import get_router
from moelora.attached_file import (
    check_attached,
    check_no_stale_attached,
    has_attached,
    restore_attached,
    save_attached,
)
from moelora.binding import base_of
from moelora.config import ROUTING_FIELDS, MoELoraConfig
from moelora.errors import CheckpointError, MergeError
from moelora.mixture import no_conversion
from moelora.model_card import add_to_model_card
from moelora.rollback import unchanged_on_error
from moelora.router_file import (
    MIXTURE,
    ROUTER_FILE,
    check_folder_name,
    is_ours,
    read_tensors,
    write_router_file,
)

_GIVEN_ROUTER = "_moelora_given_router"


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
    _check_complete(adapter_name, missing)
    unknown = [key for key in loaded if ".lora_" in key and key not in expected]
    if unknown:
        raise CheckpointError(
            f"The checkpoint of mixture {adapter_name!r} has {len(unknown)} tensors for which this "
            f"model has no place, e.g. {unknown[0]!r}."
        )
    for key, parameter in expected.items():
        _check_tensor(key, loaded[key], parameter)


def _check_complete(adapter_name: str, missing: list[str]) -> None:
    if missing:
        kind = "router" if any(ROUTER_KEY in key for key in missing) else "adapter"
        raise CheckpointError(
            f"The checkpoint of mixture {adapter_name!r} lacks {len(missing)} {kind} tensors, e.g. "
            f"{missing[0]!r}. A missing router is not replaced by a random one."
        )


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
    """Save as PEFT does, with each mixture's router beside its adapter.

    All is checked before anything is written, and written before anything is replaced.

    Raises:
        CheckpointError: if something else is in the way, or asked for, than can be saved.
        MergeError: if a mixture is to be converted by subtracting its initial values.
    """
    call = inspect.signature(original).bind(model, save_directory, *args, **kwargs)
    call.apply_defaults()
    selected = call.arguments["selected_adapters"]
    names = list(model.peft_config) if selected is None else list(selected)
    configs = {name: model.peft_config[name] for name in names if name in model.peft_config}
    mixtures = {n: c for n, c in configs.items() if isinstance(c, MoELoraConfig)}
    attached = has_attached(model)
    if mixtures:
        _check_mixtures(mixtures, call.arguments)
    _check_places(model, Path(save_directory), configs)
    if not call.arguments["is_main_process"] or not (mixtures or attached):
        original(model, save_directory, *args, **kwargs)
        return
    with _written_whole(Path(save_directory)) as folder:
        original(model, folder, *args, **kwargs)
        for name, config in mixtures.items():
            if config.has_router:
                _write_router(_folder(folder, name), name, config)
        if attached:
            save_attached(model, folder, call.arguments["kwargs"].get("state_dict"))
        add_to_model_card(folder, mixtures)


def _check_mixtures(mixtures: dict[str, MoELoraConfig], arguments: dict[str, Any]) -> None:
    """Refuse what a mixture cannot be saved as.

    Raises:
        CheckpointError: for pickle files, and for names that are no folder names.
        MergeError: for a conversion that subtracts initial values.
    """
    first = next(iter(mixtures))
    if not arguments["safe_serialization"]:
        raise CheckpointError(
            f"Mixture {first!r} is saved as safetensors only, got safe_serialization=False: "
            "pickle files can run code when they are loaded."
        )
    if arguments["path_initial_model_for_weight_conversion"] is not None:
        raise MergeError(no_conversion(first))
    for name in mixtures:
        check_folder_name(name)


def _check_places(model: Any, root: Path, configs: dict[str, Any]) -> None:
    """Refuse to leave a router of others beside adapters that have none.

    Raises:
        CheckpointError: naming the file that is there.
    """
    attached = has_attached(model)
    mixtures = {n: c for n, c in configs.items() if isinstance(c, MoELoraConfig)}
    if attached:
        check_attached(model, root, mixtures)
    else:
        check_no_stale_attached(root)
    for name, config in configs.items():
        folder = _folder(root, name)
        has_router = name in mixtures and config.has_router
        if not has_router and not (attached and folder == root):
            _check_no_stale_router(name, folder)


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
    tensors = read_tensors(folder / _peft.SAFETENSORS_WEIGHTS_NAME, only=ROUTER_KEY)
    experts = config.expert_names or [f"{name}.{index}" for index in range(config.num_experts)]
    write_router_file(folder, tensors, kind=MIXTURE, experts=experts)


def _folder(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    root = Path(save_directory)
    return root if adapter_name == "default" else root / adapter_name


def _check_no_stale_router(name: str, folder: Path) -> None:
    path = folder / ROUTER_FILE
    if path.exists() and is_ours(path):
        raise CheckpointError(
            f"Adapter {name!r} has no router, but {path} holds the router of "
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
    call = inspect.signature(original).bind(model, model_id, adapter_name, *args, **kwargs)
    call.apply_defaults()
    hub = hub_arguments(call.arguments["kwargs"])
    is_mixture = check_folder(model_id, **hub)
    file = attached_file(model_id, **hub)
    given = base_of(model).__dict__.get(_GIVEN_ROUTER)
    if not is_mixture and file is None and given is None:
        return original(model, model_id, adapter_name, *args, **kwargs)
    with unchanged_on_error(model):
        result = original(model, model_id, adapter_name, *args, **kwargs)
        restore_attached(model, file, given, is_trainable=bool(call.arguments["is_trainable"]))
        return result


def load_adapter_into_base(
    original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Transformers' own ``model.load_adapter``: the same checks before and after.

    Raises:
        CheckpointError: if a file of a mixture is missing, damaged or contradicts another, or the
            file has no tensor for a layer of this model.
    """
    call = inspect.signature(original).bind(base, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    name = given["adapter_name"] or "default"
    before: dict[str, Any] = dict(getattr(base, "peft_config", {}))
    if given["adapter_state_dict"] is not None:
        config, loaded = given["peft_config"], set(given["adapter_state_dict"])
    else:
        hub = hub_arguments({**(given["adapter_kwargs"] or {}), **given["kwargs"]})
        config, loaded = read_folder(given["peft_model_id"], **hub)
    swapped = before.get(name)
    if not isinstance(config, MoELoraConfig) and not isinstance(swapped, MoELoraConfig):
        return original(base, *args, **kwargs)
    if swapped is not None:
        _check_swap(name, swapped, config)
    with unchanged_on_error(base):
        result = original(base, *args, **kwargs)
        plain = {key.removeprefix("base_model.model.") for key in loaded}
        expected = {_plain_key(key, name) for key in _adapter_keys(base, name)}
        _check_complete(name, sorted(expected - plain))
        return result


_SWAP_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "num_experts")


def _check_swap(name: str, old: Any, new: Any) -> None:
    """Refuse to put one adapter's tensors into another's place when they are used otherwise.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    for field in (*_SWAP_FIELDS, *ROUTING_FIELDS):
        values = getattr(old, field, None), getattr(new, field, None)
        if values[0] != values[1]:
            raise CheckpointError(
                f"Adapter {name!r} cannot be hot-swapped: {field} is {values[0]!r} in the model "
                f"and {values[1]!r} in what is loaded."
            )


def _plain_key(key: str, name: str) -> str:
    return _without_adapter(key, name).removeprefix("base_model.model.")


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
    hub = hub_arguments(kwargs)
    if (
        not check_folder(model_id, **hub)
        and router is None
        and attached_file(model_id, **hub) is None
    ):
        return original(cls, model, model_id, *args, **kwargs)
    with unchanged_on_error(model):
        # read by load_adapter, which PEFT calls in here and which knows no argument of ours
        model.__dict__[_GIVEN_ROUTER] = router
        try:
            return original(cls, model, model_id, *args, **kwargs)
        finally:
            model.__dict__.pop(_GIVEN_ROUTER, None)


def hotswap_adapter_from_state_dict(
    original: Callable[..., None],
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Swap tensors in place, after holding a mixture's against those that are there.

    Raises:
        CheckpointError: if a tensor is missing or of another shape: PEFT would fill the rest with
            zeros, which mixes experts and empties routers.
    """
    if isinstance(config, MoELoraConfig):
        given = {_plain_key(key, adapter_name): value for key, value in state_dict.items()}
        own = {key: _plain_key(key, adapter_name) for key in _adapter_keys(model, adapter_name)}
        loaded = {key: given[plain] for key, plain in own.items() if plain in given}
        _check_tensors(model, adapter_name, loaded)
    original(model, state_dict, adapter_name, config, *args, **kwargs)
