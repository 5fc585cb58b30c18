"""Adapted linear layers in one fused op, where nothing but the arithmetic is asked of them.

A layer with hooks on its adapters, with a variant, or inside a trace takes the general way of
``layer.py``, which means the same. So does one under explicit weights with dropout at work or a
base that is no plain frozen linear; routed layers need not, see ``routed_layer.py``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora._peft import WHOLE_WEIGHT_LAYERS
from moelora.errors import UnsupportedLayerError
from moelora.ops import combine_linear, mix_ranks
from moelora.ops.gradients import is_autocast


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


def fusable(
    layer: Any, x: Tensor, adapters: list[str], *, drops: bool = False
) -> FrozenLinear | None:
    """The layer's base, if base and adapters are what the fused ops compute; else None.

    Args:
        layer: a LoRA layer.
        x: its input.
        adapters: which of its adapters.
        drops: whether their dropout may be at work.
    """
    return None if is_traced(x) else frozen_linear(layer, x, adapters, drops=drops)


def frozen_linear(
    layer: Any, x: Tensor, adapters: list[str], *, drops: bool = False
) -> FrozenLinear | None:
    """:func:`fusable`, whatever watches the call.

    Args:
        layer: as there.
        x: as there.
        adapters: as there.
        drops: as there.
    """
    base = layer.base_layer
    kind = type(base)
    if (kind is not nn.Linear and kind is not Conv1D) or type(x) is not Tensor:
        return None
    if not is_bare(base):
        return None
    weight, bias = base.weight, base.bias
    if not (_is_frozen(weight, x) and (bias is None or _is_frozen(bias, x))):
        return None
    for adapter in adapters:
        if not _is_plain_pair(layer, adapter, x, drops=drops):
            return None
    return FrozenLinear(weight, bias, kind is Conv1D)


def mixes_beside(layer: Any, x: Tensor, adapter: str) -> bool:
    """Whether the ops compute an adapter's update, beside a base that computes itself.

    So they do for quantised, trained and otherwise unusual bases of linear layers.
    """
    return not is_traced(x) and is_linear_mixture(layer, x, adapter)


def is_linear_mixture(layer: Any, x: Tensor, adapter: str) -> bool:
    """:func:`mixes_beside`, whatever watches the call.

    Args:
        layer: as there.
        x: as there.
        adapter: as there.
    """
    if type(x) is not Tensor or not x.is_floating_point():
        return False
    plain = not isinstance(layer, WHOLE_WEIGHT_LAYERS)
    return plain and _is_plain_pair(layer, adapter, x, drops=True)


def base_output(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer's base gives.

    Args:
        layer: a LoRA layer.
        x: its input.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        UnsupportedLayerError: if it is no tensor, to which no update can be added.
    """
    output = layer.base_layer(x, *args, **kwargs)
    if isinstance(output, Tensor):
        return output
    binding = layer.__dict__.get("_moelora_binding")
    name = type(layer).__name__ if binding is None else binding.name
    raise UnsupportedLayerError(
        f"Layer {name!r} cannot be routed: its base layer {type(layer.get_base_layer()).__name__} "
        f"returns {type(output).__name__}, not a tensor."
    )


def is_traced(x: Tensor) -> bool:
    """Whether something watches single operations, or changes what they mean."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or changes_operations(x)
    )


def changes_operations(x: Tensor) -> bool:
    """Whether something that a trace keeps changes what single operations on ``x`` mean."""
    return (
        _autocast_changes(x)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or _has_global_hooks()
    )


def _autocast_changes(x: Tensor) -> bool:
    """Whether autocast lets a layer compute in another dtype than that of its input.

    Where it is the same the frozen layer gives what it gives without autocast, and the adapters'
    products run in that dtype too, with float32 sums. The ops switch autocast off inside.
    """
    device_type = "cuda" if x.is_cuda else x.device.type
    return is_autocast(device_type) and torch.get_autocast_dtype(device_type) is not x.dtype


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` stands for something else than its own numbers (vmap, grad, a fake tensor)."""
    return type(x) is not Tensor or torch._C._are_functorch_transforms_active()


def _has_global_hooks() -> bool:
    """Whether calls of modules run hooks of no one module, as ``nn.Module.__call__`` sees it."""
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether using the weight is the same as calling the module (no hooks, no wrapper)."""
    return type(module) is nn.Linear and is_bare(module)


def is_bare(module: nn.Module) -> bool:
    """Whether a module's call is its forward and nothing else: no hook, no wrapper."""
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


def _is_plain_pair(layer: Any, adapter: str, x: Tensor, *, drops: bool) -> bool:
    """Whether an adapter is one A and one B that may be multiplied in the dtype of ``x``."""
    if adapter in layer.lora_variant or adapter not in layer.lora_A:
        return False
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (is_plain_linear(lora_a) and is_plain_linear(lora_b)) or lora_b.bias is not None:
        return False
    dropout = layer.lora_dropout[adapter]
    is_idle = type(dropout) is nn.Identity or not dropout.training
    if not (is_idle or drops) or not is_bare(dropout):
        return False
    same = lora_a.weight.dtype == x.dtype and lora_b.weight.dtype == x.dtype
    # float32 parameters beside a bfloat16 model: products in bfloat16 with float32 sums cost less
    # accuracy than the output's own rounding; float16 could overflow
    return same or (x.is_cuda and x.dtype == torch.bfloat16)


def narrows(layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether a compiled layer multiplies wider parameters in the dtype of ``x``.

    Where nothing is traced the fused ops do so; the general way would compute in float32 throughout
    as PEFT does, several times slower on a GPU.

    Args:
        layer: a LoRA layer.
        adapter: one of its adapters.
        x: the layer's input.
    """
    if not (torch.compiler.is_compiling() and x.is_cuda and x.dtype == torch.bfloat16):
        return False
    is_wider = layer.lora_A[adapter].weight.dtype != x.dtype
    return is_wider and _is_plain_pair(layer, adapter, x, drops=False)


def narrow_combine(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """:func:`moelora.ops.lora_combine` in the dtype of ``x``, mixing in that of ``weights``.

    Args:
        x: ``(*batch, d_in)``.
        lora_a: ``(ranks, d_in)``.
        lora_b: ``(d_out, ranks)``.
        weights: ``(*batch, experts)`` or broadcastable, weight times scaling, at least float32.

    Example:
        >>> one = torch.ones(1, 1)
        >>> narrow_combine(one.bfloat16(), one, one, 2 * one)
        tensor([[2.]], dtype=torch.bfloat16)
    """
    ranks = F.linear(x, lora_a.to(x.dtype)).to(weights.dtype)
    delta: Tensor = F.linear(mix_ranks(ranks, weights).to(x.dtype), lora_b.to(x.dtype))
    return delta


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
        wide = torch.promote_types(torch.promote_types(weights.dtype, x.dtype), torch.float32)
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
