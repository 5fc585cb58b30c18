"""A linear layer routed by its own router, on the kernels of ``triton_kernels``.

One product gives ``A x`` and the router's scores; one kernel routes and scales (two in training,
where capacity and statistics need sums over all tokens); one product accumulates the update into
the base output. Backward is one kernel between the same products.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.options import RouterOptions
from moelora.ops.products import base_gradient, base_product, wide_mm

#: Up to so many tokens the update is added by a kernel that reads only the chosen experts' B.
DECODE_TOKENS = 16


@dataclass(frozen=True)
class Packed:
    """A layer's adapter in the dtype of its input.

    Attributes:
        rows: ``(padded ranks + splits * padded experts, d_in)``: A, then the router's rows.
        lora_b: ``(d_out, ranks)``.
    """

    rows: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class RoutedOutput:
    """What a routed layer gives.

    Attributes:
        output: ``(*batch, d_out)``, in the dtype of the input.
        router_logits: ``(tokens, experts)`` divided by the temperature, float32, without a graph;
            None if a small forward was not asked to record them.
        routing_weights: the same for the weights, after capacity.
        statistics: float32 sums for the auxiliary losses, see :class:`Statistics`; None if not
            asked for.
    """

    output: Tensor
    router_logits: Tensor | None
    routing_weights: Tensor | None
    statistics: Tensor | None


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _eights(number: int) -> int:
    return -(-number // 8) * 8


@dataclass(frozen=True)
class _Layout:
    """Sizes of the packed rows, and of the kernels' blocks."""

    ranks: int
    experts: int
    splits: int

    @property
    def rank(self) -> int:
        return self.ranks // self.experts

    @property
    def padded_ranks(self) -> int:
        return _eights(self.ranks)

    @property
    def padded_experts(self) -> int:
        return _eights(self.experts)

    @property
    def rows(self) -> int:
        return self.padded_ranks + self.splits * self.padded_experts

    @property
    def experts_block(self) -> int:
        return _power_of_two(self.experts)

    def tokens_block(self, tokens: int) -> int:
        """Tokens per program: enough programs for the device, few enough partial sums to add."""
        wanted = 32 if tokens <= 8192 else 64 if tokens <= 32768 else 128
        return max(1, min(wanted, 2048 // self.experts_block))


def _layout(lora_a: Tensor, num_experts: int, dtype: torch.dtype) -> _Layout:
    return _Layout(lora_a.shape[0], num_experts, 1 if dtype == torch.float32 else 3)


def pack(x_dtype: torch.dtype, lora_a: Tensor, lora_b: Tensor, router: Tensor) -> Packed:
    """Bring an adapter into the dtype of the input, A and the router's rows in one matrix."""
    from moelora.ops import triton_kernels as kernels

    layout = _layout(lora_a, router.shape[0], x_dtype)
    d_in = lora_a.shape[1]
    rows = lora_a.new_empty(layout.rows, d_in, dtype=x_dtype)
    same = lora_b.dtype == x_dtype and lora_b.is_contiguous()
    b_out = lora_b if same else torch.empty_like(lora_b, dtype=x_dtype).contiguous()
    block = 1024
    row_programs = layout.rows * -(-d_in // block)
    b_numel = 0 if same else lora_b.numel()
    kernels._pack_fwd_kernel[(row_programs + -(-b_numel // block),)](
        lora_a.contiguous(), router.contiguous(), lora_b.contiguous(), rows, b_out,
        d_in, layout.ranks, layout.padded_ranks, layout.experts, layout.padded_experts,
        row_programs, b_numel, SPLIT=layout.splits > 1, BLOCK=block,
    )  # fmt: skip
    return Packed(rows, b_out)


def _route(
    z: Tensor,
    token_mask: Tensor | None,
    mature: Tensor | None,
    options: RouterOptions,
    layout: _Layout,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, weights, scaled ranks and statistics of all tokens."""
    from moelora.ops import triton_kernels as kernels

    tokens, experts = z.shape[0], layout.experts
    block_t, block_e = layout.tokens_block(tokens), layout.experts_block
    blocks = max(1, -(-tokens // block_t))
    logits = z.new_empty(tokens, experts)
    weights = z.new_empty(tokens, experts)
    mixed = z.new_empty(tokens, layout.ranks, dtype=dtype)
    capacity = options.capacity_factor
    counts = capacity is not None or options.statistics
    statistics = z.new_empty(3 * block_e + 2) if options.statistics else z
    partial = z.new_empty(blocks, 3 * block_e + 2) if counts else z
    sizes = (z.stride(0), layout.padded_ranks, layout.padded_experts)
    mask = z if token_mask is None else token_mask
    common = {"K": options.top_k, "E2": block_e, "SPLITS": layout.splits, "BLOCK_T": block_t}
    if counts:
        kernels._count_fwd_kernel[(blocks,)](
            z, mask, partial, tokens, experts, *sizes, 1.0 / options.temperature,
            HAS_MASK=token_mask is not None, **common,
        )  # fmt: skip
    kernels._route_fwd_kernel[(blocks,)](
        z, mask, z if mature is None else mature, partial, logits, weights, mixed, statistics,
        tokens, experts, layout.rank, layout.ranks, *sizes, blocks, 1.0 / options.temperature,
        0.0 if capacity is None else capacity * options.top_k / experts, options.scaling,
        HAS_MASK=token_mask is not None, HAS_MATURE=mature is not None,
        HAS_CAPACITY=capacity is not None, HAS_STATISTICS=options.statistics,
        BLOCK_R=min(128, _power_of_two(layout.padded_ranks)),
        BLOCK_P=max(1, min(64, 4096 // block_e)), **common,
    )  # fmt: skip
    return logits, weights, mixed, statistics


class _RoutedLinear(torch.autograd.Function):
    """See :func:`routed_linear`."""

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
        packed = pack(x.dtype, lora_a, lora_b, router)
        output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
        x = x.reshape(-1, x.shape[-1])
        layout = _layout(lora_a, options.num_experts, x.dtype)
        z = wide_mm(x, packed.rows.t())
        logits, weights, mixed, statistics = _route(z, token_mask, mature, options, layout, x.dtype)
        output.addmm_(mixed, packed.lora_b.t())
        ctx.layout = layout
        ctx.save_for_backward(
            x, base_weight, packed.rows, packed.lora_b, mixed, logits, weights, token_mask,
            statistics if options.statistics else None,
        )  # fmt: skip
        ctx.mark_non_differentiable(logits, weights)
        return output, statistics if options.statistics else None, logits, weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, base_weight, rows, lora_b, mixed, logits, weights, mask, statistics = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_router = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_b = grad_router = None
        layout = ctx.layout
        if grad is None:
            grad = x.new_zeros(x.shape[0], lora_b.shape[0])
        if needs_b:
            grad_b = wide_mm(grad.t(), mixed).to(ctx.dtypes[1])
        if needs_x or needs_a or needs_router:
            grad_z = _route_backward(
                wide_mm(grad, lora_b), mixed, weights, logits, mask, statistics, grad_statistics,
                ctx.options, layout, x.dtype,
            )  # fmt: skip
            if needs_a or needs_router:
                grad_rows = wide_mm(grad_z.t(), x)
                grad_a = grad_rows[: layout.ranks].to(ctx.dtypes[0])
                start, end = layout.padded_ranks, layout.padded_ranks + layout.experts
                grad_router = grad_rows[start:end]
                if layout.splits > 1:
                    width = layout.padded_experts
                    grad_router = grad_router + grad_rows[start + width : end + width]
                grad_router = grad_router.to(ctx.dtypes[2])
            if needs_x:
                grad_x = base_gradient(grad, base_weight, is_conv1d=ctx.is_conv1d)
                # the leading bits of the router's rows are all that the dtype of x can hold
                used = layout.padded_ranks + layout.padded_experts
                grad_x = grad_x.addmm_(grad_z[:, :used], rows[:used]).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_router, None, None, None, None


def _route_backward(
    grad_mixed: Tensor,
    mixed: Tensor,
    weights: Tensor,
    logits: Tensor,
    token_mask: Tensor | None,
    statistics: Tensor | None,
    grad_statistics: Tensor | None,
    options: RouterOptions,
    layout: _Layout,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of ``z``, with the router's part as leading bits and the rest."""
    from moelora.ops import triton_kernels as kernels

    tokens = mixed.shape[0]
    parts = 2 if layout.splits > 1 else 1
    columns = layout.padded_ranks + parts * layout.padded_experts
    grad_z = mixed.new_empty(tokens, columns, dtype=dtype)
    block_e, block_r = layout.experts_block, _power_of_two(layout.rank)
    block_t = max(1, 4096 // (block_e * block_r))
    has_statistics = statistics is not None and grad_statistics is not None
    kernels._route_bwd_kernel[(-(-tokens // block_t),)](
        grad_mixed, mixed, weights, logits, mixed if token_mask is None else token_mask,
        statistics if has_statistics else mixed,
        grad_statistics.contiguous() if has_statistics and grad_statistics is not None else mixed,
        grad_z, tokens, layout.experts, layout.rank, layout.ranks, layout.padded_ranks,
        layout.padded_experts, columns, 1.0 / options.temperature, options.scaling,
        K=options.top_k, E2=block_e, R2=block_r, SPLIT=parts > 1,
        HAS_MASK=token_mask is not None, HAS_STATISTICS=has_statistics, BLOCK_T=block_t,
    )  # fmt: skip
    return grad_z


def routed_linear(
    x: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor,
    *,
    options: RouterOptions,
    token_mask: Tensor | None = None,
    mature: Tensor | None = None,
    is_conv1d: bool = False,
) -> RoutedOutput:
    """A frozen linear layer and its mixture, routed by a linear router that reads the same input.

    Differentiable once in ``x``, ``lora_a``, ``lora_b`` and ``router``, through the output and the
    statistics. Defined by :func:`moelora.ops.reference.routed_linear_reference`.

    Args:
        x: ``(*batch, d_in)``, float32, bfloat16 or float16.
        base_weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of a ``Conv1D``; no gradient.
        bias: ``(d_out,)`` or None; no gradient.
        lora_a: ``(experts * r, d_in)``.
        lora_b: ``(d_out, experts * r)``.
        router: ``(experts, d_in)``.
        options: how the router decides.
        token_mask: ``(tokens,)`` bool, False for padding, which takes no capacity and counts in no
            statistic.
        mature: ``(experts,)`` bool; while one is False all experts share every token.
        is_conv1d: the base is a ``Conv1D``.
    """
    output, statistics, logits, weights = _RoutedLinear.apply(
        x, base_weight, bias, lora_a, lora_b, router, token_mask, mature, options, is_conv1d
    )
    return RoutedOutput(output.view(*x.shape[:-1], output.shape[-1]), logits, weights, statistics)


def routed_linear_inference(
    x: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor,
    *,
    options: RouterOptions,
    mature: Tensor | None = None,
    is_conv1d: bool = False,
    record: bool = False,
) -> RoutedOutput:
    """:func:`routed_linear` without gradients, capacity and statistics.

    A few tokens take two kernels, which read the parameters as they are; more take the products.

    Args:
        x: as there, and all that follow.
        base_weight: ...
        bias: ...
        lora_a: ...
        lora_b: ...
        router: ...
        options: how the router decides; ``capacity_factor`` and ``statistics`` must be unset.
        mature: ...
        is_conv1d: ...
        record: whether logits and weights are wanted also where they are not made anyway.
    """
    output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= DECODE_TOKENS:
        logits, weights = _decode(
            flat, output, lora_a, lora_b, router, mature, options, record=record
        )
    else:
        packed = pack(x.dtype, lora_a, lora_b, router)
        layout = _layout(lora_a, options.num_experts, x.dtype)
        z = wide_mm(flat, packed.rows.t())
        logits, weights, mixed, _ = _route(z, None, mature, options, layout, x.dtype)
        output.addmm_(mixed, packed.lora_b.t())
    return RoutedOutput(output.view(*x.shape[:-1], output.shape[-1]), logits, weights, None)


def _decode(
    x: Tensor,
    output: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor,
    mature: Tensor | None,
    options: RouterOptions,
    *,
    record: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Route few tokens and add their update to ``output`` in place."""
    from moelora.ops import triton_kernels as kernels

    (tokens, d_out), (ranks, d_in) = output.shape, lora_a.shape
    experts = options.num_experts
    logits = x.new_empty(tokens, experts, dtype=torch.float32) if record else None
    weights = x.new_empty(tokens, experts, dtype=torch.float32) if record else None
    if tokens == 0:
        return logits, weights
    z = x.new_empty(tokens, ranks + experts, dtype=torch.float32)
    kernels._scores_fwd_kernel[(ranks + experts,)](
        x, lora_a, router, z, tokens, d_in, ranks, x.stride(0), z.stride(0),
        T2=_power_of_two(tokens), BLOCK=1024 if tokens <= 4 else 512,
    )  # fmt: skip
    rank = ranks // experts
    block_r = _power_of_two(rank)
    block_n = max(16, min(128, 2048 // block_r))
    kernels._decode_fwd_kernel[(tokens, -(-d_out // block_n))](
        z, z if mature is None else mature, lora_b, output, z if logits is None else logits,
        z if weights is None else weights, d_out, experts, rank, ranks,
        z.stride(0), ranks, experts, 1.0 / options.temperature,
        options.scaling, K=options.top_k, E2=_power_of_two(experts), R2=block_r,
        SPLITS=1, HAS_MATURE=mature is not None, RECORD=record, BLOCK_N=block_n,
    )  # fmt: skip
    return logits, weights
