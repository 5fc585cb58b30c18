"""The forward argument ``routing_weights`` of PEFT models, in calls and in ``generate``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moelora import _peft
from moelora.binding import base_of, bind, scope_checkpointing
from moelora.config import MoELoraConfig
from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.hooks import checked_weights
from moelora.scope import Frame, scope_of


def set_gradient_checkpointing(
    original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Let blocks that are recomputed see the routing of their own forward."""
    original(base, *args, **kwargs)
    scope = scope_of(base)
    if scope is not None:
        scope_checkpointing(base, scope)


def call_with_routing(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calling a PEFT model: refuse routing weights where they would be swallowed."""
    if "routing_weights" in kwargs:
        if kwargs["routing_weights"] is None:
            del kwargs["routing_weights"]
        else:
            _prepare_explicit(model)
            _refuse_adapter_names(kwargs)
    scope = scope_of(base_of(model))
    if scope is None:
        return original(model, *args, **kwargs)
    before = scope.top
    try:
        return original(model, *args, **kwargs)
    finally:
        # hooks do not run on KeyboardInterrupt; an interrupted forward must leave nothing either
        scope.restore(before)


def _prepare_explicit(model: Any) -> nn.Module:
    """Return the bound base model of a LoRA model, or say why it takes no routing weights."""
    tuner = model if isinstance(model, _peft.BaseTuner) else model.base_model
    if not isinstance(tuner, _peft.LoraModel) or isinstance(tuner, _peft.AdaLoraModel):
        raise UnsupportedLayerError(
            f"routing_weights need LoRA adapters, but this model's tuner is "
            f"{type(tuner).__name__}, which would ignore them."
        )
    base: nn.Module = tuner.model
    if scope_of(base) is None:
        bind(base, tuner.peft_config)
    return base


def _refuse_adapter_names(kwargs: dict[str, Any]) -> None:
    """Refuse two choices of adapters, before PEFT leaves its hooks for one of them."""
    if kwargs.get("adapter_names") is not None:
        raise RoutingWeightsError(
            "adapter_names cannot be combined with routing_weights: give weights that are one-hot "
            "per row instead."
        )


def enable_forward_hooks(
    original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse PEFT's mixed batches over a routed mixture: they would sum its experts.

    Every way into a PEFT model with ``adapter_names`` comes here, before PEFT leaves its hooks.

    Raises:
        RoutingWeightsError: naming the mixtures.
    """
    if kwargs.get("routing_weights") is not None:
        _refuse_adapter_names(kwargs)
    names = kwargs.get("adapter_names")
    configs: dict[str, Any] = tuner.peft_config
    routed = [
        name
        for name in dict.fromkeys([*(names or []), *tuner.active_adapters])
        if isinstance(configs.get(name), MoELoraConfig) and configs[name].routed
    ]
    if names is not None and routed:
        raise RoutingWeightsError(
            f"adapter_names cannot be combined with a routed mixture, here {routed}: give "
            "routing_weights that are one-hot per row instead."
        )
    return original(tuner, *args, **kwargs)


def generate_with_routing(
    original: Callable[..., Any] | None, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """``generate`` with explicit weights: they hold for every step, repeated per beam."""
    weights = kwargs.pop("routing_weights", None)
    generate = model.model.generate if original is None else original
    positional = args if original is None else (model, *args)
    if weights is None:
        return generate(*positional, **kwargs)
    _refuse_adapter_names(kwargs)
    base = _prepare_explicit(model)
    scope = scope_of(base)
    assert scope is not None  # noqa: S101 - bound just above
    weights = checked_weights(base, weights)
    _check_prompt(weights, args, kwargs)
    frame = Frame(
        weights=weights,
        generating=True,
        row_repeats=_row_repeats(base, kwargs),
    )
    with scope.entered(frame):
        return generate(*positional, **kwargs)


def _check_prompt(weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Per-token weights must reach to the end of the prompt; only later steps take the last."""
    prompt = kwargs.get("inputs_embeds", kwargs.get("input_ids", args[0] if args else None))
    if weights.ndim < 3 or weights.shape[1] == 1 or not isinstance(prompt, Tensor):
        return
    if weights.shape[1] < prompt.shape[1]:
        raise RoutingWeightsError(
            f"routing_weights must cover the {prompt.shape[1]} positions of the prompt, got shape "
            f"{tuple(weights.shape)}. Weights without a seq axis hold for all positions."
        )


def _row_repeats(base: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often generate repeats each row: beams, or returned sequences when sampling."""
    repeats = 1
    for name in ("num_beams", "num_return_sequences"):
        value = kwargs.get(name)
        for config in (kwargs.get("generation_config"), getattr(base, "generation_config", None)):
            if value is None:
                value = getattr(config, name, None)
        repeats = max(repeats, value or 1)
    return repeats
