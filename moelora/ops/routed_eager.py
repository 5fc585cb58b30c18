"""A linear layer routed by its own router, in PyTorch's operations, as one autograd function.

Autograd would record some thirty small operations per layer and run as many again. What happens
between the products is written out here, forward and backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moelora.ops.eager import mix_ranks
from moelora.ops.gradients import first_order
from moelora.ops.options import RouterOptions
from moelora.ops.products import base_gradient, base_product, in_shape, wide_mm

_ROUNDING = 1e-4


class _RoutedLinearEager(torch.autograd.Function):
    """See :func:`moelora.ops.routed.routed_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        router: Tensor,
        token_mask: Tensor | None,
        mature: Tensor | None,
        options: RouterOptions,
        is_conv1d: bool,  # noqa: FBT001 - apply() takes no keywords
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.is_conv1d, ctx.shape = options, is_conv1d, x.shape
        ctx.dtypes = (lora_a.dtype, lora_b.dtype, router.dtype)
        output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
        x = x.reshape(-1, x.shape[-1])
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        logits = router_scores(x, router).mul_(1.0 / options.temperature)
        weights, statistics = route(logits, token_mask, mature, options)
        mixed = mix_ranks(wide_mm(x, lora_a.t()), weights * options.scaling).to(x.dtype)
        output.addmm_(mixed, lora_b.t())
        ctx.save_for_backward(
            x, base_weight, lora_a, lora_b, router, mixed, logits, weights, token_mask, statistics
        )
        ctx.mark_non_differentiable(logits, weights)
        return in_shape(output, ctx.shape), statistics, logits, weights

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, base_weight, lora_a, lora_b, router, mixed, *decided = ctx.saved_tensors
        logits, weights, token_mask, statistics = decided
        needs_x, _, _, needs_a, needs_b, needs_router = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_b = grad_router = None
        if grad is None:
            grad = x.new_zeros(x.shape[0], lora_b.shape[0])
        grad = grad.reshape(-1, lora_b.shape[0])
        if needs_b:
            grad_b = wide_mm(grad.t(), mixed).to(ctx.dtypes[1])
        if needs_x or needs_a or needs_router:
            grad_mixed = wide_mm(grad, lora_b)
            grad_ranks = mix_ranks(grad_mixed, weights * ctx.options.scaling).to(x.dtype)
            shares = (grad_mixed.mul_(mixed)).unflatten(-1, (weights.shape[-1], -1)).sum(dim=-1)
            grad_scores = logits_gradient(
                shares, logits, weights, token_mask, statistics, grad_statistics, ctx.options
            )
            if needs_a:
                grad_a = wide_mm(grad_ranks.t(), x).to(ctx.dtypes[0])
            if needs_router:
                grad_router = (grad_scores.t() @ x.to(grad_scores.dtype)).to(ctx.dtypes[2])
            if needs_x:
                grad_x = base_gradient(grad, base_weight, is_conv1d=ctx.is_conv1d)
                grad_x.addmm_(grad_ranks, lora_a)
                grad_x.addmm_(grad_scores.to(x.dtype), router.to(x.dtype))
                grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_router, None, None, None, None


def routed_linear_eager(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Output, statistics, logits and weights, from the arguments of ``_RoutedLinearEager``."""
    output, statistics, logits, weights = _RoutedLinearEager.apply(*arguments)
    return output, statistics, logits, weights


def router_scores(x: Tensor, router: Tensor) -> Tensor:
    """``router x`` in at least float32.

    Example:
        >>> router_scores(torch.ones(1, 2).bfloat16(), torch.ones(1, 2))
        tensor([[2.]])
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, router.dtype), torch.float32)
    return x.to(dtype) @ router.t().to(dtype)


def route(
    logits: Tensor, token_mask: Tensor | None, mature: Tensor | None, options: RouterOptions
) -> tuple[Tensor, Tensor | None]:
    """Routing weights and the statistics that the loss reads; no gradient.

    The functions of ``moelora.routing`` and ``moelora.losses`` in as few operations as there are.

    Args:
        logits: ``(tokens, experts)``.
        token_mask: ``(tokens,)`` or None.
        mature: ``(experts,)`` or None.
        options: how the router decides.

    Example:
        >>> options = RouterOptions(2, 1, 1.0, 1.0)
        >>> route(torch.tensor([[0.0, 0.0]]), None, None, options)[0]
        tensor([[0.5000, 0.0000]])
    """
    top_k = options.top_k
    probs = logits.softmax(dim=-1)
    selected = logits.topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(logits).scatter_(-1, selected, 1.0)
    has_sums = options.capacity_factor is not None or options.loss_type is not None
    mask = None
    if token_mask is not None and has_sums:
        mask = token_mask.to(logits.dtype).unsqueeze(-1)
    counted = chosen if mask is None else chosen * mask
    kept = chosen
    if options.capacity_factor is not None:
        share = options.capacity_factor * top_k / options.num_experts
        # a product that is a whole number but for rounding is that number
        if mask is None:
            capacity: Any = math.ceil(logits.shape[0] * share - _ROUNDING)
        else:
            capacity = (mask.sum() * share - _ROUNDING).ceil_()
        kept = counted * (counted.cumsum(dim=0) <= capacity)
    if top_k == 1:
        weights = probs * kept
    else:
        lost = kept == 0
        weights = logits.masked_fill(lost, -math.inf).softmax(dim=-1).masked_fill_(lost, 0.0)
    if mature is not None:
        weights = torch.where(mature.all(), weights, probs)
    if options.loss_type is None:
        return weights, None
    return weights, _statistics(logits, probs, counted, selected, mask, options)


def _statistics(
    logits: Tensor,
    probs: Tensor,
    counted: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    options: RouterOptions,
) -> Tensor:
    """What the loss reads, in the layout of ``RoutedOutput.statistics``."""
    width = options.num_experts
    statistics = logits.new_zeros(3 * width + 2)
    number: Any = max(1, logits.shape[0]) if mask is None else mask.sum().clamp_(min=1.0)
    if options.loss_type == "z_loss":
        squares = logits.logsumexp(dim=-1, keepdim=True).square_()
        statistics[3 * width] = (squares if mask is None else squares.mul_(mask)).sum() / number
    else:
        statistics[:width] = (probs if mask is None else probs * mask).sum(dim=0) / number
        if options.loss_type == "switch":
            counted = torch.zeros_like(logits).scatter_(-1, selected[:, :1], 1.0)
            counted = counted if mask is None else counted.mul_(mask)
            statistics[2 * width : 3 * width] = counted.sum(dim=0) / number
        else:
            statistics[width : 2 * width] = counted.sum(dim=0) / (number * options.top_k)
    statistics[-1] = number
    return statistics


def logits_gradient(
    shares: Tensor,
    logits: Tensor,
    weights: Tensor,
    token_mask: Tensor | None,
    statistics: Tensor | None,
    grad_statistics: Tensor | None,
    options: RouterOptions,
) -> Tensor:
    """The gradient of the router's scores.

    With ``q[e]`` the sum over the ranks of gradient times scaled rank, the logits' gradient is
    ``q - w sum(q)`` (``p`` instead of ``w`` for K = 1): no division by a weight.

    Args:
        shares: ``q``, ``(tokens, experts)``.
        logits: what the router decided by, and all that follow.
        weights: ...
        token_mask: ...
        statistics: what the loss reads, or None.
        grad_statistics: its gradient, or None.
        options: how the router decides.

    Example:
        >>> q, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> logits_gradient(q, w.log(), w, None, None, None, RouterOptions(2, 2, 1.0, 1.0))
        tensor([[ 0.5000, -0.5000]])
    """
    has_statistics = statistics is not None and grad_statistics is not None
    probs = logits.softmax(dim=-1) if options.top_k == 1 or has_statistics else weights
    part = probs if options.top_k == 1 else weights
    gradient = shares - part * shares.sum(dim=-1, keepdim=True)
    if statistics is not None and grad_statistics is not None:
        width = options.num_experts
        valid = 1.0 / statistics[-1]
        if token_mask is not None:
            valid = token_mask.to(logits.dtype).unsqueeze(-1) * valid
        if options.loss_type == "z_loss":
            lse = logits.logsumexp(dim=-1, keepdim=True)
            gradient += probs * (lse * valid * (2.0 * grad_statistics[3 * width]))
        else:
            by_expert = grad_statistics[:width]
            centred = by_expert - (probs @ by_expert).unsqueeze(-1)
            gradient += probs * centred * valid
    return gradient.mul_(1.0 / options.temperature)
