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

from moelora.ops.backend import explain
from moelora.ops.options import RoutedOutput, RouterOptions
from moelora.ops.products import base_gradient, base_product, wide_mm
from moelora.ops.routed_eager import routed_linear_eager

#: Up to so many tokens two kernels read the parameters as they are, the chosen experts' B only.
DECODE_TOKENS = 16


class _Sizes:
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
        self.rank_block = _power_of_two(self.rank)
        self.statistics = 3 * self.experts_block + 2
        self.block = 1024
        self.row_programs = self.rows * -(-d_in // self.block)
        self.backward_tokens = max(1, 4096 // (self.experts_block * self.rank_block))
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
def _sizes(ranks: int, experts: int, d_in: int, dtype: torch.dtype) -> _Sizes:
    return _Sizes(ranks, experts, d_in, is_split=dtype != torch.float32)


@functools.cache
def _launchers() -> Any:
    """The kernels, imported when first used: Triton is slow to import and not everywhere."""
    from moelora.ops import launchers

    return launchers


def _pack(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, router: Tensor, sizes: _Sizes
) -> tuple[Tensor, Tensor]:
    """A and the router's rows as one matrix, and B, all in the dtype of the input."""
    rows = x.new_empty(sizes.rows, sizes.d_in)
    same = lora_b.dtype == x.dtype
    b_out = lora_b if same else torch.empty_like(lora_b, dtype=x.dtype)
    numel = 0 if same else lora_b.numel()
    launchers = _launchers()
    launchers.pack(
        (sizes.row_programs + -(-numel // sizes.block),),
        (*sizes.key, lora_a.dtype, lora_b.dtype, router.dtype, x.dtype, x.device, numel),
        (
            lora_a, router, lora_b, rows, b_out, sizes.d_in, sizes.ranks, sizes.padded_ranks,
            sizes.experts, sizes.padded_experts, sizes.row_programs, numel, sizes.is_split,
            sizes.block,
        ),
        aligned=launchers.is_aligned(lora_a, lora_b, router),
    )  # fmt: skip
    return rows, b_out


def _route(
    z: Tensor,
    token_mask: Tensor | None,
    mature: Tensor | None,
    options: RouterOptions,
    sizes: _Sizes,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and weights, scaled ranks, and statistics of all tokens."""
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
    launchers = _launchers()
    if has_capacity or has_statistics:
        partial = z.new_empty(blocks, sizes.statistics)
        launchers.count(
            (blocks,),
            key,
            (
                z, mask, partial, tokens, experts, *place, inverse,
                options.top_k, block_e, sizes.splits, has_mask, block_t,
            ),
        )  # fmt: skip
    launchers.route(
        (blocks,),
        (*key, dtype, has_mature, has_capacity, has_statistics),
        (
            z, mask, z if mature is None else mature, partial, decision, mixed,
            z if statistics is None else statistics, tokens, experts, sizes.rank, sizes.ranks,
            *place, blocks, inverse,
            0.0 if capacity is None else capacity * options.top_k / experts, options.scaling,
            options.top_k, block_e, sizes.splits, has_mask, has_mature, has_capacity,
            has_statistics, block_t, min(128, _power_of_two(sizes.padded_ranks)),
            max(1, min(64, 4096 // block_e)),
        ),
    )  # fmt: skip
    return decision, mixed, statistics


def _route_backward(
    grad_mixed: Tensor,
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grad_statistics: Tensor | None,
    options: RouterOptions,
    sizes: _Sizes,
) -> Tensor:
    """The gradient of ``A x`` and of the router's scores, in the dtype of the input."""
    mixed, decision, token_mask, statistics = saved
    tokens = mixed.shape[0]
    grad_z = mixed.new_empty(tokens, sizes.grad_columns)
    has_statistics = statistics is not None and grad_statistics is not None
    has_mask = token_mask is not None
    block_t = sizes.backward_tokens
    _launchers().route_backward(
        (-(-tokens // block_t),),
        (*sizes.key, options.top_k, mixed.dtype, has_mask, has_statistics, mixed.device),
        (
            grad_mixed, mixed, decision, decision if token_mask is None else token_mask,
            statistics if has_statistics else decision,
            grad_statistics.contiguous() if grad_statistics is not None else decision,
            grad_z, tokens, sizes.experts, sizes.rank, sizes.ranks, sizes.padded_ranks,
            sizes.padded_experts, sizes.grad_columns, 1.0 / options.temperature, options.scaling,
            options.top_k, sizes.experts_block, sizes.rank_block, has_mask, has_statistics, block_t,
        ),
    )  # fmt: skip
    return grad_z


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
        ctx.sizes = sizes = _sizes(lora_a.shape[0], options.num_experts, lora_a.shape[1], x.dtype)
        output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
        x = x.reshape(-1, x.shape[-1])
        rows, lora_b = _pack(x, lora_a, lora_b, router, sizes)
        z = wide_mm(x, rows.t())
        decision, mixed, statistics = _route(z, token_mask, mature, options, sizes, x.dtype)
        output.addmm_(mixed, lora_b.t())
        ctx.save_for_backward(x, base_weight, rows, lora_b, mixed, decision, token_mask, statistics)
        ctx.mark_non_differentiable(decision)
        return output.view(*ctx.shape[:-1], output.shape[-1]), statistics, decision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
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
            grad_z = _route_backward(grad_mixed, saved, grad_statistics, ctx.options, sizes)
            if needs_a or needs_router:
                grad_rows = wide_mm(grad_z.t(), x)
                grad_a = grad_rows[: sizes.ranks].to(ctx.dtypes[0])
                start = sizes.padded_ranks
                grad_router = grad_rows[start : start + sizes.experts].to(ctx.dtypes[2])
            if needs_x:
                grad_x = base_gradient(grad, base_weight, is_conv1d=ctx.is_conv1d)
                # the leading bits of the router's rows are all that the dtype of x can hold
                grad_x = grad_x.addmm_(grad_z, rows[: sizes.grad_columns]).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_router, None, None, None, None


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
    record: bool = False,
    backend: str = "auto",
) -> RoutedOutput:
    """A frozen linear layer and its mixture, routed by a linear router that reads the same input.

    Differentiable once in ``x``, ``lora_a``, ``lora_b`` and ``router``, through the output and the
    statistics. Defined by :func:`moelora.ops.reference.routed_linear_reference`. Scores have at
    least float32 accuracy, also where the products run in bfloat16.

    Args:
        x: ``(*batch, d_in)``.
        base_weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of a ``Conv1D``; no gradient.
        bias: ``(d_out,)`` or None; no gradient.
        lora_a: ``(experts * r, d_in)``, contiguous.
        lora_b: ``(d_out, experts * r)``, contiguous.
        router: ``(experts, d_in)``, contiguous.
        options: how the router decides.
        token_mask: ``(tokens,)`` bool, False for padding, which takes no capacity and counts in no
            statistic.
        mature: ``(experts,)`` bool; while one is False all experts share every token.
        is_conv1d: the base is a ``Conv1D``.
        record: whether logits and weights are wanted.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``; see :func:`moelora.ops.explain`.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.

    Example:
        >>> one, options = torch.ones(1, 1), RouterOptions(1, 1, 1.0, 2.0)
        >>> routed_linear(one, one, None, one, one, one, options=options).output
        tensor([[3.]])
    """
    backend = _backend(x, lora_a, options, backend)
    tensors = (x, base_weight, bias, lora_a, lora_b, router, token_mask, mature)
    if backend == "triton":
        output, statistics, decision = _RoutedLinear.apply(*tensors, options, is_conv1d)
        logits, weights = decision.unbind() if record else (None, None)
    else:
        output, statistics, logits, weights = routed_linear_eager(*tensors, options, is_conv1d)
    return RoutedOutput(output, logits, weights, statistics)


def _backend(x: Tensor, lora_a: Tensor, options: RouterOptions, backend: str) -> str:
    return explain(
        device=x.device.type,
        dtype=x.dtype,
        num_experts=options.num_experts,
        top_k=options.top_k,
        rank=lora_a.shape[0] // options.num_experts,
        backend=backend,
    ).backend


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
    backend: str = "auto",
) -> RoutedOutput:
    """:func:`routed_linear` without gradients, capacity and statistics.

    On a GPU a few tokens take two kernels, which read the parameters as they are.

    Args:
        x: as there, and all that follow.
        base_weight: as there.
        bias: as there.
        lora_a: as there.
        lora_b: as there.
        router: as there.
        options: how the router decides; ``capacity_factor`` and ``loss_type`` must be None.
        mature: as there.
        is_conv1d: as there.
        record: as there.
        backend: as there.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.
    """
    if _backend(x, lora_a, options, backend) != "triton":
        tensors = (x, base_weight, bias, lora_a, lora_b, router, None, mature)
        output, _, logits, weights = routed_linear_eager(*tensors, options, is_conv1d)
        return RoutedOutput(output, logits, weights, None)
    output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
    flat = x.reshape(-1, x.shape[-1])
    if 0 < flat.shape[0] <= DECODE_TOKENS:
        adapter = (lora_a, lora_b, router.to(lora_a.dtype))
        decision = _decode(flat, output, adapter, mature, options, record=record)
    else:
        sizes = _sizes(lora_a.shape[0], options.num_experts, lora_a.shape[1], x.dtype)
        rows, lora_b = _pack(x, lora_a, lora_b, router, sizes)
        z = wide_mm(flat, rows.t())
        decision, mixed, _ = _route(z, None, mature, options, sizes, x.dtype)
        output.addmm_(mixed, lora_b.t())
    output = output.view(*x.shape[:-1], output.shape[-1])
    if not record or decision is None:
        return RoutedOutput(output, None, None, None)
    return RoutedOutput(output, decision[0], decision[1], None)


def _decode(
    x: Tensor,
    output: Tensor,
    adapter: tuple[Tensor, Tensor, Tensor],
    mature: Tensor | None,
    options: RouterOptions,
    *,
    record: bool,
) -> Tensor | None:
    """Route few tokens and add their update to ``output`` in place."""
    lora_a, lora_b, router = adapter
    (tokens, d_out), (ranks, d_in) = output.shape, lora_a.shape
    experts, top_k = options.num_experts, options.top_k
    z = x.new_empty(tokens, ranks + experts, dtype=torch.float32)
    decision = z.new_empty(2, tokens, experts) if record else None
    block_t = _power_of_two(tokens)
    block = min(_power_of_two(d_in), 4096 // block_t)
    launchers = _launchers()
    launchers.scores(
        (ranks + experts,),
        (ranks, experts, d_in, block_t, lora_a.dtype, x.dtype, x.stride(0), x.device),
        (
            x, lora_a, router, z, tokens, d_in, ranks, x.stride(0), z.stride(0), block_t, block,
        ),
        aligned=launchers.is_aligned(x, lora_a, router),
    )  # fmt: skip
    has_mature = mature is not None
    rank = ranks // experts
    block_r = _power_of_two(rank)
    block_n = max(16, min(64, 1024 // block_r))
    launchers.decode(
        (tokens, -(-d_out // block_n)),
        (ranks, experts, d_out, top_k, lora_b.dtype, x.dtype, has_mature, record, x.device),
        (
            z, z if mature is None else mature, lora_b, output, z if decision is None else decision,
            tokens, d_out, experts, rank, ranks, z.stride(0), 1.0 / options.temperature,
            options.scaling, top_k, _power_of_two(experts), block_r, has_mature, record, block_n,
        ),
        aligned=launchers.is_aligned(lora_b, output),
    )  # fmt: skip
    return decision
