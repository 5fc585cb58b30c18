"""Linear layers routed by their own routers, in PyTorch's operations, as one autograd function.

Autograd would record some thirty small operations per layer and run as many again. What happens
between the products is written out here, forward and backward, once for all layers that read the
same input: ``members`` of a shape are layers. Each product is a layer's own, so that together they
give to the bit what each gives alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.ops.gradients import first_order, output_gradients
from moelora.ops.options import Member, RouterOptions
from moelora.ops.products import wide_mm, with_update

_ROUNDING = 1e-4
#: Where the first member's tensors stand among the autograd function's arguments, and how many each
#: member has.
_FIRST_TENSOR, _TENSORS = 5, 4


class _Computed(NamedTuple):
    """What a forward gives, and backward reads.

    Attributes:
        outputs: ``(*batch, d_out)`` of each member.
        logits: ``(tokens, members, experts)``.
        weights: the same shape.
        statistics: ``(members, ...)`` or None.
        mixed: ``(tokens, ranks)`` of each member, scaled.
        lora_as: each A in the dtype of the input.
        lora_bs: each B in the dtype of the input.
    """

    outputs: list[Tensor]
    logits: Tensor
    weights: Tensor
    statistics: Tensor | None
    mixed: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]


def compute(
    x: Tensor,
    members: Sequence[Member],
    options: RouterOptions,
    *,
    token_mask: Tensor | None = None,
    all_mature: bool = False,
) -> _Computed:
    """Layers that are alike, without a graph.

    Args:
        x: ``(*batch, d_in)``.
        members: the layers; they have the same experts, ranks and dtypes.
        options: how each router decides.
        token_mask: ``(tokens,)`` or None.
        all_mature: no member has a young expert, whatever its flags.

    Example:
        >>> one, options = torch.ones(1, 1), RouterOptions(1, 1, 1.0, 2.0)
        >>> compute(one, [Member(one, None, one, one, one)], options).outputs
        [tensor([[3.]])]
    """
    flat = x.reshape(-1, x.shape[-1])
    logits = router_scores(flat, [member.router for member in members])
    if options.temperature != 1:
        logits.mul_(1.0 / options.temperature)
    matures = None if all_mature else [m.mature for m in members if m.mature is not None]
    weights, statistics = route(logits, token_mask, matures, options)
    lora_as = [_as(member.lora_a, x.dtype) for member in members]
    lora_bs = [_as(member.lora_b, x.dtype) for member in members]
    outputs, mixed = [], []
    for member, lora_a, lora_b, own in zip(
        members, lora_as, lora_bs, _scaled(weights, options, x.dtype), strict=True
    ):
        read = flat if member.dropped is None else member.dropped.reshape(-1, x.shape[-1])
        product = wide_mm(read, lora_a.t())
        _by_expert(product, options).mul_(own)
        ranks = _as(product, x.dtype)
        mixed.append(ranks)
        outputs.append(
            with_update(
                x, flat, member.base_weight, member.bias, ranks, lora_b, is_conv1d=member.is_conv1d
            )
        )
    return _Computed(outputs, logits, weights, statistics, mixed, lora_as, lora_bs)


class RoutedLinearsEager(torch.autograd.Function):
    """See :func:`moelora.ops.routed.routed_linears`.

    The tensors are ``Member.differentiable`` of one member after the other; the results are all
    outputs, all statistics (or None), the logits and the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_mask: Tensor | None,
        members: Sequence[Member],
        options: RouterOptions,
        all_mature: bool,  # noqa: FBT001 - apply() takes no keywords
        *_tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Forward."""
        ctx.set_materialize_grads(False)
        first = members[0]
        ctx.options, ctx.shape = options, x.shape
        ctx.dtypes = (first.lora_a.dtype, first.lora_b.dtype, first.router.dtype)
        ctx.are_conv1d = [member.is_conv1d for member in members]
        found = compute(x, members, options, token_mask=token_mask, all_mature=all_mature)
        ctx.save_for_backward(
            x, found.logits, found.weights, token_mask, found.statistics,
            *(member.base_weight for member in members), *(member.router for member in members),
            *(member.dropped for member in members), *found.lora_as, *found.lora_bs, *found.mixed,
        )  # fmt: skip
        ctx.mark_non_differentiable(found.logits, found.weights)
        each: Sequence[Tensor | None] = [None] * len(members)
        if found.statistics is not None:
            each = found.statistics.unbind()
        return (*found.outputs, *each, found.logits, found.weights)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Backward."""
        number, options = len(ctx.are_conv1d), ctx.options
        x, logits, weights, token_mask, statistics, *rest = ctx.saved_tensors
        bases, routers, dropped, lora_as, lora_bs, mixed = (
            rest[start : start + number] for start in range(0, 6 * number, number)
        )
        needs = ctx.needs_input_grad
        x = x.reshape(-1, x.shape[-1])
        grads = output_gradients(gradients, lora_bs, x)
        results: list[Tensor | None] = [None] * (_FIRST_TENSOR + _TENSORS * number)
        places = range(_FIRST_TENSOR, len(results), _TENSORS)
        for index, place in enumerate(places):
            if needs[place + 1]:
                grad_b = wide_mm(grads[index].t(), mixed[index])
                results[place + 1] = _as(grad_b, ctx.dtypes[1])
        needs_routers = any(needs[place + 2] for place in places)
        others = any(needs[place] or needs[place + 3] for place in places)
        if not (needs[0] or needs_routers or others):
            return tuple(results)
        grad_ranks, shares = _ranks_gradients(grads, lora_bs, mixed, weights, options)
        scores = logits_gradient(
            shares, logits, weights, token_mask, statistics, gradients[number : 2 * number], options
        ).flatten(1)
        if needs_routers:
            grad_routers = _as(scores.t() @ _as(x, scores.dtype), ctx.dtypes[2])
            results[_FIRST_TENSOR + 2 :: _TENSORS] = grad_routers.split(options.num_experts)
        for index, place in enumerate(places):
            each = dropped[index]
            if needs[place]:
                read = x if each is None else each.reshape(x.shape)
                grad_a = wide_mm(grad_ranks[index].t(), read)
                results[place] = _as(grad_a, ctx.dtypes[0])
            if each is not None and needs[place + 3]:
                results[place + 3] = torch.mm(grad_ranks[index], lora_as[index]).view(ctx.shape)
        if dropped[0] is not None:
            grad_ranks = []
        if needs[0]:
            grad_x = _as(scores, x.dtype) @ _as(_stacked(routers), x.dtype)
            _add_input_gradients(grad_x, grads, bases, ctx.are_conv1d, grad_ranks, lora_as)
            results[0] = grad_x.view(ctx.shape)
        return tuple(results)


def _add_input_gradients(
    total: Tensor,
    grads: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    are_conv1d: Sequence[bool],
    grad_ranks: Sequence[Tensor],
    lora_as: Sequence[Tensor],
) -> None:
    """Add what comes through bases and A, member by member, as far as they are given."""
    for index, (grad, base) in enumerate(zip(grads, bases, strict=True)):
        if base is not None:
            total.addmm_(grad, base.t() if are_conv1d[index] else base)
        if grad_ranks:
            total.addmm_(grad_ranks[index], lora_as[index])


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; no call where nothing is to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def _scaled(weights: Tensor, options: RouterOptions, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What multiplies each member's ranks, ``(tokens, experts, 1)``, in the products' dtype."""
    wide = dtype if dtype is torch.float64 else torch.float32
    return _as(weights * options.scaling, wide).unsqueeze(-1).unbind(1)


def _by_expert(ranks: Tensor, options: RouterOptions) -> Tensor:
    """``(tokens, experts, rank)``, a view."""
    tokens, width = ranks.shape
    return ranks.view(tokens, options.num_experts, width // options.num_experts)


def _ranks_gradients(
    grads: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    mixed: Sequence[Tensor],
    weights: Tensor,
    options: RouterOptions,
) -> tuple[list[Tensor], Tensor]:
    """The gradient of each member's ``A x``, and what :func:`logits_gradient` calls shares."""
    grad_ranks, shares = [], []
    factors = _scaled(weights, options, mixed[0].dtype)
    for grad, lora_b, ranks, own in zip(grads, lora_bs, mixed, factors, strict=True):
        grad_mixed = wide_mm(grad, lora_b)
        shares.append(_by_expert(grad_mixed * ranks, options).sum(dim=-1))
        _by_expert(grad_mixed, options).mul_(own)
        grad_ranks.append(_as(grad_mixed, ranks.dtype))
    return grad_ranks, torch.stack(shares, dim=1)


def router_scores(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """``router x`` of each router in at least float32, ``(tokens, members, experts)``.

    Example:
        >>> router_scores(torch.ones(1, 2).bfloat16(), [torch.ones(1, 2)])
        tensor([[[2.]]])
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, routers[0].dtype), torch.float32)
    x = _as(x, dtype)
    scores = [x @ _as(router, dtype).t() for router in routers]
    return scores[0].unsqueeze(1) if len(scores) == 1 else torch.stack(scores, dim=1)


def route(
    logits: Tensor,
    token_mask: Tensor | None,
    matures: Sequence[Tensor] | None,
    options: RouterOptions,
) -> tuple[Tensor, Tensor | None]:
    """Routing weights and the statistics that the loss reads; no gradient.

    The functions of ``moelora.routing`` and ``moelora.losses`` in as few operations as there are.

    Args:
        logits: ``(tokens, members, experts)``.
        token_mask: ``(tokens,)`` or None.
        matures: ``(experts,)`` of each member; None or empty if all are.
        options: how the routers decide.

    Example:
        >>> options = RouterOptions(2, 1, 1.0, 1.0)
        >>> route(torch.tensor([[[0.0, 0.0]]]), None, None, options)[0]
        tensor([[[0.5000, 0.0000]]])
    """
    top, selected = logits.topk(options.top_k, dim=-1)
    loss_type, capacity_factor = options.loss_type, options.capacity_factor
    probs = logits
    if options.top_k == 1 or matures or loss_type in {"aux_loss", "switch"}:
        probs = logits.softmax(dim=-1)
    mask = None
    if token_mask is not None and (capacity_factor is not None or loss_type is not None):
        mask = token_mask.to(logits.dtype).view(-1, 1, 1)
    counted = logits
    if capacity_factor is not None or loss_type == "aux_loss":
        counted = torch.zeros_like(logits).scatter_(-1, selected, 1.0)
        counted = counted if mask is None else counted.mul_(mask)
    if capacity_factor is not None:
        weights = _limited(logits, probs, counted, mask, options)
    else:
        shares = probs.gather(-1, selected) if options.top_k == 1 else top.softmax(dim=-1)
        weights = torch.zeros_like(logits).scatter_(-1, selected, shares)
    if matures:
        weights = torch.where(torch.stack(tuple(matures)).all(-1, keepdim=True), weights, probs)
    if loss_type is None:
        return weights, None
    return weights, _statistics(logits, probs, counted, selected, mask, options)


def _limited(
    logits: Tensor, probs: Tensor, counted: Tensor, mask: Tensor | None, options: RouterOptions
) -> Tensor:
    """The weights where an expert serves its share of tokens only."""
    share = (options.capacity_factor or 0.0) * options.top_k / options.num_experts
    # a product that is a whole number but for rounding is that number
    if mask is None:
        capacity: Any = math.ceil(logits.shape[0] * share - _ROUNDING)
    else:
        capacity = (mask.sum() * share - _ROUNDING).ceil_()
    kept: Tensor = counted * (counted.cumsum(dim=0) <= capacity)
    if options.top_k == 1:
        return probs * kept
    lost = kept == 0
    return logits.masked_fill(lost, -math.inf).softmax(dim=-1).masked_fill_(lost, 0.0)


def _statistics(
    logits: Tensor,
    probs: Tensor,
    counted: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    options: RouterOptions,
) -> Tensor:
    """What the loss reads, in the layout of ``RoutedOutput.statistics``, member by member."""
    width = options.num_experts
    statistics = logits.new_zeros(logits.shape[1], 3 * width + 2)
    number: Any = max(1, logits.shape[0]) if mask is None else mask.sum().clamp_(min=1.0)
    if options.loss_type == "z_loss":
        squares = logits.logsumexp(dim=-1, keepdim=True).square_()
        squares = squares if mask is None else squares.mul_(mask)
        statistics[:, 3 * width] = squares.sum(dim=(0, 2)) / number
    else:
        statistics[:, :width] = (probs if mask is None else probs * mask).sum(dim=0) / number
        if options.loss_type == "switch":
            counted = torch.zeros_like(logits).scatter_(-1, selected[..., :1], 1.0)
            counted = counted if mask is None else counted.mul_(mask)
            statistics[:, 2 * width : 3 * width] = counted.sum(dim=0) / number
        else:
            statistics[:, width : 2 * width] = counted.sum(dim=0) / (number * options.top_k)
    statistics[:, -1] = number
    return statistics


def logits_gradient(
    shares: Tensor,
    logits: Tensor,
    weights: Tensor,
    token_mask: Tensor | None,
    statistics: Tensor | None,
    grad_statistics: Sequence[Tensor | None],
    options: RouterOptions,
) -> Tensor:
    """The gradient of the routers' scores, ``(tokens, members, experts)``.

    With ``q[e]`` the sum over the ranks of gradient times scaled rank, the logits' gradient is
    ``q - w sum(q)`` (``p`` instead of ``w`` for K = 1): no division by a weight.

    Args:
        shares: ``q``, ``(tokens, members, experts)``.
        logits: what the routers decided by, and all that follow.
        weights: ...
        token_mask: ...
        statistics: what the loss reads, or None.
        grad_statistics: its gradient for each member, or None.
        options: how the routers decide.

    Example:
        >>> q, w = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.5, 0.5]]])
        >>> logits_gradient(q, w.log(), w, None, None, [None], RouterOptions(2, 2, 1.0, 1.0))
        tensor([[[ 0.5000, -0.5000]]])
    """
    given = next((grad for grad in grad_statistics if grad is not None), None)
    has_statistics = statistics is not None and given is not None
    probs = logits.softmax(dim=-1) if options.top_k == 1 or has_statistics else weights
    part = probs if options.top_k == 1 else weights
    gradient = shares - part * shares.sum(dim=-1, keepdim=True)
    if statistics is not None and given is not None:
        width = options.num_experts
        pulls = torch.stack([torch.zeros_like(given) if g is None else g for g in grad_statistics])
        valid = 1.0 / statistics[0, -1]
        if token_mask is not None:
            valid = token_mask.to(logits.dtype).view(-1, 1, 1) * valid
        if options.loss_type == "z_loss":
            lse = logits.logsumexp(dim=-1, keepdim=True)
            gradient += probs * (lse * valid * (2.0 * pulls[:, 3 * width, None]))
        else:
            by_expert = pulls[:, :width]
            centred = by_expert - (probs * by_expert).sum(dim=-1, keepdim=True)
            gradient += probs * centred * valid
    return gradient.mul_(1.0 / options.temperature)
