"""An attached router on disk: ``router.safetensors`` above the folders of its adapters."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from moelora.attached import attach_router, get_moe_config, get_router, keep_for_later, tuner_of
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig
from moelora.errors import CheckpointError
from moelora.router import Router
from moelora.router_file import (
    ATTACHED,
    ROUTER_FILE,
    is_ours,
    read_router_file,
    write_router_file,
)


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
    for name, tensor in _router(model).state_dict().items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"Tensor {name!r} of the attached router has no values (meta).")


def _router(model: Any) -> nn.Module:
    router = get_router(model)
    if router is None:
        raise CheckpointError("The model has no attached router.")
    return router


def save_attached(model: Any, folder: Path) -> None:
    """Write the attached router beside its adapters' folders.

    The header says what is needed to make a :class:`~moelora.Router` again, and the config that
    came with it.
    """
    router = _router(model)
    extra = {"router_class": f"{type(router).__module__}.{type(router).__qualname__}"}
    if type(router) is Router:
        extra["router_config"] = json.dumps(router.config())
    config = get_moe_config(model)
    if config is not None:
        plain = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        extra["moe_config"] = json.dumps(plain)
    experts = list(tuner_of(model).active_adapters)
    write_router_file(folder, router.state_dict(), kind=ATTACHED, experts=experts, extra=extra)


def restore_attached(model: Any, path: Path | None, router: nn.Module | None) -> None:
    """Attach the router that was saved with a model's adapters.

    Args:
        model: the PEFT model just loaded.
        path: its file; None if there is none.
        router: the user's module to load it into; None to make a :class:`~moelora.Router` again.

    Raises:
        CheckpointError: if the file is damaged, does not fit ``router``, or ``router`` was given
            and there is no file.
    """
    if path is None:
        if router is not None:
            raise CheckpointError("router= was given, but no attached router was saved there.")
        return
    file = read_router_file(path)
    config = _moe_config(path, file.metadata.get("moe_config"))
    if router is None and "router_config" in file.metadata:
        router = _made_router(path, file.metadata["router_config"])
    if router is None:
        keep_for_later(model, file.tensors)
        warnings.warn(
            f"{path} holds a router of class {file.metadata.get('router_class')!r}, which is not "
            "made by itself. Pass router= or call attach_router(): its tensors are kept for that.",
            stacklevel=4,
        )
        return
    try:
        router.load_state_dict(file.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the router: {error}") from error
    attach_router(model, router, config)


def is_attached_file(path: Path) -> bool:
    """Whether this is the file of an attached router; another library's file is not.

    Raises:
        CheckpointError: if it is damaged.
    """
    return is_ours(path) and read_router_file(path).kind == ATTACHED


def _made_router(path: Path, text: str) -> Router:
    try:
        return Router(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no Router: {error}.") from error


def _moe_config(path: Path, text: str | None) -> MoELoraConfig | None:
    if text is None:
        return None
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("peft_type") != DISK_PEFT_TYPE:
            raise ValueError("not a MoELoraConfig")
        config = MoELoraConfig.from_peft_type(**content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header holds a bad moe_config: {error}.") from error
    return config  # type: ignore[no-any-return]
