"""A router of the user's own on a LoRA model: attach, detach, ask.

The router is a submodule ``router`` of PEFT's ``LoraModel``, so it moves with the model and is in
its ``state_dict``, and in none of the adapters' files.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.asking import ask_router
from moelora.binding import bind
from moelora.config import MoELoraConfig
from moelora.decision import MixtureSpec
from moelora.errors import CheckpointError, UnsupportedLayerError
from moelora.router import Router
from moelora.router_request import announce
from moelora.scope import ATTACHED, ATTACHED_SPEC

_PENDING = "_moelora_pending_router"
_MOE_CONFIG = "_moelora_moe_config"
_HOOKED = "_moelora_router_hooked"


def tuner_of(model: Any) -> Any:
    """The ``LoraModel`` of a PEFT model.

    Raises:
        UnsupportedLayerError: if the model's tuner is not LoRA.
    """
    tuner = model if isinstance(model, _peft.BaseTuner) else model.base_model
    if not isinstance(tuner, _peft.LoraModel) or isinstance(tuner, _peft.AdaLoraModel):
        raise UnsupportedLayerError(
            f"A router needs LoRA adapters, but this model's tuner is {type(tuner).__name__}."
        )
    return tuner


def _inner(model: Any) -> Any:
    """The tuner inside a PEFT model, also while that is being made."""
    if isinstance(model, _peft.BaseTuner):
        return model
    return model.__dict__.get("_modules", {}).get("base_model")


def get_router(model: Any) -> nn.Module | None:
    """The attached router, or None."""
    tuner = _inner(model)
    router: nn.Module | None = None if tuner is None else tuner._modules.get("router")
    return router


def has_router(model: Any) -> bool:
    """Whether a router is attached."""
    return get_router(model) is not None


def get_moe_config(model: Any) -> MoELoraConfig | None:
    """The config that came with the attached router, or None."""
    tuner = _inner(model)
    config: MoELoraConfig | None = None if tuner is None else tuner.__dict__.get(_MOE_CONFIG)
    return config


def attach_router(
    model: Any, router_module: nn.Module, moe_config: MoELoraConfig | None = None
) -> None:
    """Attach a router over the experts of the active adapters.

    Without ``moe_config`` the router is stored, moved and saved, and answers
    ``get_routing_weights``; with one, every forward without explicit weights routes by it: a first
    pass without adapters gives the final hidden states, whose weights serve all layers. Of the
    config the auxiliary loss is used (for a :class:`~moelora.Router`, which tells its logits);
    top-k and temperature are the router's own.

    Args:
        model: a PEFT model with LoRA adapters, or its ``LoraModel``.
        router_module: any module from hidden states ``(batch, seq, hidden)`` to routing weights
            ``(batch, seq, experts)``. It takes the model's training mode and first adapted device.
        moe_config: switches automatic routing on.

    Raises:
        TypeError: if the arguments are no module or no config.
        UnsupportedLayerError: if the model has no LoRA adapters.
        CheckpointError: if tensors that were kept for this router do not fit it.
    """
    if not isinstance(router_module, nn.Module):
        raise TypeError(
            f"router_module must be a torch.nn.Module, got {type(router_module).__name__}."
        )
    if moe_config is not None and not isinstance(moe_config, MoELoraConfig):
        raise TypeError(f"moe_config must be a MoELoraConfig, got {type(moe_config).__name__}.")
    tuner = tuner_of(model)
    pending = tuner.__dict__.get(_PENDING)
    if pending and (differing := difference(router_module, pending)):
        raise CheckpointError(
            f"The tensors kept for this model's router do not fit {type(router_module).__name__}: "
            f"{differing} differ. They stay kept; detach_router() drops them."
        )
    bind(tuner.model, tuner.peft_config)
    if tuner._modules.get("router") is not None:
        warnings.warn("The model already has a router, which is replaced.", stacklevel=3)
    device = _first_adapted_device(tuner)
    if device is not None:
        router_module.to(device)
    router_module.train(tuner.training)
    tuner._modules["router"] = router_module
    tuner.__dict__[_MOE_CONFIG] = moe_config
    tuner.model.__dict__[ATTACHED] = router_module if moe_config is not None else None
    if moe_config is not None:
        tuner.model.__dict__[ATTACHED_SPEC] = MixtureSpec.from_config(moe_config)
    announce(tuner.model, tuner.peft_config)
    watch_state_dicts(tuner)
    if pending:
        router_module.load_state_dict(pending)
        del tuner.__dict__[_PENDING]


def difference(router: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are missing, unknown, or of another shape or kind than the router's.

    Args:
        router: the module they are meant for.
        tensors: by name, as in its ``state_dict``.
    """
    own = router.state_dict()
    if isinstance(router, Router):
        tensors = router.fitted(tensors)
    shared = own.keys() & tensors.keys()
    return sorted(own.keys() ^ tensors.keys()) + sorted(
        key
        for key in shared
        if own[key].shape != tensors[key].shape
        or own[key].is_floating_point() != tensors[key].is_floating_point()
    )


def detach_router(model: Any) -> nn.Module | None:
    """Take the router off the model and return it; None if there was none.

    Raises:
        UnsupportedLayerError: if the model has no LoRA adapters.
    """
    tuner = tuner_of(model)
    router: nn.Module | None = tuner._modules.pop("router", None)
    tuner.__dict__.pop(_PENDING, None)
    tuner.__dict__.pop(_MOE_CONFIG, None)
    tuner.model.__dict__.pop(ATTACHED, None)
    tuner.model.__dict__.pop(ATTACHED_SPEC, None)
    announce(tuner.model, tuner.peft_config)
    return router


def get_routing_weights(model: Any, hidden_states: Any) -> Tensor | None:
    """Routing weights of the attached router for ``hidden_states``; None without a router.

    Args:
        model: a PEFT model with LoRA adapters, or its ``LoraModel``.
        hidden_states: ``(batch, seq, hidden)``; moved to the router's device and dtype.

    Raises:
        RoutingWeightsError: if the router does not return a float tensor ``(batch, seq, experts)``.
    """
    router = get_router(model)
    return None if router is None else ask_router(router, hidden_states)


def keep_for_later(model: Any, tensors: dict[str, Tensor]) -> None:
    """Keep a router's tensors until :func:`attach_router` is called."""
    tuner_of(model).__dict__[_PENDING] = tensors


def kept_for_later(model: Any) -> dict[str, Tensor] | None:
    """The tensors of a router that waits for :func:`attach_router`, or None."""
    tuner = _inner(model)
    kept: dict[str, Tensor] | None = None if tuner is None else tuner.__dict__.get(_PENDING)
    return kept


def _first_adapted_device(tuner: Any) -> torch.device | None:
    layers = [m for m in tuner.model.modules() if isinstance(m, _peft.LoraLayer)]
    devices: list[torch.device] = [p.device for layer in layers[:1] for p in layer.parameters()]  # type: ignore[attr-defined]
    return devices[0] if devices and devices[0].type != "meta" else None


# The router in state dicts -------------------------------------------------------------------


def watch_state_dicts(tuner: Any) -> None:
    """Let ``load_state_dict`` of the model take older state dicts, and keep routers for later."""
    if not tuner.__dict__.get(_HOOKED):
        tuner.register_load_state_dict_pre_hook(_before_load)
        tuner.__dict__[_HOOKED] = True


def _before_load(
    tuner: Any,
    state_dict: dict[str, Tensor],
    prefix: str,
    _local_metadata: dict[str, Any],
    _strict: bool,  # noqa: FBT001 - the signature is torch's
    _missing_keys: list[str],
    _unexpected_keys: list[str],
    _error_msgs: list[str],
) -> None:
    own_prefix = f"{prefix}router."
    keys = [key for key in state_dict if key.startswith(own_prefix)]
    router = tuner._modules.get("router")
    if router is None:
        if keys:
            pending = {key.removeprefix(own_prefix): state_dict.pop(key) for key in keys}
            tuner.__dict__[_PENDING] = pending
            warnings.warn(
                f"The state dict holds a router ({len(pending)} tensors) but the model has none; "
                "it is kept for attach_router.",
                stacklevel=2,
            )
        return
    if keys or not _is_whole_model(state_dict, prefix):
        return
    own = router.state_dict()
    if own:
        warnings.warn(
            "The state dict holds no router (an older checkpoint); the attached one is kept.",
            stacklevel=2,
        )
    state_dict.update({own_prefix + key: value for key, value in own.items()})


def _is_whole_model(state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict is a model's: one of an adapter alone has no base weights."""
    return any(key.startswith(f"{prefix}model.") and ".lora_" not in key for key in state_dict)
