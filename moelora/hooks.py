"""What happens around a forward of the base model: weights, masks, first pass, losses."""

import difflib
import inspect
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.alignment import check_routing_weights, slice_positions
from moelora.asking import ask_router
from moelora.auxiliary import add_auxiliary_loss
from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.first_pass import first_pass, keep_cache
from moelora.places import is_encoder_decoder
from moelora.router import Router
from moelora.router_request import take_request
from moelora.scope import (
    ATTACHED,
    ATTACHED_SPEC,
    Frame,
    LayerBinding,
    RoutingScope,
    SharedRouting,
    Tape,
    TapeEntry,
    scope_of,
)
from moelora.shared import shared_routers_of
from moelora.shared_input import TracedInputs

_registration = threading.Lock()


def checked_weights(base: nn.Module, weights: Any) -> Tensor:
    """Check explicit weights against the model's active adapters and state."""
    layers = [module for module in base.modules() if isinstance(module, _peft.LoraLayer)]
    if not layers:
        raise UnsupportedLayerError("routing_weights need LoRA adapters, but the model has none.")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise RoutingWeightsError(
            f"routing_weights cannot be applied while adapters {merged} are merged. Call "
            "unmerge_adapter() first."
        )
    adapters = list(layers[0].active_adapters)
    binding: LayerBinding = layers[0].__dict__["_moelora_binding"]
    total = sum(binding.experts_of.get(name, 1) for name in adapters)
    checked = check_routing_weights(weights, num_experts=total, adapters=adapters)
    if is_encoder_decoder(base) and (
        checked.ndim == 4 or (checked.ndim == 3 and checked.shape[1] != 1)
    ):
        raise RoutingWeightsError(
            "An encoder-decoder model takes routing_weights without a seq axis ([batch, E], "
            "[batch, 1, E] or [E]), because encoder and decoder have different tokens; got shape "
            f"{tuple(checked.shape)}."
        )
    return checked


def _pass_keyword(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hand the frame's explicit weights to a layer as its keyword ``routing_weights``."""
    binding: LayerBinding | None = layer.__dict__.get("_moelora_binding")
    frame = None if binding is None else binding.scope.top
    if not _peft.is_installed() or frame is None or frame.weights is None:
        return None
    if "routing_weights" in kwargs:
        return None
    return args, {**kwargs, "routing_weights": frame.weights}


def refuse_in_backbone(
    _backbone: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The inner model, called without its head, would swallow the argument."""
    if kwargs.get("routing_weights") is not None:
        raise UnsupportedLayerError(
            "routing_weights must be given to the whole model, not to the backbone inside it."
        )


def _pass_keyword_to_layers(base: nn.Module) -> None:
    """Register :func:`_pass_keyword` once explicit weights are used: others need not pay for it."""
    with _registration:
        for module in base.modules():
            if isinstance(module, _peft.LoraLayer) and not any(
                hook is _pass_keyword for hook in module._forward_pre_hooks.values()
            ):
                module.register_forward_pre_hook(_pass_keyword, with_kwargs=True)


def before_forward(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Take ``routing_weights`` out of the arguments and open the forward's frame."""
    scope = scope_of(base)
    if scope is None:
        return None
    if not _peft.is_installed():
        _check_plain(base, kwargs)
        return None
    outer = scope.top
    if outer is not None and outer.adapters_off:
        return None
    # looked at once per argument name; a traced forward must not look, it cannot be traced
    if not torch.compiler.is_compiling() and not kwargs.keys() <= scope.known_arguments:
        _check_misspelt(base, scope, kwargs)
    # entered first: should a check below raise, the closing hook still runs and leaves this frame
    scope.push(Frame(is_forward=True))
    weights = kwargs.get("routing_weights")
    kwargs = {key: value for key, value in kwargs.items() if key != "routing_weights"}
    batch_shape = _batch_shape(args, kwargs)
    generating = outer is not None and outer.generating
    per_token = False
    if weights is not None:
        weights = checked_weights(base, weights)
    elif outer is not None and generating:
        weights = _step_weights(outer, batch_shape, kwargs)
        given = outer.weights
        per_token = given is not None and given.ndim >= 3 and given.shape[1] > 1
    if weights is not None and not torch.compiler.is_compiling():
        _pass_keyword_to_layers(base)
    for recorder in scope.recorders:
        recorder.begin_forward()
    tape = _tape(base, scope, kwargs)
    # capacity counts real tokens in training without a gradient too (a reference pass)
    masked = tape is not None or base.training
    frame = Frame(
        weights=weights,
        per_token=per_token,
        batch_shape=batch_shape,
        generating=generating,
        row_repeats=outer.row_repeats if outer is not None and generating else 1,
        token_mask=_mask(kwargs.get("attention_mask"), args) if masked else None,
        decoder_token_mask=_mask(kwargs.get("decoder_attention_mask")) if masked else None,
        tape=tape,
        is_forward=True,
        keeps_graph=scope.keeps_graph(),
        inputs=None if torch.compiler.is_compiling() else scope.shared_inputs(base),
        traced=TracedInputs(scope.groups_for_traces, {}) if torch.compiler.is_compiling() else None,
    )
    if weights is None:
        frame = _with_model_routing(base, frame, args, kwargs)
    scope.pop()
    scope.push(frame)
    return args, kwargs


def _tape(base: nn.Module, scope: RoutingScope, kwargs: dict[str, Any]) -> Tape | None:
    """Where routers leave their decisions: in training, or when the caller asks for their loss."""
    training = base.training and torch.is_grad_enabled()
    asked = take_request(scope, kwargs)
    if not (training or asked):
        return None
    # a weak set cannot be traced
    looks = scope.traced is not None if torch.compiler.is_compiling() else bool(scope.observers)
    return Tape(training=training, asked=asked, observed=training and looks)


def _with_model_routing(
    base: nn.Module, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Frame:
    """Let a router over the whole model decide, by the hidden states of a first pass."""
    scope, routers = scope_of(base), shared_routers_of(base)
    attached: nn.Module | None = base.__dict__.get(ATTACHED)
    if scope is None or (attached is None and (routers is None or not routers.active())):
        return frame
    if not _adapters_enabled(base):
        return frame
    if attached is None and routers is not None and not routers.chooses():
        return replace(frame, shared={"": SharedRouting(None, {})})
    if isinstance(attached, Router) and attached.num_experts > 1 and _works_alone(base):
        return frame
    hidden_states, made_cache = first_pass(base, scope, args, kwargs)
    if attached is not None:
        weights = checked_weights(base, ask_router(attached, hidden_states))
        if isinstance(attached, Router):
            _report_attached(base, attached, hidden_states, frame)
        return replace(frame, weights=weights, per_token=True, first_pass_cache=made_cache)
    shared = None if routers is None else routers.decide(hidden_states, frame)
    if shared is None:
        return frame
    return replace(frame, shared={"": shared}, first_pass_cache=made_cache)


def _works_alone(base: nn.Module) -> bool:
    """Whether one expert is active: there is nothing to choose from, it serves every token."""
    layers = (module for module in base.modules() if isinstance(module, _peft.LoraLayer))
    first = next(layers)
    binding: LayerBinding = first.__dict__["_moelora_binding"]
    return sum(binding.experts_of.get(name, 1) for name in first.active_adapters) == 1


def _report_attached(base: nn.Module, router: Router, hidden_states: Tensor, frame: Frame) -> None:
    """Record what our own Router decided, and take its auxiliary loss in training.

    Other routers return weights alone, from which neither can be told.
    """
    scope, spec = scope_of(base), base.__dict__[ATTACHED_SPEC]
    training = frame.tape is not None and frame.tape.takes(
        training=frame.tape.training, coefficient=spec.aux_loss_coef
    )
    if scope is None or not (scope.recorders or training):
        return
    routing = router.routing(hidden_states.to(router.weight.device, router.weight.dtype))
    for recorder in scope.recorders:
        recorder.add("model", routing)
    if frame.tape is None or not training:
        return
    mask = frame.token_mask
    fits = mask is not None and mask.shape == hidden_states.shape[:-1]
    frame.tape.add(
        TapeEntry(
            layer_name="model",
            routing=routing,
            token_mask=mask.reshape(-1).to(router.weight.device)
            if mask is not None and fits
            else None,
            loss_type=spec.loss_type,
            coefficient=spec.aux_loss_coef,
            router_is_trainable=any(p.requires_grad for p in router.parameters()),
            checkpointed=False,
            over_ranks=frame.tape.training and spec.balance_over_ranks,
        )
    )


def _adapters_enabled(base: nn.Module) -> bool:
    layers = (module for module in base.modules() if isinstance(module, _peft.LoraLayer))
    first = next(layers, None)
    return first is not None and not first.disable_adapters and not first.merged


def after_forward(
    base: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Close the frame, also when the forward raised, and put the auxiliary loss into the output."""
    scope = scope_of(base)
    if scope is None or scope.top is None or not scope.top.is_forward:
        return None
    frame = scope.pop()
    if frame is None or output is None:
        return None
    scope.learn(frame.inputs)
    keep_cache(output, frame.first_pass_cache)
    if frame.tape is None:
        return None
    return add_auxiliary_loss(base, output, kwargs, tape=frame.tape, scope=scope)


def _check_plain(base: nn.Module, kwargs: dict[str, Any]) -> None:
    """After ``uninstall`` nothing routes: say so, instead of summing all experts in silence."""
    layers = [module for module in base.modules() if isinstance(module, _peft.LoraLayer)]
    routed = any(
        spec.routed and name in layer.active_adapters
        for layer in layers
        for name, spec in layer.__dict__.get("moe_mixtures", {}).items()
    )
    automatic = base.__dict__.get(ATTACHED) is not None
    if routed or automatic or kwargs.get("routing_weights") is not None:
        raise UnsupportedLayerError(
            "moelora is uninstalled, so this model cannot route. Call moelora.install() first."
        )


def _check_misspelt(base: nn.Module, scope: RoutingScope, kwargs: dict[str, Any]) -> None:
    """Many models take any keyword and ignore it: a misspelt ``routing_weights`` must not go so."""
    accepted = inspect.signature(base.forward).parameters
    for name in kwargs.keys() - accepted.keys() - {"routing_weights"}:
        if difflib.get_close_matches(name, ["routing_weights"], cutoff=0.7):
            raise RoutingWeightsError(
                f"Unknown argument {name!r}: did you mean 'routing_weights'? The model would "
                "ignore it."
            )
    scope.known_arguments = scope.known_arguments | kwargs.keys()


def _batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """``(batch, seq)`` of token ids ``(batch, seq)`` or embeddings ``(batch, seq, features)``."""
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    for value in candidates:
        if isinstance(value, Tensor) and value.ndim == (3 if value.is_floating_point() else 2):
            return value.shape[0], value.shape[1]
    return None


def _mask(mask: Any, args: tuple[Any, ...] = ()) -> Tensor | None:
    """A padding mask ``(batch, seq)`` as booleans; other kinds of mask say nothing of padding."""
    if mask is None and len(args) > 1 and isinstance(args[0], Tensor):
        # transformers' models take (input_ids, attention_mask) by position too
        second = args[1]
        mask = second if isinstance(second, Tensor) and second.shape == args[0].shape else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return mask > 0


def _step_weights(
    outer: Frame, batch_shape: tuple[int, int] | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The weights of one generation step's positions."""
    weights = outer.weights
    if weights is None or weights.ndim < 3 or batch_shape is None or weights.shape[1] == 1:
        return weights
    start = _cached_length(kwargs)
    if start is None:
        if batch_shape[1] < weights.shape[1]:
            raise RoutingWeightsError(
                f"routing_weights for {weights.shape[1]} positions cannot be aligned with a "
                f"generation step of {batch_shape[1]}: the model does not tell how many positions "
                "its cache holds. Give weights without a seq axis."
            )
        start = 0
    return slice_positions(weights, start=start, length=batch_shape[1])


def _cached_length(kwargs: dict[str, Any]) -> int | Tensor | None:
    """How many positions the KV cache holds before this step; None if that is not told."""
    position = kwargs.get("cache_position")
    if isinstance(position, Tensor):
        return position[0]
    for name in ("past_key_values", "layer_past"):
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length"):
            length: int | Tensor = cache.get_seq_length()
            return length
    if kwargs.get("use_cache") is False or "past_key_values" in kwargs:
        return 0
    return None
