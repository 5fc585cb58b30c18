"""The routed forward of every LoRA layer: one mechanism for all layer types.

``base(x) + sum_e w_e(x) * scaling_e * B_e A_e dropout(x)``, mixed in rank space. The weights are
the user's explicit ones, or come from the routers of the layer's active mixtures.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora import _peft
from moelora.alignment import align_routing_weights, check_routing_weights
from moelora.decision import MixtureSpec, consecutive_columns, decide
from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.fused_layer import (
    base_output,
    combine,
    fusable,
    is_plain_linear,
    is_transformed,
    narrow_combine,
    narrows,
)
from moelora.ops import lora_combine, mix_ranks
from moelora.places import reads_position_pairs
from moelora.routed_layer import planned_forward
from moelora.routing import Routing
from moelora.scope import Frame, LayerBinding, SharedRouting
from moelora.traced_layer import traced_forward

#: Where a layer keeps the weights of fixed mixtures.
_FIXED = "_moelora_fixed_weights"


def mixtures_of(layer: nn.Module) -> dict[str, MixtureSpec]:
    """The stacked adapters of a layer, by name."""
    mixtures: dict[str, MixtureSpec] = layer.__dict__.get("moe_mixtures", {})
    return mixtures


def binding_of(layer: nn.Module) -> LayerBinding | None:
    """The layer's place in its model; None if it was made by hand."""
    binding: LayerBinding | None = layer.__dict__.get("_moelora_binding")
    return binding


def needs_routing(layer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call of a LoRA layer is anything but plain PEFT."""
    if "routing_weights" in kwargs:
        return True
    binding = layer.__dict__.get("_moelora_binding")
    if binding is not None:
        frame = binding.scope.top
        if frame is not None and (frame.weights is not None or frame.adapters_off):
            return True
    mixtures = layer.__dict__.get("moe_mixtures")
    if not mixtures:
        return False
    for name in layer.active_adapters:
        spec = mixtures.get(name)
        if spec is not None and spec.routed:
            return True
    return False


def routed_forward(original: Any, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward of a LoRA layer with explicit weights or with routed mixtures.

    Args:
        original: the layer class's own forward, for calls in which nothing is routed.
        layer: any PEFT LoRA layer.
        x: the layer's input.
        *args: passed on to the base layer.
        **kwargs: ``routing_weights`` and PEFT's special arguments; the rest is passed on.

    Returns:
        A tensor of the base layer's shape and dtype.

    Raises:
        RoutingWeightsError: if explicit weights do not fit the call.
        UnsupportedLayerError: if the layer or variant cannot be routed.
    """
    binding = binding_of(layer)
    frame = None if binding is None else binding.scope.top
    weights = kwargs.pop("routing_weights", None)
    if weights is None and frame is not None:
        weights = frame.weights
    if weights is None and not (args or kwargs) and (frame is None or not frame.adapters_off):
        # told in training without a gradient too, where capacity counts real tokens
        is_told = frame is not None and (frame.tape is not None or layer.training)
        in_one_op = traced_forward if torch.compiler.is_compiling() else planned_forward
        output = in_one_op(
            layer, x, binding, frame,
            token_mask=lambda: _token_mask(layer, x, frame) if is_told else None,
        )  # fmt: skip
        if output is not None:
            return output
    if frame is not None and frame.adapters_off and not layer.merged:
        for key in ("adapter_names", *_peft.VARIANT_KWARG_KEYS):
            kwargs.pop(key, None)
        return layer.base_layer(x, *args, **kwargs)
    routed = weights is not None or (not layer.merged and needs_routing(layer, kwargs))
    if layer.disable_adapters or not routed:
        return original(layer, x, *args, **kwargs)
    _check_state(layer, weights, kwargs)
    if weights is not None and (frame is None or weights is not frame.weights):
        adapters = list(layer.active_adapters)
        total = sum(_experts_of(layer, adapter) for adapter in adapters)
        weights = check_routing_weights(weights, num_experts=total, adapters=adapters)
    if not _own_adapters(layer):
        return original(layer, x, *args, **kwargs)
    if isinstance(layer, _peft.WHOLE_WEIGHT_LAYERS):
        return _constant_forward(layer, x, weights, args, kwargs)
    return _mixed_forward(layer, x, weights, frame, args, kwargs)


def _check_state(layer: Any, weights: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what contradicts routing: another choice of adapters, or merged ones."""
    if kwargs.get("adapter_names") is not None:
        source = "a routed mixture" if weights is None else "routing_weights"
        raise RoutingWeightsError(
            f"adapter_names cannot be combined with {source} in layer {_name(layer)!r}: give "
            "routing_weights that are one-hot per row instead."
        )
    if layer.merged:
        raise RoutingWeightsError(
            f"routing_weights cannot be applied to layer {_name(layer)!r}, whose adapters "
            f"{layer.merged_adapters} are merged. Call unmerge_adapter() first."
        )


def _mixed_forward(
    layer: Any,
    x: Tensor,
    weights: Tensor | None,
    frame: Frame | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    if not args and not kwargs:
        output = _fused_forward(layer, x, weights, frame)
        if output is not None:
            return output
    variant_kwargs = {key: kwargs.pop(key, None) for key in _peft.VARIANT_KWARG_KEYS}
    base = base_output(layer, x, *args, **kwargs)
    if weights is None:
        weight_of = _routed_weights(layer, x, frame)
    else:
        weight_of = _explicit_weights(layer, x, weights, frame)
    result = base
    for adapter, expert_weights in weight_of.items():
        if adapter in layer.lora_variant:
            delta = _variant_delta(layer, adapter, x, base, {**variant_kwargs, **kwargs})
            if expert_weights is not None:
                delta = delta * _over_features(layer, expert_weights, delta).to(delta.dtype)
        elif adapter in layer.lora_embedding_A:
            delta = _embedding_delta(layer, adapter, x, expert_weights)
        elif isinstance(layer, _peft.ConvLayer):
            delta = _conv_delta(layer, adapter, x, expert_weights)
        else:
            delta = _linear_delta(layer, adapter, x, expert_weights)
        result = result + delta
    return result.to(base.dtype)


def _fused_forward(
    layer: Any, x: Tensor, weights: Tensor | None, frame: Frame | None
) -> Tensor | None:
    """A plain linear layer with all its adapters in one op; None where that is not possible."""
    adapters = _own_adapters(layer)
    base = fusable(layer, x, adapters)
    if base is None:
        return None
    if weights is not None:
        return combine(layer, x, base, _explicit_weights(layer, x, weights, frame))
    return combine(layer, x, base, _routed_weights(layer, x, frame))


# Which weight each adapter gets --------------------------------------------------------------


def _own_adapters(layer: Any) -> list[str]:
    """Active adapters that this layer has, in order."""
    return [
        name
        for name in layer.active_adapters
        if name in layer.lora_A or name in layer.lora_embedding_A
    ]


def _explicit_weights(
    layer: Any, x: Tensor, weights: Tensor, frame: Frame | None
) -> dict[str, Tensor | None]:
    """Each own adapter's columns; an adapter that this layer lacks keeps its columns."""
    binding = binding_of(layer)
    if isinstance(layer, _peft.ConvLayer) and weights.ndim >= 3 and weights.shape[1] != 1:
        raise RoutingWeightsError(
            f"Layer {_name(layer)!r} is a convolution and takes one weight vector per sample: "
            f"[batch, E], [batch, 1, E] or [E], got shape {tuple(weights.shape)}."
        )
    if weights.numel() != weights.shape[-1] and reads_position_pairs(_name(layer)):
        raise RoutingWeightsError(
            f"Layer {_name(layer)!r} embeds pairs of positions, which belong to no row or token of "
            f"the batch. It takes only constant weights [E], got shape {tuple(weights.shape)}."
        )
    if frame is not None and frame.per_token and weights.shape[1] == 1:
        rows = frame.batch_shape[0] if frame.batch_shape else weights.shape[0] * frame.row_repeats
        _check_reads_new_tokens(layer, x, tokens=rows)
    aligned = align_routing_weights(
        weights.to(x.device),
        _lead(layer, x),
        layer_name=_name(layer),
        frame=frame,
        block=None if binding is None else binding.block,
    )
    weight_of: dict[str, Tensor | None] = {}
    own = _own_adapters(layer)
    start = 0
    for adapter in layer.active_adapters:
        experts = _experts_of(layer, adapter)
        if adapter in own:
            weight_of[adapter] = aligned[..., start : start + experts]
        start += experts
    return weight_of


def _routed_weights(layer: Any, x: Tensor, frame: Frame | None) -> dict[str, Tensor | None]:
    """Weights by the layer's routers; a plain adapter, or a lone expert, has none: it is on."""
    mixtures = mixtures_of(layer)
    own = _own_adapters(layer)
    weight_of: dict[str, Tensor | None] = dict.fromkeys(own)
    for adapter in own:
        spec = mixtures.get(adapter)
        if spec is not None and spec.routed and not spec.has_router:
            weight_of[adapter] = _fixed_weights(layer, adapter, spec.fixed_weights, x)
    routers = [a for a in own if a in mixtures and mixtures[a].routed and mixtures[a].has_router]
    if not routers:
        return weight_of
    scopes = sorted({mixtures[adapter].router_scope for adapter in routers})
    if len(scopes) > 1:
        raise UnsupportedLayerError(
            f"Mixtures of different router_scope {scopes} cannot be active together in layer "
            f"{_name(layer)!r}: their routers decide over different inputs."
        )
    if scopes == ["module"]:
        if sum(mixtures[adapter].num_experts for adapter in routers) == 1:
            return weight_of
        routing = _route(layer, x, routers, frame)
        weights = routing.routing_weights
        per_token = weights.reshape(*_lead(layer, x), weights.shape[-1])
        columns = consecutive_columns({a: mixtures[a].num_experts for a in routers})
    else:
        shared = _shared_routing(layer, scopes[0], frame)
        if shared.weights is None:
            return weight_of
        if shared.weights.shape[1] == 1:
            _check_reads_new_tokens(layer, x, tokens=shared.weights.shape[0])
        per_token = align_routing_weights(
            shared.weights.to(x.device), _lead(layer, x), layer_name=_name(layer), frame=frame
        )
        columns = shared.columns
    for adapter in routers:
        start, end = columns[adapter]
        weight_of[adapter] = per_token[..., start:end]
    return weight_of


def _fixed_weights(layer: Any, adapter: str, weights: tuple[float, ...], x: Tensor) -> Tensor:
    """A fixed mixture's weights where ``x`` is, copied there once.

    Each copy would wait for the device, and a CUDA graph that is recorded may hold none.
    """
    if torch.compiler.is_compiling() or is_transformed(x):
        # what is made in there means nothing outside
        return x.new_tensor(weights, dtype=torch.float32)
    known: dict[str, tuple[tuple[float, ...], Tensor]] = layer.__dict__.setdefault(_FIXED, {})
    found = known.get(adapter)
    if found is None or found[0] != weights or found[1].device != x.device:
        # else a training that follows would be refused
        with torch.inference_mode(False):
            found = weights, torch.tensor(weights, dtype=torch.float32, device=x.device)
        known[adapter] = found
    return found[1]


def _check_reads_new_tokens(layer: Any, x: Tensor, *, tokens: int) -> None:
    """Weights of one new token per row must not be spread over what a layer reads from a cache."""
    lead = _lead(layer, x)
    if math.prod(lead) > tokens:
        raise UnsupportedLayerError(
            f"Layer {_name(layer)!r} reads {lead} tokens where {tokens} are new: it reads the "
            "cache again, as multi-head latent attention does, but only the new tokens are routed. "
            "Leave it out (exclude_modules), use router_scope='module', or generate with "
            "use_cache=False."
        )


def _shared_routing(layer: Any, router_scope: str, frame: Frame | None) -> SharedRouting:
    """What the router of this layer's block, or of the model, decided in this forward."""
    binding = binding_of(layer)
    key = "" if router_scope == "model" or binding is None else binding.block_name
    shared = None if frame is None or key is None else frame.shared.get(key)
    if shared is None:
        raise UnsupportedLayerError(
            f"Layer {_name(layer)!r} gets its routing from the router of its {router_scope}, which "
            "has not run: call the whole model, not this layer or a part of the model."
        )
    return shared


def _route(layer: Any, x: Tensor, routers: list[str], frame: Frame | None) -> Routing:
    """The decision of this layer's own routers."""
    mixtures = mixtures_of(layer)
    binding = binding_of(layer)
    inputs = x
    if isinstance(layer, _peft.ConvLayer):
        # one decision per sample, from the mean over space: a convolution has no tokens
        inputs = x.mean(dim=tuple(range(2, x.ndim)))
    return decide(
        inputs,
        [(layer.lora_router[adapter], mixtures[adapter]) for adapter in routers],
        name=_name(layer),
        training=layer.training,
        scope=None if binding is None else binding.scope,
        frame=frame,
        token_mask=_token_mask(layer, x, frame),
    )


def _token_mask(layer: Any, x: Tensor, frame: Frame | None) -> Tensor | None:
    """Which of the layer's tokens are real, where the model's mask speaks of these very tokens."""
    binding = binding_of(layer)
    if frame is None or binding is None:
        return None
    mask = frame.decoder_token_mask if binding.reads_decoder else frame.token_mask
    if mask is None or isinstance(layer, _peft.ConvLayer):
        return None
    lead = _lead(layer, x)
    if lead == tuple(mask.shape) or (len(lead) == 1 and lead[0] == mask.numel()):
        # a model that is split over devices gets its mask on the first of them
        return mask.reshape(-1).to(x.device)
    return None


# What each adapter adds ----------------------------------------------------------------------


def _linear_delta(layer: Any, adapter: str, x: Tensor, weights: Tensor | None) -> Tensor:
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    scaling = layer.scaling[adapter]
    if weights is not None and narrows(layer, adapter, x):
        return narrow_combine(
            x, lora_a.weight, lora_b.weight, _scaled(weights, scaling, torch.float32)
        )
    x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, lora_a.weight.dtype))
    if weights is None:
        return lora_b(lora_a(x)) * scaling  # type: ignore[no-any-return]
    scaled = _scaled(weights, scaling, x.dtype)
    if lora_b.bias is None and is_plain_linear(lora_a) and is_plain_linear(lora_b):
        return lora_combine(x, lora_a.weight, lora_b.weight, scaled)
    delta = lora_b(mix_ranks(lora_a(x), scaled))
    return _weigh_bias(delta, lora_b.bias, scaled)


def _scaled(weights: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Weights times scaling in at least float32: only the model's own dtype may cost accuracy."""
    wide = torch.promote_types(torch.promote_types(weights.dtype, dtype), torch.float32)
    return weights.to(wide) * scaling


def _weigh_bias(delta: Tensor, bias: Tensor | None, scaled: Tensor) -> Tensor:
    """Correct for lora_B's bias, which was added with weight 1 instead of its expert's weight."""
    return delta if bias is None else delta + (scaled.to(delta.dtype) - 1) * bias


def _conv_delta(layer: Any, adapter: str, x: Tensor, weights: Tensor | None) -> Tensor:
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    scaling = layer.scaling[adapter]
    x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, lora_a.weight.dtype))
    if weights is None:
        return lora_b(lora_a(x)) * scaling  # type: ignore[no-any-return]
    scaled = _scaled(weights, scaling, x.dtype)
    scaled = scaled.reshape(-1, *(1,) * (layer._kernel_dim - 2), weights.shape[-1])
    ranks = mix_ranks(lora_a(x).movedim(1, -1), scaled).movedim(-1, 1)
    delta = lora_b(ranks)
    if lora_b.bias is None:
        return delta  # type: ignore[no-any-return]
    factor = scaled.movedim(-1, 1).to(delta.dtype)
    biased: Tensor = delta + (factor - 1) * lora_b.bias.reshape(-1, *(1,) * (delta.ndim - 2))
    return biased


def _embedding_delta(layer: Any, adapter: str, x: Tensor, weights: Tensor | None) -> Tensor:
    lora_a, lora_b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    ranks = layer._embed(
        x,
        lora_a.T,
        input_fn=layer.input_fns.get(adapter),
        output_fn=layer.output_fns.get(adapter),
    )
    scaling = layer.scaling[adapter]
    if weights is None:
        delta = (ranks @ lora_b.T) * scaling
    else:
        delta = F.linear(mix_ranks(ranks, _scaled(weights, scaling, ranks.dtype)), lora_b)
    embed_scale = layer._get_embed_scale()
    result: Tensor = delta if embed_scale is None else delta * embed_scale.to(delta.dtype)
    return result


def _variant_delta(
    layer: Any, adapter: str, x: Tensor, base: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """What a LoRA variant (DoRA ...) adds to the pure base output.

    Variants return the whole output and may write into ``result``, so they get a copy; the
    difference is taken in float32 since bfloat16 would lose it.

    Raises:
        UnsupportedLayerError: for a variant whose output is no update of this one adapter.
    """
    variant = layer.lora_variant[adapter]
    if type(variant).__name__ in _peft.UNROUTABLE_VARIANTS:
        raise UnsupportedLayerError(
            f"Adapter {adapter!r} of layer {_name(layer)!r} uses {type(variant).__name__}, which "
            "cannot be weighted: it routes over other adapters by itself."
        )
    if adapter in layer.lora_A:
        x = layer._cast_input_dtype(x, layer.lora_A[adapter].weight.dtype)
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    output = variant.forward(layer, active_adapter=adapter, x=x, result=wide.clone(), **kwargs)
    return output.to(wide.dtype) - wide  # type: ignore[no-any-return]


def _over_features(layer: Any, weights: Tensor, delta: Tensor) -> Tensor:
    """Shape the one weight per token (or sample) to multiply a whole layer output."""
    if isinstance(layer, _peft.ConvLayer):
        return weights.reshape(-1, *(1,) * (delta.ndim - 1))
    return weights


# Layers that use their whole weight at once --------------------------------------------------


def _constant_forward(
    layer: Any,
    x: Tensor,
    weights: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """nn.MultiheadAttention: PEFT merges the adapters for the call, so weights are constant.

    Raises:
        UnsupportedLayerError: for weights that differ between tokens or samples, and for layers
            that adapt a bare parameter.
    """
    if isinstance(layer, _peft.ParamWrapper) or weights is None:
        raise UnsupportedLayerError(
            f"Layer {_name(layer)!r} (lora.{type(layer).__name__}) cannot be routed: it adapts a "
            "whole parameter, for which weights per token or sample have no meaning. Leave it out "
            "of target_parameters / target_modules, or call without routing_weights."
        )
    if weights.numel() != weights.shape[-1]:
        raise UnsupportedLayerError(
            f"Layer {_name(layer)!r} (lora.{type(layer).__name__}) merges its adapters for the "
            f"call and takes only constant routing_weights [E], got shape {tuple(weights.shape)}."
        )
    attention = layer.base_layer
    in_proj, out_proj = attention.in_proj_weight, attention.out_proj.weight
    # PEFT's own forward adds the update of out_proj twice: once in place of the weight, once by
    # merging; one-hot weights have to give what that adapter alone gives
    for adapter, expert_weight in _constant_weights(layer, weights.reshape(-1)).items():
        delta_in = layer.get_delta_weight(adapter)
        delta_out = 2 * attention.out_proj.get_delta_weight(adapter)
        in_proj = in_proj + (expert_weight * delta_in).to(in_proj.dtype)
        out_proj = out_proj + (expert_weight * delta_out).to(out_proj.dtype)
    replaced = {"in_proj_weight": in_proj, "out_proj.base_layer.weight": out_proj}
    return torch.func.functional_call(attention, replaced, (x, *args), kwargs)


def _constant_weights(layer: Any, weights: Tensor) -> dict[str, Tensor]:
    """The weight of each adapter that the layer has, one expert each."""
    weight_of = {}
    start = 0
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight_of[adapter] = weights[start]
        start += _experts_of(layer, adapter)
    return weight_of


# Small facts about a layer -------------------------------------------------------------------


def _lead(layer: Any, x: Tensor) -> tuple[int, ...]:
    """The axes of the input that hold tokens (or samples)."""
    if isinstance(layer, _peft.ConvLayer):
        return tuple(x.shape[:1])
    if layer.lora_embedding_A:
        return tuple(x.shape)
    return tuple(x.shape[:-1])


def _experts_of(layer: nn.Module, adapter: str) -> int:
    spec = mixtures_of(layer).get(adapter)
    if spec is not None:
        return spec.num_experts
    binding = binding_of(layer)
    return 1 if binding is None else binding.experts_of.get(adapter, 1)


def _name(layer: nn.Module) -> str:
    binding = binding_of(layer)
    return type(layer).__name__ if binding is None else binding.name
