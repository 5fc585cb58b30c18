"""One adapted linear layer with its frozen base, as one autograd function.

``y = W x + b + B (expand(weights) * (A x))``. Autograd would write the update, add it to the base
output, and add the two gradients of ``x``: four more passes over tensors of full width. Here the
update is accumulated into the base product, forward and backward, and only ``A x`` is kept.
"""

from typing import Any

import torch
from torch import Tensor

from moelora.ops.eager import mix_ranks
from moelora.ops.gradients import first_order, in_given_dtypes
from moelora.ops.products import base_gradient, base_product, in_shape, wide_mm


class _CombineLinear(torch.autograd.Function):
    """See :func:`combine_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        weights: Tensor,
        is_conv1d: bool,  # noqa: FBT001 - apply() takes no keywords
    ) -> Tensor:
        ctx.is_conv1d, ctx.shape, ctx.dtypes = is_conv1d, x.shape, (lora_a.dtype, lora_b.dtype)
        output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
        x = x.reshape(-1, x.shape[-1])
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        ranks = wide_mm(x, lora_a.t())
        output.addmm_(mix_ranks(ranks, weights).to(x.dtype), lora_b.t())
        ctx.save_for_backward(x, base_weight, lora_a, lora_b, weights, ranks)
        return in_shape(output, ctx.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base_weight, lora_a, lora_b, weights, ranks = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_weights, _ = ctx.needs_input_grad
        grad_a = grad_b = grad_weights = grad_x = None
        grad = grad.reshape(-1, grad.shape[-1])
        if needs_b:
            mixed = mix_ranks(ranks, weights).to(x.dtype)
            grad_b = wide_mm(grad.t(), mixed).to(ctx.dtypes[1])
        if needs_x or needs_a or needs_weights:
            grad_mixed = wide_mm(grad, lora_b)
            if needs_weights:
                grad_weights = _weight_gradient(grad_mixed, ranks, weights)
            grad_ranks = mix_ranks(grad_mixed, weights).to(x.dtype)
            if needs_a:
                grad_a = wide_mm(grad_ranks.t(), x).to(ctx.dtypes[0])
            if needs_x:
                grad_x = base_gradient(grad, base_weight, is_conv1d=ctx.is_conv1d)
                grad_x = grad_x.addmm_(grad_ranks, lora_a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_weights, None


def _weight_gradient(grad_mixed: Tensor, ranks: Tensor, weights: Tensor) -> Tensor:
    """``dL/dw[t, e]``: the products summed over the ranks of each expert, in the dtype of ``w``."""
    per_expert: Tensor = (grad_mixed * ranks).unflatten(-1, (weights.shape[-1], -1))
    return per_expert.sum(dim=-1, dtype=weights.dtype)


@in_given_dtypes
def combine_linear(
    x: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    weights: Tensor,
    *,
    is_conv1d: bool = False,
) -> Tensor:
    """A frozen linear layer and the weighted update of its mixture, in as few passes as there are.

    ``W x + b + lora_combine(x, lora_a, lora_b, weights)``, with exact gradients for ``x``,
    ``lora_a``, ``lora_b`` and ``weights``, of first order; none for the frozen base. Products run
    in the dtype of ``x`` with float32 sums, also where the parameters are wider.

    Args:
        x: ``(*batch, d_in)``.
        base_weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of transformers' ``Conv1D``.
        bias: ``(d_out,)`` or None.
        lora_a: ``(ranks, d_in)``.
        lora_b: ``(d_out, ranks)``.
        weights: ``(tokens, experts)``, weight times scaling, at least float32; ``tokens`` is the
            product of ``batch``.
        is_conv1d: the base is a ``Conv1D``.

    Returns:
        ``(*batch, d_out)`` in the dtype of ``x``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> combine_linear(one, one, None, one, one, 2 * one)
        tensor([[3.]])
    """
    output: Tensor = _CombineLinear.apply(x, base_weight, bias, lora_a, lora_b, weights, is_conv1d)
    return output
