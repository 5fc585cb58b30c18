"""An attached router on disk: ``router.safetensors`` above the folders of its adapters."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.attached import (
    attach_router,
    difference,
    get_moe_config,
    get_router,
    keep_for_later,
    kept_for_later,
    tuner_of,
)
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig
from moelora.errors import CheckpointError
from moelora.gate_router import GateRouter
from moelora.router import Router
from moelora.router_file import (
    ATTACHED,
    ROUTER_FILE,
    RouterFile,
    is_ours,
    read_router_file,
    write_router_file,
)

#: Routers that the file's header describes completely, by the name it gives them.
_MADE: dict[str | None, type[Router]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Router, GateRouter)
}


def has_attached(model: Any) -> bool:
    """Whether there is a router to save: attached, or kept until it is attached."""
    return get_router(model) is not None or kept_for_later(model) is not None


def check_attached(model: Any, folder: Path, mixtures: dict[str, MoELoraConfig]) -> None:
    """Refuse to save two routers to one place.

    Raises:
        CheckpointError: if a mixture's own router belongs into the same folder, or another
            mixture's is there.
    """
    default = mixtures.get("default")
    if default is not None and default.has_router:
        raise CheckpointError(
            f"The attached router and the router of mixture 'default' would both be saved to "
            f"{folder / ROUTER_FILE}. Detach the router, or give the mixture another name."
        )
    path = folder / ROUTER_FILE
    if path.exists() and read_router_file(path).kind != ATTACHED:
        raise CheckpointError(
            f"{path} holds the router of a mixture, which the attached router would replace. Save "
            "to another folder, or remove that file."
        )
    _tensors(model, None)


def check_no_stale_attached(folder: Path) -> None:
    """Refuse to save adapters without a router under another's.

    Raises:
        CheckpointError: if ``folder`` holds the file of an attached router.
    """
    path = folder / ROUTER_FILE
    if path.exists() and is_attached_file(path):
        raise CheckpointError(
            f"{path} holds the router of other adapters, but this model has none attached. Save to "
            "another folder, or remove that file."
        )


def _tensors(model: Any, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The router's tensors: gathered ones if a trainer hands them in, else the module's own."""
    router = get_router(model)
    own = (kept_for_later(model) or {}) if router is None else router.state_dict()
    for prefix in ("base_model.router.", "router."):
        gathered = {key: (state_dict or {}).get(prefix + key) for key in own}
        found = {key: value for key, value in gathered.items() if value is not None}
        if found and len(found) == len(own):
            own = found
            break
    for name, tensor in own.items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"Tensor {name!r} of the attached router has no values (meta).")
    return own


def save_attached(model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """Write the attached router beside its adapters' folders.

    The header says what is needed to make a :class:`~moelora.Router` again, and the config that
    came with it.

    Args:
        model: the PEFT model.
        folder: an existing folder.
        state_dict: the model's gathered tensors, from a trainer that shards them.
    """
    router = get_router(model)
    extra = {}
    if router is not None:
        extra["router_class"] = f"{type(router).__module__}.{type(router).__qualname__}"
    if isinstance(router, Router) and type(router) in _MADE.values():
        extra["router_config"] = json.dumps(router.config())
    config = get_moe_config(model)
    if config is not None:
        plain = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        extra["moe_config"] = json.dumps(plain)
    experts = list(tuner_of(model).active_adapters)
    tensors = _tensors(model, state_dict)
    write_router_file(folder, tensors, kind=ATTACHED, experts=experts, extra=extra)


def restore_attached(
    model: Any, path: Path | None, router: nn.Module | None, *, is_trainable: bool
) -> None:
    """Give a model the router that was saved with its adapters.

    One that is attached already gets the saved tensors (a resumed training); else the user's module
    or a :class:`~moelora.Router` made after the header is attached.

    Args:
        model: the PEFT model just loaded.
        path: the router's file; None if there is none.
        router: the user's module to load it into, or None.
        is_trainable: whether the router shall be trained.

    Raises:
        CheckpointError: if the file is damaged, does not fit the router, or ``router`` was given
            and there is no file.
    """
    if path is None:
        if router is not None:
            raise CheckpointError("router= was given, but no attached router was saved there.")
        return
    file = read_router_file(path)
    config = _moe_config(path, file.metadata.get("moe_config"))
    attached = get_router(model) if router is None else None
    made = None
    described = file.metadata.get("router_class") in _MADE and "router_config" in file.metadata
    if router is None and attached is None and described:
        made = _made_router(path, file)
    target = router or attached or made
    if target is None:
        keep_for_later(model, file.tensors)
        warnings.warn(
            f"{path} holds a router of class {file.metadata.get('router_class')!r}, which is not "
            "made by itself. Pass router= or call attach_router(): its tensors are kept for that.",
            stacklevel=4,
        )
        return
    differing = difference(target, file.tensors)
    if differing:
        raise CheckpointError(
            f"{path} does not fit the router {type(target).__name__}: {differing} differ."
        )
    target.load_state_dict(file.tensors, assign=target is made)
    if attached is None:
        target.requires_grad_(is_trainable)
        attach_router(model, target, config)


def is_attached_file(path: Path) -> bool:
    """Whether this is the file of an attached router; another library's file is not.

    Raises:
        CheckpointError: if it is damaged.
    """
    return is_ours(path) and read_router_file(path).kind == ATTACHED


def _made_router(path: Path, file: RouterFile) -> Router:
    """A Router after the header, without memory: it takes the file's tensors as they are."""
    try:
        with torch.device("meta"):
            return _MADE[file.metadata["router_class"]](
                **json.loads(file.metadata["router_config"])
            )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its header describes no Router: {error}.") from error


def _moe_config(path: Path, text: str | None) -> MoELoraConfig | None:
    if text is None:
        return None
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("peft_type") != DISK_PEFT_TYPE:
            raise ValueError("not a MoELoraConfig")
        config = MoELoraConfig.from_peft_type(**content)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header holds a bad moe_config: {error}.") from error
    return config  # type: ignore[no-any-return]
