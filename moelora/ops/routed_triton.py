"""A linear layer routed by its own router, on the kernels of ``triton_kernels``.

One product gives ``A x`` and the router's scores; one kernel routes and scales (two in training,
where capacity and statistics need sums over all tokens); one product accumulates the update into
the base output. Backward is one kernel between the same products.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.options import RouterOptions
from moelora.ops.products import base_gradient, base_product, update_first, wide_mm

#: Slots of one expert that are multiplied together where only chosen experts are.
BLOCK_M = 32


class Sizes:
    """Sizes of a layer's packed rows and of the kernels' blocks, worked out once per shape."""

    def __init__(self, ranks: int, experts: int, d_in: int, *, is_split: bool) -> None:
        self.ranks, self.experts, self.d_in = ranks, experts, d_in
        self.is_split = is_split
        self.splits = 3 if is_split else 1
        self.rank = ranks // experts
        self.padded_ranks = _eights(ranks)
        self.padded_experts = _eights(experts)
        self.rows = self.padded_ranks + self.splits * self.padded_experts
        self.grad_columns = self.padded_ranks + self.padded_experts
        # at least the padded experts, whose gradients have to be written as zeros
        self.experts_block = max(8, _power_of_two(experts))
        self.rank_block = _power_of_two(self.rank) if self.rank else 0
        self.statistics = 3 * self.experts_block + 2
        self.block = 1024
        self.row_programs = self.rows * -(-d_in // self.block)
        self.backward_tokens = max(1, 4096 // (self.experts_block * max(1, self.rank_block)))
        self.key = (ranks, experts, d_in, is_split)

    def tokens_block(self, tokens: int) -> int:
        """Tokens per program: enough programs for the device, few enough partial sums to add."""
        wanted = 32 if tokens <= 8192 else 64 if tokens <= 32768 else 128
        return max(1, min(wanted, 2048 // self.experts_block))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _eights(number: int) -> int:
    return -(-number // 8) * 8


@functools.lru_cache(maxsize=1024)
def sizes_of(ranks: int, experts: int, d_in: int, dtype: torch.dtype) -> Sizes:
    """The sizes of a layer; with no ranks those of its router alone."""
    return Sizes(ranks, experts, d_in, is_split=dtype != torch.float32)


@functools.cache
def launchers() -> Any:
    """The kernels, imported when first used: Triton is slow to import and not everywhere."""
    from moelora.ops import launchers as module

    return module


def pack(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, router: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """A and the router's rows as one matrix, and B, all in the dtype of the input."""
    rows = x.new_empty(sizes.rows, sizes.d_in)
    same = lora_b.dtype == x.dtype
    b_out = lora_b if same else torch.empty_like(lora_b, dtype=x.dtype)
    numel = 0 if same else lora_b.numel()
    kernels = launchers()
    kernels.pack(
        (sizes.row_programs + -(-numel // sizes.block),),
        (*sizes.key, lora_a.dtype, lora_b.dtype, router.dtype, x.dtype, x.device, numel),
        (
            lora_a, router, lora_b, rows, b_out, sizes.d_in, sizes.ranks, sizes.padded_ranks,
            sizes.experts, sizes.padded_experts, sizes.row_programs, numel, sizes.is_split,
            sizes.block,
        ),
        aligned=kernels.is_aligned(lora_a, lora_b, router),
    )  # fmt: skip
    return rows, b_out


def route(
    z: Tensor,
    token_mask: Tensor | None,
    mature: Tensor | None,
    options: RouterOptions,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and weights, scaled ranks, and statistics of all tokens.

    Args:
        z: what the packed rows gave.
        token_mask: True for real tokens, or None.
        mature: which experts are, or None.
        options: how the router decides.
        sizes: of the packed rows.
        dtype: of the scaled ranks.
        slots: where to enter each expert's tokens; no ranks are scaled then.
    """
    tokens, experts = z.shape[0], sizes.experts
    block_t, block_e = sizes.tokens_block(tokens), sizes.experts_block
    blocks = max(1, -(-tokens // block_t))
    decision = z.new_empty(2, tokens, experts)
    mixed = z.new_empty(tokens, sizes.ranks, dtype=dtype)
    capacity = options.capacity_factor
    has_capacity, has_statistics = capacity is not None, options.loss_type is not None
    has_mask, has_mature = token_mask is not None, mature is not None
    statistics = z.new_empty(sizes.statistics) if has_statistics else None
    partial = z
    mask = z if token_mask is None else token_mask
    inverse = 1.0 / options.temperature
    place = (z.stride(0), sizes.padded_ranks, sizes.padded_experts)
    key = (*sizes.key, options.top_k, block_t, has_mask, z.device)
    kernels = launchers()
    if has_capacity or has_statistics or slots is not None:
        partial = z.new_empty(blocks, sizes.statistics)
        kernels.count(
            (blocks,),
            key,
            (
                z, mask, partial, tokens, experts, *place, inverse,
                options.top_k, block_e, sizes.splits, has_mask, block_t,
            ),
        )  # fmt: skip
    kernels.route(
        (blocks,),
        (*key, dtype, has_mature, has_capacity, has_statistics, slots is not None),
        (
            z, mask, z if mature is None else mature, partial, decision, mixed,
            z if statistics is None else statistics, z if slots is None else slots,
            tokens, experts, sizes.rank, sizes.ranks, *place, blocks, inverse,
            0.0 if capacity is None else capacity * options.top_k / experts, options.scaling,
            options.top_k, block_e, sizes.splits, has_mask, has_mature, has_capacity,
            has_statistics, block_t, min(128, _power_of_two(max(8, sizes.padded_ranks))),
            max(1, min(64, 4096 // block_e)), 0 if slots is None else BLOCK_M,
        ),
    )  # fmt: skip
    return decision, mixed, statistics


def route_backward(
    grad_mixed: Tensor,
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grad_statistics: Tensor | None,
    options: RouterOptions,
    sizes: Sizes,
    *,
    grad_z: Tensor | None = None,
) -> Tensor:
    """The gradient of ``A x`` and of the router's scores, in the dtype of the input.

    Args:
        grad_mixed: the gradient of the scaled ranks; or ``q``, with ``grad_z``.
        saved: scaled ranks, decision, token mask and statistics.
        grad_statistics: their gradient, or None.
        options: how the router decides.
        sizes: of the packed rows.
        grad_z: what holds the gradient of ``A x`` already and lacks that of the scores.
    """
    mixed, decision, token_mask, statistics = saved
    tokens = decision.shape[1]
    has_shares = grad_z is not None
    if grad_z is None:
        grad_z = mixed.new_empty(tokens, sizes.grad_columns)
    has_statistics = statistics is not None and grad_statistics is not None
    has_mask = token_mask is not None
    block_t = sizes.backward_tokens
    launchers().route_backward(
        (-(-tokens // block_t),),
        (*sizes.key, options.top_k, mixed.dtype, has_mask, has_statistics, has_shares,
         mixed.device),
        (
            grad_mixed, mixed, decision, decision if token_mask is None else token_mask,
            statistics if has_statistics else decision,
            grad_statistics.contiguous() if grad_statistics is not None else decision,
            grad_z, tokens, sizes.experts, sizes.rank, sizes.ranks, sizes.padded_ranks,
            sizes.padded_experts, sizes.grad_columns, 1.0 / options.temperature, options.scaling,
            options.top_k, sizes.experts_block, sizes.rank_block, has_mask, has_statistics, block_t,
            has_shares,
        ),
    )  # fmt: skip
    return grad_z


def accumulate(
    x: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    mixed: Tensor,
    lora_b: Tensor,
    *,
    is_conv1d: bool,
) -> Tensor:
    """The base product and the update, in the order that passes less over the output."""
    if x.is_cuda and update_first(base_weight, bias, is_conv1d=is_conv1d):
        return (mixed @ lora_b.t()).addmm_(x, base_weight.t())
    return base_product(x, base_weight, bias, is_conv1d=is_conv1d).addmm_(mixed, lora_b.t())


def input_gradient(
    grad: Tensor, base_weight: Tensor, grad_z: Tensor, rows: Tensor, *, is_conv1d: bool
) -> Tensor:
    """The gradient of the input through base and update, in the order that passes less over it."""
    if grad.is_cuda and update_first(base_weight.t(), None, is_conv1d=is_conv1d):
        return (grad_z @ rows).addmm_(grad, base_weight)
    return base_gradient(grad, base_weight, is_conv1d=is_conv1d).addmm_(grad_z, rows)


class RoutedLinear(torch.autograd.Function):
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
        """Forward."""
        ctx.set_materialize_grads(False)
        ctx.options, ctx.is_conv1d, ctx.shape = options, is_conv1d, x.shape
        ctx.dtypes = (lora_a.dtype, lora_b.dtype, router.dtype)
        ctx.sizes = sizes = sizes_of(lora_a.shape[0], options.num_experts, lora_a.shape[1], x.dtype)
        x = x.reshape(-1, x.shape[-1])
        rows, lora_b = pack(x, lora_a, lora_b, router, sizes)
        z = wide_mm(x, rows.t())
        decision, mixed, statistics = route(z, token_mask, mature, options, sizes, x.dtype)
        output = accumulate(x, base_weight, bias, mixed, lora_b, is_conv1d=is_conv1d)
        ctx.save_for_backward(x, base_weight, rows, lora_b, mixed, decision, token_mask, statistics)
        ctx.mark_non_differentiable(decision)
        return output.view(*ctx.shape[:-1], output.shape[-1]), statistics, decision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Backward."""
        x, base_weight, rows, lora_b, *saved = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_router = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_b = grad_router = None
        sizes = ctx.sizes
        if grad is None:
            grad = x.new_zeros(x.shape[0], lora_b.shape[0])
        grad = grad.reshape(-1, lora_b.shape[0])
        if needs_b:
            grad_b = wide_mm(grad.t(), saved[0]).to(ctx.dtypes[1])
        if needs_x or needs_a or needs_router:
            grad_mixed = wide_mm(grad, lora_b)
            grad_z = route_backward(grad_mixed, saved, grad_statistics, ctx.options, sizes)
            if needs_a or needs_router:
                grad_rows = wide_mm(grad_z.t(), x)
                grad_a = grad_rows[: sizes.ranks].to(ctx.dtypes[0])
                start = sizes.padded_ranks
                grad_router = grad_rows[start : start + sizes.experts].to(ctx.dtypes[2])
            if needs_x:
                # the leading bits of the router's rows are all that the dtype of x can hold
                used = rows[: sizes.grad_columns]
                grad_x = input_gradient(grad, base_weight, grad_z, used, is_conv1d=ctx.is_conv1d)
                grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_router, None, None, None, None


def decode(
    x: Tensor,
    output: Tensor,
    adapter: tuple[Tensor, Tensor, Tensor],
    mature: Tensor | None,
    options: RouterOptions,
    *,
    record: bool,
    is_sparse: bool,
) -> Tensor | None:
    """Route few tokens and add their update to ``output`` in place.

    Args:
        x: ``(tokens, d_in)``.
        output: ``(tokens, d_out)``, what the base gave.
        adapter: A, B and the router's rows, as they are.
        mature: which experts are, or None.
        options: how the router decides.
        record: whether the decision is wanted.
        is_sparse: read A of the chosen experts only, after the scores are known: one kernel more,
            and for many experts less memory to read. No expert may be young.
    """
    lora_a, lora_b, router = adapter
    (tokens, d_out), (ranks, d_in) = output.shape, lora_a.shape
    experts, top_k = options.num_experts, options.top_k
    rank, experts_block = ranks // experts, _power_of_two(experts)
    z = x.new_empty(tokens, ranks + experts, dtype=torch.float32)
    decision = z.new_empty(2, tokens, experts) if record else None
    block_t = _power_of_two(tokens)
    block = min(_power_of_two(d_in), 4096 // block_t)
    first = ranks if is_sparse else 0
    kernels = launchers()
    aligned = kernels.is_aligned(x, lora_a, router)
    key = (ranks, experts, d_in, lora_a.dtype, x.dtype, x.stride(0), x.device)
    kernels.scores(
        (ranks + experts - first,),
        (*key, first, block_t),
        (
            x, lora_a, router, z, tokens, d_in, ranks, first, x.stride(0), z.stride(0), block_t,
            block,
        ),
        aligned=aligned,
    )  # fmt: skip
    if is_sparse:
        kernels.chosen(
            (tokens, top_k * rank),
            (*key, top_k),
            (
                x, lora_a, z, d_in, experts, rank, ranks, x.stride(0), z.stride(0), top_k,
                experts_block, min(_power_of_two(d_in), 4096),
            ),
            aligned=aligned,
        )  # fmt: skip
    has_mature = mature is not None and not is_sparse
    block_r = _power_of_two(rank)
    block_n = max(16, min(64, 1024 // block_r))
    kernels.decode(
        (tokens, -(-d_out // block_n)),
        (ranks, experts, d_out, top_k, lora_b.dtype, x.dtype, has_mature, record, x.device),
        (
            z, mature if has_mature else z, lora_b, output, z if decision is None else decision,
            tokens, d_out, experts, rank, ranks, z.stride(0), 1.0 / options.temperature,
            options.scaling, top_k, experts_block, block_r, has_mature, record, block_n,
        ),
        aligned=kernels.is_aligned(lora_b, output),
    )  # fmt: skip
    return decision
