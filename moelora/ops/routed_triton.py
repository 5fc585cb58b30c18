"""Linear layers routed by their own routers, on the kernels of ``triton_kernels``.

One product gives ``A x`` and the router's scores; one kernel routes and scales (two in training,
where capacity and statistics need sums over all tokens); one product accumulates the update into
the base output. Backward is one kernel between the same products. Layers that read the same input
(query, key and value; gate and up) share all of it but the products with base weights and B.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.ops.gradients import first_order, in_dtype, output_gradients
from moelora.ops.options import Member, RouterOptions
from moelora.ops.products import base_gradient, update_first, wide_mm, with_update

#: Slots of one expert that are multiplied together where only chosen experts are.
BLOCK_M = 32
#: Layers that may share one input's work: the kernels take so many pointers.
MAX_MEMBERS = 3
#: Where the first member's tensors stand among the autograd functions' arguments, and how many each
#: member has.
FIRST_TENSOR, TENSORS = 6, 4


class Sizes:
    """Sizes of a layer's packed rows and of the kernels' blocks, worked out once per shape."""

    def __init__(
        self, ranks: int, experts: int, d_in: int, *, members: int, is_split: bool
    ) -> None:
        self.ranks, self.experts, self.d_in, self.members = ranks, experts, d_in, members
        self.is_split = is_split
        self.splits = 3 if is_split else 1
        self.rank = ranks // experts
        self.padded_ranks = _eights(ranks)
        self.padded_experts = _eights(experts)
        # A of one member after the other, then the leading parts of their scores, then the others
        self.first_score = members * self.padded_ranks
        self.grad_columns = self.first_score + members * self.padded_experts
        self.rows = self.first_score + self.splits * members * self.padded_experts
        #: of the gradient columns
        self.parts = [self.padded_ranks] * members + [self.padded_experts] * members
        # at least the padded experts, whose gradients have to be written as zeros
        self.experts_block = max(8, _power_of_two(experts))
        self.rank_block = _power_of_two(self.rank) if self.rank else 0
        self.statistics = 3 * self.experts_block + 2
        self.block = 1024
        self.row_programs = self.rows * -(-d_in // self.block)
        self.backward_tokens = max(1, 4096 // (self.experts_block * max(1, self.rank_block)))
        self.ranks_block = min(128, _power_of_two(max(8, self.padded_ranks)))
        self.sums_block = max(1, min(64, 4096 // self.experts_block))
        self.key = (ranks, experts, d_in, members, is_split)

    def tokens_block(self, tokens: int) -> int:
        """Tokens per program: enough programs for the device, few enough partial sums to add."""
        wanted = 32 if tokens <= 8192 else 64 if tokens <= 32768 else 128
        return max(1, min(wanted, 2048 // self.experts_block))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _eights(number: int) -> int:
    return -(-number // 8) * 8


@functools.lru_cache(maxsize=1024)
def sizes_of(ranks: int, experts: int, d_in: int, dtype: torch.dtype, members: int = 1) -> Sizes:
    """The sizes of layers that share an input; with no ranks those of their routers alone."""
    return Sizes(ranks, experts, d_in, members=members, is_split=dtype != torch.float32)


def three(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    """One argument per possible member; those that are not there repeat the first."""
    return (*items, items[0], items[0])[:3]


@functools.cache
def launchers() -> Any:
    """The kernels, imported when first used: Triton is slow to import and not everywhere."""
    from moelora.ops import launchers as module

    return module


def pack(x: Tensor, members: Sequence[Member], sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
    """A and the routers' rows as one matrix, and each B, all in the dtype of the input."""
    rows = x.new_empty(sizes.rows, sizes.d_in)
    first = members[0]
    lora_bs = [member.lora_b for member in members]
    numels, b_programs, outs = (0, 0, 0), 0, lora_bs
    if first.lora_b.dtype != x.dtype:
        outs = [torch.empty_like(lora_b, dtype=x.dtype) for lora_b in lora_bs]
        numels = three([lora_b.numel() for lora_b in lora_bs])
        b_programs = -(-max(numels) // sizes.block)
    lora_as, routers = [m.lora_a for m in members], [m.router for m in members]
    kernels = launchers()
    kernels.pack(
        (sizes.row_programs + len(members) * b_programs, 1, 1),
        (*sizes.key, first.lora_a.dtype, first.lora_b.dtype, first.router.dtype, x.dtype, x.device),
        (
            *three(lora_as), *three(routers), *three(lora_bs), rows, *three(outs), sizes.d_in,
            sizes.ranks, sizes.padded_ranks, sizes.experts, sizes.padded_experts,
            sizes.row_programs, b_programs, *numels, sizes.members, sizes.is_split, sizes.block,
        ),
        aligned=kernels.is_aligned(*lora_as, *routers, *lora_bs),
    )  # fmt: skip
    return rows, outs


def route(
    z: Tensor,
    token_mask: Tensor | None,
    matures: Sequence[Tensor | None],
    options: RouterOptions,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and weights, scaled ranks, and statistics of all tokens, member by member.

    Args:
        z: what the packed rows gave.
        token_mask: True for real tokens, or None.
        matures: which experts of each member are, or None.
        options: how the routers decide.
        sizes: of the packed rows.
        dtype: of the scaled ranks.
        slots: ``(members, ...)``, where to enter each expert's tokens; no ranks are scaled then.

    Returns:
        ``(members, 2, tokens, experts)``, ``(members, tokens, ranks)``, ``(members, ...)`` or None.
    """
    tokens, experts, members = z.shape[0], sizes.experts, sizes.members
    block_t, block_e = sizes.tokens_block(tokens), sizes.experts_block
    blocks = max(1, -(-tokens // block_t))
    decision = z.new_empty(members, 2, tokens, experts)
    mixed = z if slots is not None else z.new_empty(members, tokens, sizes.ranks, dtype=dtype)
    capacity = options.capacity_factor
    has_capacity, has_statistics = capacity is not None, options.loss_type is not None
    has_mask, has_mature = token_mask is not None, matures[0] is not None
    statistics = z.new_empty(members, sizes.statistics) if has_statistics else None
    partial = z
    mask = z if token_mask is None else token_mask
    inverse = 1.0 / options.temperature
    place = (z.stride(0), sizes.padded_ranks, sizes.padded_experts)
    key = (*sizes.key, options.top_k, block_t, has_mask, z.device)
    kernels = launchers()
    if has_capacity or has_statistics or slots is not None:
        partial = z.new_empty(members, blocks, sizes.statistics)
        kernels.count(
            (blocks, members, 1),
            key,
            (
                z, mask, partial, tokens, experts, *place, inverse,
                options.top_k, block_e, sizes.splits, has_mask, block_t, members,
            ),
        )  # fmt: skip
    kernels.route(
        (blocks, members, 1),
        (*key, dtype, has_mature, has_capacity, has_statistics, slots is not None),
        (
            z, mask, *(three(matures) if has_mature else (z, z, z)), partial, decision, mixed,
            z if statistics is None else statistics, z if slots is None else slots,
            tokens, experts, sizes.rank, sizes.ranks, *place,
            0 if slots is None else slots.stride(0), blocks, inverse,
            0.0 if capacity is None else capacity * options.top_k / experts, options.scaling,
            options.top_k, block_e, sizes.splits, has_mask, has_mature, has_capacity,
            has_statistics, block_t, sizes.ranks_block, sizes.sums_block,
            0 if slots is None else BLOCK_M, members,
        ),
    )  # fmt: skip
    return decision, mixed, statistics


def route_backward(
    grad_mixed: Sequence[Tensor],
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grad_statistics: Sequence[Tensor | None],
    options: RouterOptions,
    sizes: Sizes,
    *,
    grad_z: Tensor | None = None,
) -> Tensor:
    """The gradient of ``A x`` and of the routers' scores, in the dtype of the input.

    Args:
        grad_mixed: the gradient of each member's scaled ranks; or ``q``, with ``grad_z``.
        saved: scaled ranks, decision, token mask and statistics.
        grad_statistics: their gradient for each member, or None.
        options: how the routers decide.
        sizes: of the packed rows.
        grad_z: what holds the gradient of ``A x`` already and lacks that of the scores.

    Returns:
        ``(tokens, columns)``, the columns those of the packed rows without the later parts.
    """
    mixed, decision, token_mask, statistics = saved
    tokens = decision.shape[2]
    has_shares = grad_z is not None
    if grad_z is None:
        grad_z = mixed.new_empty(tokens, sizes.grad_columns)
    pulls: tuple[Any, Any, Any] = (decision, decision, decision)
    has_statistics = False
    if statistics is not None:
        given = next((grad for grad in grad_statistics if grad is not None), None)
        if given is not None:
            has_statistics = True
            pulls = three(
                [
                    given.new_zeros(given.shape) if g is None else g.contiguous()
                    for g in grad_statistics
                ]
            )
    has_mask = token_mask is not None
    block_t = sizes.backward_tokens
    launchers().route_backward(
        (-(-tokens // block_t), sizes.members, 1),
        (*sizes.key, options.top_k, mixed.dtype, has_mask, has_statistics, has_shares,
         mixed.device),
        (
            *three(grad_mixed), mixed, decision, decision if token_mask is None else token_mask,
            statistics if has_statistics else decision, *pulls,
            grad_z, tokens, sizes.experts, sizes.rank, sizes.ranks, sizes.padded_ranks,
            sizes.padded_experts, sizes.grad_columns, 1.0 / options.temperature, options.scaling,
            options.top_k, sizes.experts_block, sizes.rank_block, has_mask, has_statistics, block_t,
            has_shares, sizes.members,
        ),
    )  # fmt: skip
    return grad_z


def input_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    are_conv1d: Sequence[bool],
    grad_z: Tensor,
    rows: Tensor,
) -> Tensor:
    """The gradient of the input through bases and updates, in the order that passes less over it.

    Args:
        grads: of each member's output, ``(tokens, d_out)``.
        weights: each member's base; None for all, if the bases compute themselves.
        are_conv1d: which of them are a ``Conv1D``'s.
        grad_z: of the packed products.
        rows: the packed rows.
    """
    bases = [
        weight.t() if is_conv1d else weight
        for weight, is_conv1d in zip(weights, are_conv1d, strict=True)
        if weight is not None
    ]
    if not bases:
        return torch.mm(grad_z, rows)
    if grads[0].is_cuda and update_first(bases[0].t(), None, is_conv1d=False):
        total = torch.mm(grad_z, rows)
        for grad, base in zip(grads, bases, strict=True):
            total.addmm_(grad, base)
        return total
    total = base_gradient(grads[0], bases[0], is_conv1d=False)
    for grad, base in zip(grads[1:], bases[1:], strict=True):
        total.addmm_(grad, base)
    return total.addmm_(grad_z, rows)


def results_of(
    ctx: Any, outputs: Sequence[Tensor], statistics: Tensor | None, decision: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What an autograd function returns: all outputs, all statistics, and the decision."""
    each: Sequence[Tensor | None] = [None] * len(outputs)
    if statistics is not None:
        each = statistics.unbind()
    if decision is not None:
        ctx.mark_non_differentiable(decision)
    return (*outputs, *each, decision)


class RoutedLinears(torch.autograd.Function):
    """See :func:`moelora.ops.routed.routed_linears`.

    The tensors are ``Member.differentiable`` of one member after the other; ``packer`` is
    :func:`pack` or does the same. The results are all outputs, all statistics (or None), and
    the decisions (None unless ``record``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_mask: Tensor | None,
        members: Sequence[Member],
        options: RouterOptions,
        packer: Callable[..., tuple[Tensor, list[Tensor]]],
        record: bool,  # noqa: FBT001 - apply() takes no keywords
        *_tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Forward."""
        ctx.set_materialize_grads(False)
        first = members[0]
        ctx.options, ctx.shape = options, x.shape
        ctx.are_conv1d = [member.is_conv1d for member in members]
        ctx.dtypes = (first.lora_a.dtype, first.lora_b.dtype, first.router.dtype)
        ctx.sizes = sizes = sizes_of(
            first.lora_a.shape[0], options.num_experts, x.shape[-1], x.dtype, len(members)
        )
        flat = x.reshape(-1, x.shape[-1])
        rows, lora_bs = packer(flat, members, sizes)
        dropped: list[Tensor] = []
        if first.dropped is None:
            z = wide_mm(flat, rows.t())
        else:
            dropped = _flattened(members, x.shape[-1])
            own_rows = _own_rows(rows, sizes)
            parts = [wide_mm(each, own.t()) for each, own in zip(dropped, own_rows, strict=False)]
            z = torch.cat([*parts, wide_mm(flat, own_rows[-1].t())], dim=1)
        matures = [member.mature for member in members]
        decision, mixed, statistics = route(z, token_mask, matures, options, sizes, x.dtype)
        outputs = outputs_of(x, flat, members, mixed, lora_bs)
        weights = [member.base_weight for member in members]
        ctx.save_for_backward(
            flat, rows, mixed, decision, token_mask, statistics, *weights, *lora_bs, *dropped
        )
        return results_of(ctx, outputs, statistics, decision if record else None)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Backward."""
        sizes, number = ctx.sizes, ctx.sizes.members
        x, rows, *rest = ctx.saved_tensors
        saved, weights, lora_bs, dropped = (
            rest[:4], rest[4 : 4 + number], rest[4 + number : 4 + 2 * number],
            rest[4 + 2 * number :],
        )  # fmt: skip
        needs = ctx.needs_input_grad
        grads = output_gradients(gradients, lora_bs, x)
        results: list[Tensor | None] = [None] * (FIRST_TENSOR + TENSORS * number)
        places = range(FIRST_TENSOR, len(results), TENSORS)
        for place, grad, mixed in zip(places, grads, saved[0].unbind(), strict=True):
            if needs[place + 1]:
                grad_b = wide_mm(grad.t(), mixed)
                results[place + 1] = in_dtype(grad_b, ctx.dtypes[1], grad_b.shape[0])
        needs_rows = any(needs[FIRST_TENSOR::TENSORS]) or any(needs[FIRST_TENSOR + 2 :: TENSORS])
        if not (needs[0] or needs_rows or any(needs[FIRST_TENSOR + 3 :: TENSORS])):
            return tuple(results)
        grad_mixed = [wide_mm(grad, lora_b) for grad, lora_b in zip(grads, lora_bs, strict=True)]
        grad_z = route_backward(
            grad_mixed, saved, gradients[number : 2 * number], ctx.options, sizes
        )
        if needs_rows:
            parts = _row_gradients(grad_z, x, dropped, sizes)
            for place, grad_a, grad_router in zip(
                places, parts[:number], parts[number:], strict=True
            ):
                results[place] = in_dtype(grad_a, ctx.dtypes[0], sizes.ranks)
                results[place + 2] = in_dtype(grad_router, ctx.dtypes[2], sizes.experts)
        # the leading bits of the router's rows are all that the dtype of x can hold
        used = rows[: sizes.grad_columns]
        if dropped:
            *own_grads, grad_z = grad_z.split_with_sizes(_own_sizes(sizes), dim=1)
            *own_rows, used = _own_rows(used, sizes)
            for place, own_grad, own in zip(places, own_grads, own_rows, strict=True):
                if needs[place + 3]:
                    results[place + 3] = torch.mm(own_grad, own).view(ctx.shape)
        if needs[0]:
            results[0] = input_gradient(grads, weights, ctx.are_conv1d, grad_z, used).view(
                ctx.shape
            )
        return tuple(results)


def _flattened(members: Sequence[Member], d_in: int) -> list[Tensor]:
    """What each member's A reads after dropout, ``(tokens, d_in)``."""
    return [m.dropped.reshape(-1, d_in) for m in members if m.dropped is not None]


def _own_sizes(sizes: Sizes) -> list[int]:
    """Columns of each member's A, then of all their scores, as the gradients have them."""
    return [sizes.padded_ranks] * sizes.members + [sizes.grad_columns - sizes.first_score]


def _own_rows(rows: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Each member's A, then the rows of all routers that are left."""
    ends = [index * sizes.padded_ranks for index in range(1, sizes.members + 1)]
    return rows.tensor_split(ends)


def _row_gradients(
    grad_z: Tensor, x: Tensor, dropped: Sequence[Tensor], sizes: Sizes
) -> Sequence[Tensor]:
    """The gradients of each member's A, then of each one's router, padded."""
    if not dropped:
        return wide_mm(grad_z.t(), x).split_with_sizes(sizes.parts)
    *own_grads, scores = grad_z.split_with_sizes(_own_sizes(sizes), dim=1)
    own = [wide_mm(grad.t(), each) for grad, each in zip(own_grads, dropped, strict=True)]
    return *own, *wide_mm(scores.t(), x).split(sizes.padded_experts)


def outputs_of(
    x: Tensor,
    flat: Tensor,
    members: Sequence[Member],
    mixed: Tensor,
    lora_bs: Sequence[Tensor],
) -> list[Tensor]:
    """Each member's output, of the shape of the input but for its last axis.

    Args:
        x: ``(*batch, d_in)``.
        flat: the same, ``(tokens, d_in)``.
        members: the layers.
        mixed: ``(members, tokens, ranks)``, scaled.
        lora_bs: each layer's B in the dtype of the input.
    """
    return [
        with_update(
            x, flat, member.base_weight, member.bias, ranks, lora_b, is_conv1d=member.is_conv1d
        )
        for member, ranks, lora_b in zip(members, mixed.unbind(), lora_bs, strict=True)
    ]


def decode(
    x: Tensor,
    outputs: Sequence[Tensor],
    members: Sequence[Member],
    options: RouterOptions,
    *,
    record: bool,
    is_sparse: bool,
) -> Tensor | None:
    """Route few tokens and add each member's update to its output in place.

    Args:
        x: ``(tokens, d_in)``.
        outputs: ``(*batch, d_out)`` each, contiguous, what the bases gave.
        members: the layers.
        options: how the routers decide.
        record: whether the decision is wanted, ``(members, 2, tokens, experts)``.
        is_sparse: read A of the chosen experts only, after the scores are known: one kernel more,
            and for many experts less memory to read. No expert may be young.
    """
    first, number = members[0], len(members)
    lora_as, routers = [m.lora_a for m in members], [m.router for m in members]
    lora_bs, matures = [m.lora_b for m in members], [m.mature for m in members]
    if routers[0].dtype != lora_as[0].dtype:
        routers = [router.to(lora_as[0].dtype) for router in routers]
    tokens, (ranks, d_in) = x.shape[0], first.lora_a.shape
    widths = [lora_b.shape[0] for lora_b in lora_bs]
    experts, top_k = options.num_experts, options.top_k
    rank, experts_block = ranks // experts, _power_of_two(experts)
    z = x.new_empty(tokens, number * (ranks + experts), dtype=torch.float32)
    decision = z.new_empty(number, 2, tokens, experts) if record else None
    block_t = _power_of_two(tokens)
    block = min(_power_of_two(d_in), 4096 // block_t)
    first_row = ranks if is_sparse else 0
    kernels = launchers()
    aligned = kernels.is_aligned(x, *lora_as, *routers)
    key = (ranks, experts, d_in, number, lora_as[0].dtype, x.dtype, x.stride(0), x.device)
    kernels.scores(
        (ranks + experts - first_row, number, 1),
        (*key, first_row, block_t),
        (
            x, *three(lora_as), *three(routers), z, tokens, d_in, experts, ranks, first_row,
            x.stride(0), z.stride(0), block_t, block, number,
        ),
        aligned=aligned,
    )  # fmt: skip
    if is_sparse:
        kernels.chosen(
            (tokens, top_k * rank, number),
            (*key, top_k),
            (
                x, *three(lora_as), z, d_in, experts, rank, ranks, x.stride(0), z.stride(0), top_k,
                experts_block, min(_power_of_two(d_in), 4096), number,
            ),
            aligned=aligned,
        )  # fmt: skip
    has_mature = matures[0] is not None and not is_sparse
    block_r = _power_of_two(rank)
    block_n = max(16, min(64, 1024 // block_r))
    kernels.decode(
        (tokens, -(-max(widths) // block_n), number),
        (
            ranks, experts, number, top_k, lora_bs[0].dtype, x.dtype, has_mature, record, x.device,
        ),
        (
            z, *(three(matures) if has_mature else (z, z, z)), *three(lora_bs), *three(outputs),
            z if decision is None else decision, tokens, *three(widths), experts, rank, ranks,
            z.stride(0), 1.0 / options.temperature, options.scaling, top_k, experts_block, block_r,
            has_mature, record, block_n, number,
        ),
        aligned=kernels.is_aligned(*lora_bs, *outputs),
    )  # fmt: skip
    return decision
