"""A base model with routed layers: its hooks, the forward argument, and where each layer lies.

The hooks on the base model are permanent (while the adapters are), because they are the one
place that every caller passes: PeftModel with or without a task type, a bare LoraModel, an injected
model, trainers that call the base directly.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.alignment import check_routing_weights, slice_positions
from moelora.auxiliary import add_auxiliary_loss
from moelora.config import MoELoraConfig
from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.scope import Frame, LayerBinding, RoutingScope, ScopedCheckpoint, Tape

_SCOPE = "_moelora_scope"
_CROSS_ATTENTION = re.compile(r"EncDecAttention|encoder_attn|cross_?attn|cross_?attention", re.I)
_KEYS_AND_VALUES = frozenset({"k", "v", "k_proj", "v_proj", "key", "value"})


def scope_of(base: nn.Module) -> RoutingScope | None:
    """The routing scope of a base model; None if no LoRA adapter of it was bound."""
    scope: RoutingScope | None = base.__dict__.get(_SCOPE)
    return scope


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel or LoraModel; any other module is its own base."""
    if isinstance(model, _peft.PeftModel | _peft.PeftMixedModel):
        inner = model.base_model
        return inner.model if isinstance(inner, _peft.BaseTuner) else inner
    return model.model if isinstance(model, _peft.BaseTuner) else model


# Binding -------------------------------------------------------------------------------------


def bind(base: nn.Module, peft_config: dict[str, Any]) -> RoutingScope:
    """Give every LoRA layer of ``base`` its place, and the base its hooks. Idempotent."""
    scope = scope_of(base)
    if scope is None:
        scope = RoutingScope()
        base.__dict__[_SCOPE] = scope
        base.register_forward_pre_hook(_before_forward, with_kwargs=True)
        base.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
    experts_of = {
        name: config.num_experts if isinstance(config, MoELoraConfig) else 1
        for name, config in peft_config.items()
    }
    blocks: dict[str, int] = {}
    is_encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList):
            blocks[name] = len(module)
        if isinstance(module, _peft.LoraLayer):
            module.__dict__["_moelora_binding"] = LayerBinding(
                scope=scope,
                name=name,
                block=_block_of(name, blocks),
                reads_decoder=is_encoder_decoder and _reads_decoder(name),
                experts_of=experts_of,
            )
    _scope_checkpointing(base, scope)
    return scope


def unbind(base: nn.Module) -> None:
    """Remove what :func:`bind` left on the base model."""
    if base.__dict__.pop(_SCOPE, None) is None:
        return
    for hooks, ours in (
        (base._forward_pre_hooks, _before_forward),
        (base._forward_hooks, _after_forward),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
            base._forward_hooks_with_kwargs.pop(key, None)
            base._forward_hooks_always_called.pop(key, None)
    for module in base.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, ScopedCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = checkpoint.checkpoint


def _block_of(name: str, blocks: dict[str, int]) -> tuple[int, int] | None:
    """Index in, and length of, the outermost ModuleList around a layer."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        number = blocks.get(".".join(parts[:depth]))
        if number is not None:
            return int(parts[depth]), number
    return None


def _reads_decoder(name: str) -> bool:
    """Whether a layer's input are decoder tokens; keys and values of cross-attention are not."""
    parts = name.split(".")
    if "decoder" not in parts:
        return False
    return not (parts[-1] in _KEYS_AND_VALUES and any(map(_CROSS_ATTENTION.search, parts)))


def _scope_checkpointing(base: nn.Module, scope: RoutingScope) -> None:
    for module in base.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, ScopedCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = ScopedCheckpoint(checkpoint, scope)


def set_gradient_checkpointing(
    original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Let blocks that are recomputed see the routing of their own forward."""
    original(base, *args, **kwargs)
    scope = scope_of(base)
    if scope is not None:
        _scope_checkpointing(base, scope)


# The forward argument ------------------------------------------------------------------------


def call_with_routing(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calling a PEFT model: refuse routing weights where they would be swallowed."""
    if "routing_weights" in kwargs:
        if kwargs["routing_weights"] is None:
            del kwargs["routing_weights"]
        else:
            _prepare_explicit(model)
    return original(model, *args, **kwargs)


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


def generate_with_routing(
    original: Callable[..., Any] | None, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """``generate`` with explicit weights: they hold for every step, repeated per beam."""
    weights = kwargs.pop("routing_weights", None)
    generate = model.model.generate if original is None else original
    positional = args if original is None else (model, *args)
    if weights is None:
        return generate(*positional, **kwargs)
    if kwargs.get("adapter_names") is not None:
        raise RoutingWeightsError("adapter_names cannot be combined with routing_weights.")
    base = _prepare_explicit(model)
    scope = scope_of(base)
    assert scope is not None  # noqa: S101 - bound just above
    frame = Frame(
        weights=_checked(base, weights),
        generating=True,
        row_repeats=_row_repeats(base, kwargs),
    )
    with scope.entered(frame):
        return generate(*positional, **kwargs)


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


def _checked(base: nn.Module, weights: Any) -> Tensor:
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
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and (checked.ndim == 4 or (checked.ndim == 3 and checked.shape[1] != 1)):
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


def _pass_keyword_to_layers(base: nn.Module) -> None:
    """Register :func:`_pass_keyword` once explicit weights are used: others need not pay for it."""
    for module in base.modules():
        if isinstance(module, _peft.LoraLayer) and not any(
            hook is _pass_keyword for hook in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_pass_keyword, with_kwargs=True)


# Hooks on the base model ---------------------------------------------------------------------


def _before_forward(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    scope = scope_of(base)
    if scope is None:
        return None
    if not _peft.is_installed():
        _check_plain(base, kwargs)
        return None
    outer = scope.top
    # entered first: should a check below raise, the closing hook still runs and leaves this frame
    scope.push(Frame(is_forward=True))
    weights = kwargs.get("routing_weights")
    kwargs = {key: value for key, value in kwargs.items() if key != "routing_weights"}
    batch_shape = _batch_shape(args, kwargs)
    generating = outer is not None and outer.generating
    if weights is not None:
        weights = _checked(base, weights)
    elif outer is not None and generating:
        weights = _step_weights(outer, batch_shape, kwargs)
    if weights is not None and not torch.compiler.is_compiling():
        _pass_keyword_to_layers(base)
    is_training = base.training and torch.is_grad_enabled()
    scope.pop()
    scope.push(
        Frame(
            weights=weights,
            batch_shape=batch_shape,
            generating=generating,
            row_repeats=outer.row_repeats if outer is not None and generating else 1,
            token_mask=_mask(kwargs.get("attention_mask"), args) if is_training else None,
            decoder_token_mask=_mask(kwargs.get("decoder_attention_mask")) if is_training else None,
            tape=Tape() if is_training else None,
            is_forward=True,
        )
    )
    for recorder in scope.recorders:
        recorder.begin_forward()
    return args, kwargs


def _after_forward(
    base: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    scope = scope_of(base)
    if scope is None or scope.top is None or not scope.top.is_forward:
        return None
    frame = scope.pop()
    if frame is None or frame.tape is None:
        return None
    entries = frame.tape.close()
    if output is None or not entries:
        return None
    return add_auxiliary_loss(
        base, output, entries, kwargs, tape=frame.tape, told_scale=scope.aux_loss_scale
    )


def _check_plain(base: nn.Module, kwargs: dict[str, Any]) -> None:
    """After ``uninstall`` nothing routes: say so, instead of summing all experts in silence."""
    layers = [module for module in base.modules() if isinstance(module, _peft.LoraLayer)]
    routed = any(
        spec.routed and name in layer.active_adapters
        for layer in layers
        for name, spec in layer.__dict__.get("moe_mixtures", {}).items()
    )
    if routed or kwargs.get("routing_weights") is not None:
        raise UnsupportedLayerError(
            "moelora is uninstalled, so this model cannot route. Call moelora.install() first."
        )


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
