"""The same where most experts are not chosen: products with A and B of the chosen experts only.

``A x`` and the gradients of A and B are computed slot by slot, grouped by expert. The two products
that accumulate into a full-width tensor stay dense: gathering and scattering their rows would move
more than the matrix units take to multiply by zeros.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.options import Member, RouterOptions
from moelora.ops.products import wide_mm
from moelora.ops.routed_triton import (
    BLOCK_M,
    Sizes,
    accumulate,
    input_gradient,
    launchers,
    pack,
    route,
    route_backward,
    sizes_of,
)


class RoutedLinearSparse(torch.autograd.Function):
    """See :func:`moelora.ops.routed.routed_linear`. No expert may be young."""

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
        options: RouterOptions,
        is_conv1d: bool,  # noqa: FBT001 - apply() takes no keywords
    ) -> tuple[Tensor | None, ...]:
        """Forward."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.is_conv1d, ctx.shape = options, is_conv1d, x.shape
        ctx.dtypes = (lora_a.dtype, lora_b.dtype, router.dtype)
        ctx.sizes = sizes = sizes_of(lora_a.shape[0], options.num_experts, lora_a.shape[1], x.dtype)
        x = x.reshape(-1, x.shape[-1])
        lora_b = lora_b.to(x.dtype)
        # the router's rows alone
        alone = sizes_of(0, options.num_experts, lora_a.shape[1], x.dtype)
        member = Member(base_weight, bias, lora_a[:0], lora_b, router)
        rows, _ = pack(x, [member], alone)
        slots = _new_slots(x.shape[0], options, sizes, x.device)
        decision, _, statistics = route(
            wide_mm(x, rows.t()), token_mask, [None], options, alone, x.dtype, slots=slots
        )
        compact, wide = _down(x, lora_a, slots, decision, options, sizes)
        output = accumulate(x, base_weight, bias, wide, lora_b, is_conv1d=is_conv1d)
        ctx.save_for_backward(
            x, base_weight, lora_a, router, lora_b, compact, slots, decision, token_mask, statistics
        )
        ctx.mark_non_differentiable(decision)
        if statistics is not None:
            statistics = statistics[0]
        return output.view(*ctx.shape[:-1], output.shape[-1]), statistics, decision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Backward."""
        x, base_weight, lora_a, router, lora_b, compact, slots, *decided = ctx.saved_tensors
        decision, token_mask, statistics = decided
        needs_x, _, _, needs_a, needs_b, needs_router = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_b = grad_router = None
        sizes = ctx.sizes
        if grad is None:
            grad = x.new_zeros(x.shape[0], lora_b.shape[0])
        # the kernels gather rows of it
        grad = grad.reshape(-1, lora_b.shape[0]).contiguous()
        if needs_b:
            grad_b = torch.empty_like(lora_b, dtype=ctx.dtypes[1])
            _outer(grad, compact, slots, grad_b, sizes, strides=(1, sizes.ranks))
        if needs_x or needs_a or needs_router:
            grad_z, grad_compact, shares = _down_backward(
                grad, lora_b, slots, decision, compact, ctx.options, sizes
            )
            saved = (compact, decision, token_mask, statistics)
            route_backward([shares], saved, [grad_statistics], ctx.options, sizes, grad_z=grad_z)
            if needs_a:
                grad_a = torch.empty_like(lora_a)
                _outer(x, grad_compact, slots, grad_a, sizes, strides=(sizes.d_in, 1))
            if needs_router:
                scores = grad_z[:, sizes.padded_ranks :]
                grad_router = wide_mm(scores.t(), x)[: sizes.experts].to(ctx.dtypes[2])
            if needs_x:
                member = Member(base_weight, None, lora_a, lora_b, router)
                used = pack(x, [member], sizes)[0][: sizes.grad_columns]
                flat = input_gradient([grad], [base_weight], [ctx.is_conv1d], grad_z, used)
                grad_x = flat.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_router, None, None, None


def _new_slots(tokens: int, options: RouterOptions, sizes: Sizes, device: torch.device) -> Tensor:
    """Room for every expert's first slot and number of tokens, and the token of each slot."""
    # as many slots as choices, and every segment rounded up to whole blocks
    number = -(-tokens * options.top_k // BLOCK_M) * BLOCK_M + options.num_experts * BLOCK_M
    return torch.empty(2 * sizes.experts_block + number, dtype=torch.int32, device=device)


def _blocks(slots: Tensor, sizes: Sizes) -> int:
    return (slots.shape[0] - 2 * sizes.experts_block) // BLOCK_M


def _block_k(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.bfloat16 else 32


def _rank_block(sizes: Sizes) -> int:
    """The matrix units multiply no less than 16 columns."""
    return max(16, sizes.rank_block)


def _down(
    x: Tensor,
    lora_a: Tensor,
    slots: Tensor,
    decision: Tensor,
    options: RouterOptions,
    sizes: Sizes,
) -> tuple[Tensor, Tensor]:
    """Each slot's scaled ranks, and the same in their place among all ranks of their token."""
    tokens = x.shape[0]
    blocks = _blocks(slots, sizes)
    compact = x.new_empty(blocks * BLOCK_M, sizes.rank)
    wide = x.new_zeros(tokens, sizes.ranks)
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
    return compact, wide


def _down_backward(
    grad: Tensor,
    lora_b: Tensor,
    slots: Tensor,
    decision: Tensor,
    compact: Tensor,
    options: RouterOptions,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``A x`` among all ranks and slot by slot, and each expert's ``q``."""
    tokens, d_out = grad.shape
    grad_z = grad.new_zeros(tokens, sizes.grad_columns)
    grad_compact = torch.empty_like(compact)
    shares = decision.new_zeros(tokens, sizes.experts)
    launchers().down_backward(
        (_blocks(slots, sizes), 1, 1),
        (*sizes.key, d_out, lora_b.dtype, grad.dtype, grad.device),
        (
            grad, lora_b, slots, decision, compact, grad_compact, grad_z, shares, tokens, d_out,
            sizes.experts, sizes.rank, sizes.ranks, grad.stride(0), sizes.grad_columns,
            options.scaling, sizes.experts_block, _rank_block(sizes), BLOCK_M, _block_k(grad.dtype),
        ),
        aligned=launchers().is_aligned(grad, lora_b),
    )  # fmt: skip
    return grad_z, grad_compact, shares


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
