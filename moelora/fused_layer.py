"""Adapted linear layers in one fused op, where nothing but the arithmetic is asked of them.

A layer with hooks on its parts, with dropout at work, with a variant, a base that is no plain
frozen linear, or inside a trace takes the general way of ``layer.py``, which means the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora.decision import MixtureSpec, report
from moelora.ops import combine_linear, explain, routed_linear, routed_linear_inference
from moelora.ops.options import RouterOptions
from moelora.router import ModuleRouter
from moelora.routing import Routing
from moelora.scope import Frame, RoutingScope, TapeEntry


class FrozenLinear(NamedTuple):
    """A plain linear base layer that is not trained.

    Attributes:
        weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of a ``Conv1D``.
        bias: ``(d_out,)`` or None.
        is_conv1d: which of the two.
    """

    weight: Tensor
    bias: Tensor | None
    is_conv1d: bool


def fusable(layer: Any, x: Tensor, adapters: list[str]) -> FrozenLinear | None:
    """The layer's base, if base and adapters are what the fused ops compute; else None."""
    base = layer.base_layer
    kind = type(base)
    if (kind is not nn.Linear and kind is not Conv1D) or type(x) is not Tensor:
        return None
    if _is_traced(x) or not _is_bare(base):
        return None
    weight, bias = base.weight, base.bias
    if not (_is_frozen(weight, x) and (bias is None or _is_frozen(bias, x))):
        return None
    for adapter in adapters:
        if not _is_plain_pair(layer, adapter, x):
            return None
    return FrozenLinear(weight, bias, kind is Conv1D)


def _is_traced(x: Tensor) -> bool:
    """Whether something watches single operations, or changes what they mean."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or bool(nn.modules.module._has_any_global_hook())
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether using the weight is the same as calling the module (no hooks, no wrapper)."""
    return type(module) is nn.Linear and _is_bare(module)


def _is_bare(module: nn.Module) -> bool:
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_frozen(parameter: Tensor, x: Tensor) -> bool:
    return (
        type(parameter) is nn.Parameter
        and not parameter.requires_grad
        and parameter.dtype == x.dtype
        and parameter.device == x.device
    )


def _is_plain_pair(layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether an adapter is one A and one B that may be multiplied in the dtype of ``x``."""
    if adapter in layer.lora_variant or adapter not in layer.lora_A:
        return False
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (is_plain_linear(lora_a) and is_plain_linear(lora_b)) or lora_b.bias is not None:
        return False
    dropout = layer.lora_dropout[adapter]
    if not (type(dropout) is nn.Identity or not dropout.training) or not _is_bare(dropout):
        return False
    same = lora_a.weight.dtype == x.dtype and lora_b.weight.dtype == x.dtype
    # float32 parameters beside a bfloat16 model: products in bfloat16 with float32 sums cost less
    # accuracy than the output's own rounding; float16 could overflow
    return same or (x.is_cuda and x.dtype == torch.bfloat16)


def combine(
    layer: Any, x: Tensor, base: FrozenLinear, weight_of: Mapping[str, Tensor | None]
) -> Tensor | None:
    """The layer with given weights of all its adapters, as one stack.

    None if all adapters are plain and always on: that is PEFT's own sum, to the bit.

    Args:
        layer: a LoRA layer whose base is ``base``.
        x: ``(*lead, d_in)``.
        base: what :func:`fusable` found.
        weight_of: each adapter's weights, ``(*lead or broadcastable, experts)``; None is 1.
    """
    if all(weights is None for weights in weight_of.values()):
        return None
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in weight_of]
    lead = x.shape[:-1]
    columns, ranks = [], []
    for (lora_a, _), (name, weights) in zip(pairs, weight_of.items(), strict=True):
        if weights is None:
            weights = x.new_ones(1, dtype=torch.promote_types(x.dtype, torch.float32))
        wide = torch.promote_types(weights.dtype, torch.float32)
        scaled = weights.to(wide) * layer.scaling[name]
        number = scaled.shape[-1]
        columns.append(scaled.expand(*lead, number).reshape(lead.numel(), number))
        ranks.append(lora_a.shape[0] // number)
    if len(set(ranks)) > 1:
        # experts of unequal rank: one weight for each rank
        pieces = zip(columns, ranks, strict=True)
        columns = [column.repeat_interleave(rank, dim=-1) for column, rank in pieces]
    if len(pairs) == 1:
        return combine_linear(x, *base[:2], *pairs[0], columns[0], is_conv1d=base.is_conv1d)
    lora_a = torch.cat([a for a, _ in pairs])
    lora_b = torch.cat([b for _, b in pairs], dim=1)
    weights = torch.cat(columns, dim=-1)
    return combine_linear(x, *base[:2], lora_a, lora_b, weights, is_conv1d=base.is_conv1d)


def routes_in_one_op(
    layer: Any, x: Tensor, adapters: list[str], spec: MixtureSpec | None, scope: Any
) -> bool:
    """Whether the kernels can decide this layer's routing themselves."""
    if spec is None or len(adapters) != 1 or not (spec.routed and spec.has_router):
        return False
    if spec.router_scope != "module" or spec.num_experts == 1:
        return False
    router = layer.lora_router[adapters[0]]
    if type(router) is not ModuleRouter or not _is_bare(router):
        return False
    if router.hidden_weight is not None or (layer.training and spec.expert_dropout > 0):
        return False
    if scope is not None and any(getattr(r, "keep_graph", True) for r in scope.recorders):
        return False
    rank = layer.lora_A[adapters[0]].weight.shape[0] // spec.num_experts
    return (
        explain(
            device=x.device,
            dtype=x.dtype,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            rank=rank,
        ).backend
        == "triton"
    )


def route(
    layer: Any,
    adapter: str,
    x: Tensor,
    base: FrozenLinear,
    *,
    spec: MixtureSpec,
    name: str,
    scope: RoutingScope | None,
    frame: Frame | None,
    token_mask: Tensor | None,
) -> Tensor:
    """The layer routed by its own router in the kernels, its decision reported.

    Args:
        layer: a LoRA layer for which :func:`fusable` and :func:`routes_in_one_op` hold.
        adapter: the mixture.
        x: ``(*lead, d_in)``.
        base: what :func:`fusable` found.
        spec: the mixture's routing.
        name: the layer's name.
        scope: the model's routing scope.
        frame: the current forward.
        token_mask: ``(tokens,)`` True for real tokens, or None.
    """
    router = layer.lora_router[adapter]
    training = layer.training
    tape = None if frame is None else frame.tape
    takes = tape is not None and tape.takes(training=training, coefficient=spec.aux_loss_coef)
    looked_at = scope is not None and bool(scope.recorders)
    options = RouterOptions(
        spec.num_experts,
        spec.top_k,
        spec.temperature,
        layer.scaling[adapter],
        spec.capacity_factor if training else None,
        statistics=takes,
    )
    tensors = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, router.weight)
    if training or takes or torch.is_grad_enabled():
        result = routed_linear(
            x, *base[:2], *tensors, options=options, token_mask=token_mask, mature=router.mature,
            is_conv1d=base.is_conv1d,
        )  # fmt: skip
    else:
        result = routed_linear_inference(
            x, *base[:2], *tensors, options=options, mature=router.mature,
            is_conv1d=base.is_conv1d, record=looked_at,
        )  # fmt: skip
    if scope is None:
        return result.output
    routing = None
    if looked_at or (takes and tape is not None and tape.observed):
        routing = _routing(result.router_logits, result.routing_weights, spec.top_k)
        for recorder in scope.recorders:
            recorder.add(name, routing)
    if not takes or tape is None or frame is None or result.statistics is None:
        return result.output
    entry = TapeEntry(
        layer_name=name,
        routing=routing,
        token_mask=token_mask,
        loss_type=spec.loss_type,
        coefficient=spec.aux_loss_coef,
        router_is_trainable=router.weight.requires_grad,
        checkpointed=frame.checkpointed,
        statistics=(result.statistics, spec.num_experts),
        over_ranks=training and spec.balance_over_ranks,
    )
    return report(result.output, entry, tape)


def _routing(logits: Any, weights: Any, top_k: int) -> Routing:
    """The decision that the kernels made, for those who look at it."""
    return Routing(logits, logits.softmax(dim=-1), weights, logits.topk(top_k, dim=-1).indices)
