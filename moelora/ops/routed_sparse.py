"""The same where most experts are not chosen: products with A and B of the chosen experts only.

``A x`` and the gradients of A and B are computed slot by slot, grouped by expert. The two products
that accumulate into a full-width tensor stay dense: gathering and scattering their rows would move
more than the matrix units take to multiply by zeros.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.ops.gradients import first_order, in_dtype, output_gradients
from moelora.ops.options import Member, RouterOptions
from moelora.ops.products import wide_mm
from moelora.ops.routed_triton import (
    BLOCK_M,
    FIRST_TENSOR,
    TENSORS,
    Sizes,
    input_gradient,
    launchers,
    outputs_of,
    pack,
    results_of,
    route,
    route_backward,
    sizes_of,
)


class RoutedLinearsSparse(torch.autograd.Function):
    """See :func:`moelora.ops.routed.routed_linears`. No expert may be young.

    Arguments and results are those of ``RoutedLinears``, but A reads the input itself; most of A is
    never packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_mask: Tensor | None,
        members: Sequence[Member],
        options: RouterOptions,
        _packer: Any,
        record: bool,  # noqa: FBT001 - apply() takes no keywords
        *_tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Forward."""
        ctx.set_materialize_grads(False)
        first, number = members[0], len(members)
        ranks, d_in = first.lora_a.shape
        ctx.members, ctx.options, ctx.shape = number, options, x.shape
        ctx.are_conv1d = [member.is_conv1d for member in members]
        ctx.dtypes = (first.lora_a.dtype, first.lora_b.dtype, first.router.dtype)
        ctx.sizes = sizes = sizes_of(ranks, options.num_experts, d_in, x.dtype, number)
        batched, x = x, x.reshape(-1, d_in)
        # the routers' rows alone
        alone = sizes_of(0, options.num_experts, d_in, x.dtype, number)
        rows, lora_bs = pack(
            x, [member._replace(lora_a=member.lora_a[:0]) for member in members], alone
        )
        width = slots_width(x.shape[0], options, sizes)
        slots = torch.empty(number, width, dtype=torch.int32, device=x.device)
        decision, _, statistics = route(
            wide_mm(x, rows.t()), token_mask, [None], options, alone, x.dtype, slots=slots
        )
        wide = x.new_zeros(number, x.shape[0], ranks)
        compacts = [
            _down(x, member.lora_a, own_slots, own, own_wide, options, sizes)
            for member, own_slots, own, own_wide in zip(members, slots, decision, wide, strict=True)
        ]
        outputs = outputs_of(batched, x, members, wide, lora_bs)
        ctx.save_for_backward(
            x, slots, decision, token_mask, statistics, *compacts, *lora_bs,
            *(m.base_weight for m in members), *(m.lora_a for m in members),
            *(m.router for m in members),
        )  # fmt: skip
        return results_of(ctx, outputs, statistics, decision if record else None)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Backward."""
        sizes, number, needs = ctx.sizes, ctx.members, ctx.needs_input_grad
        x, slots, decision, token_mask, statistics, *rest = ctx.saved_tensors
        compacts, lora_bs, weights, lora_as, routers = (
            rest[start : start + number] for start in range(0, 5 * number, number)
        )
        grads = [
            # the kernels gather rows of it
            grad.contiguous()
            for grad in output_gradients(gradients, lora_bs, x)
        ]
        results: list[Tensor | None] = [None] * (FIRST_TENSOR + TENSORS * number)
        places = range(FIRST_TENSOR, len(results), TENSORS)
        for index, place in enumerate(places):
            if needs[place + 1]:
                grad_b = torch.empty_like(lora_bs[index], dtype=ctx.dtypes[1])
                _outer(
                    grads[index], compacts[index], slots[index], grad_b, sizes,
                    strides=(1, sizes.ranks),
                )  # fmt: skip
                results[place + 1] = grad_b
        needs_rows = any(needs[place] or needs[place + 2] for place in places)
        if not (needs[0] or needs_rows):
            return tuple(results)
        grad_z = x.new_zeros(x.shape[0], sizes.grad_columns)
        shares = decision.new_zeros(number, x.shape[0], sizes.experts)
        grad_compacts = [
            _down_backward(
                grads[index], lora_bs[index], slots[index], decision[index], compacts[index],
                grad_z[:, index * sizes.padded_ranks :], shares[index], ctx.options, sizes,
            )
            for index in range(number)
        ]  # fmt: skip
        saved = (x, decision, token_mask, statistics)
        pulls = gradients[number : 2 * number]
        route_backward(shares.unbind(), saved, pulls, ctx.options, sizes, grad_z=grad_z)
        if needs_rows:
            grad_routers = wide_mm(grad_z[:, sizes.first_score :].t(), x)
            for index, place in enumerate(places):
                grad_a = torch.empty_like(lora_as[index])
                _outer(
                    x, grad_compacts[index], slots[index], grad_a, sizes, strides=(sizes.d_in, 1)
                )
                results[place] = grad_a
                own = grad_routers[index * sizes.padded_experts :][: sizes.experts]
                results[place + 2] = in_dtype(own, ctx.dtypes[2], sizes.experts)
        if needs[0]:
            parts = zip(weights, lora_as, lora_bs, routers, strict=True)
            members = [Member(weight, None, a, b, router) for weight, a, b, router in parts]
            used = pack(x, members, sizes)[0][: sizes.grad_columns]
            grad_x = input_gradient(grads, weights, ctx.are_conv1d, grad_z, used)
            results[0] = grad_x.view(ctx.shape)
        return tuple(results)


def slots_width(tokens: int, options: RouterOptions, sizes: Sizes) -> int:
    """Room for every expert's first slot and number of tokens, and the token of each slot.

    Args:
        tokens: of the input; may be symbolic.
        options: how the routers decide.
        sizes: of the layer.
    """
    # as many slots as choices, and every segment rounded up to whole blocks
    number = -(-tokens * options.top_k // BLOCK_M) * BLOCK_M + options.num_experts * BLOCK_M
    return 2 * sizes.experts_block + number


def compact_rows(width: int, sizes: Sizes) -> int:
    """Slots for which ranks are kept, where :func:`slots_width` is ``width``."""
    return _blocks(width, sizes) * BLOCK_M


def _blocks(width: int, sizes: Sizes) -> int:
    return (width - 2 * sizes.experts_block) // BLOCK_M


def _block_k(dtype: torch.dtype) -> int:
    # measured on an H100, 4096 tokens, 64 experts: 128 took 18 and 53 us for 2048 and 8192
    # features, 64 took 21 and 64
    return 128 if dtype == torch.bfloat16 else 32


def _rank_block(sizes: Sizes) -> int:
    """The matrix units multiply no less than 16 columns."""
    return max(16, sizes.rank_block)


def _down(
    x: Tensor,
    lora_a: Tensor,
    slots: Tensor,
    decision: Tensor,
    wide: Tensor,
    options: RouterOptions,
    sizes: Sizes,
) -> Tensor:
    """Each slot's scaled ranks, and in ``wide`` the same in their place among all ranks."""
    tokens = x.shape[0]
    blocks = _blocks(slots.shape[0], sizes)
    compact = x.new_empty(blocks * BLOCK_M, sizes.rank)
    x = x.contiguous()
    launchers().down(
        (blocks, 1, 1),
        (*sizes.key, lora_a.dtype, x.dtype, x.device),
        (
            x, lora_a, slots, decision, compact, wide, tokens, sizes.d_in, sizes.experts,
            sizes.rank, sizes.ranks, x.stride(0), options.scaling, sizes.experts_block,
            _rank_block(sizes), BLOCK_M, _block_k(x.dtype),
        ),
        aligned=launchers().is_aligned(x, lora_a),
    )  # fmt: skip
    return compact


def _down_backward(
    grad: Tensor,
    lora_b: Tensor,
    slots: Tensor,
    decision: Tensor,
    compact: Tensor,
    grad_z: Tensor,
    shares: Tensor,
    options: RouterOptions,
    sizes: Sizes,
) -> Tensor:
    """The gradient of ``A x`` slot by slot; in ``grad_z`` too, and in ``shares`` each ``q``."""
    tokens, d_out = grad.shape
    grad_compact = torch.empty_like(compact)
    launchers().down_backward(
        (_blocks(slots.shape[0], sizes), 1, 1),
        (*sizes.key, d_out, lora_b.dtype, grad.dtype, grad.device),
        (
            grad, lora_b, slots, decision, compact, grad_compact, grad_z, shares, tokens, d_out,
            sizes.experts, sizes.rank, sizes.ranks, grad.stride(0), sizes.grad_columns,
            options.scaling, sizes.experts_block, _rank_block(sizes), BLOCK_M, _block_k(grad.dtype),
        ),
        aligned=launchers().is_aligned(grad, lora_b),
    )  # fmt: skip
    return grad_compact


def _outer(
    rows: Tensor,
    compact: Tensor,
    slots: Tensor,
    output: Tensor,
    sizes: Sizes,
    *,
    strides: tuple[int, int],
) -> None:
    """Each expert's sum of ``rows[token] x compact[slot]``, written to its part of ``output``.

    Args:
        rows: ``(tokens, width)``.
        compact: ``(slots, rank)``.
        slots: which tokens.
        output: A's or B's gradient.
        sizes: of the layer.
        strides: of ``output`` along the ranks and along the columns of ``rows``.
    """
    width = rows.shape[1]
    block_n = 128 if _rank_block(sizes) <= 32 else 64
    rows = rows.contiguous()
    launchers().outer_backward(
        (sizes.experts, -(-width // block_n), 1),
        (*sizes.key, width, strides, output.dtype, rows.dtype, rows.device),
        (
            rows, compact, slots, output, width, sizes.rank, rows.stride(0), *strides,
            sizes.experts_block, _rank_block(sizes), BLOCK_M, block_n,
        ),
        aligned=launchers().is_aligned(rows),
    )  # fmt: skip
