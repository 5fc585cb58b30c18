"""A linear layer routed by its own router: one signature, whichever implementation runs."""

from torch import Tensor

from moelora.ops.backend import Choice, explain
from moelora.ops.options import RoutedOutput, RouterOptions
from moelora.ops.products import base_product, wide_mm
from moelora.ops.routed_eager import routed_linear_eager
from moelora.ops.routed_sparse import RoutedLinearSparse
from moelora.ops.routed_triton import RoutedLinear, accumulate, decode, pack, route, sizes_of

#: Up to so many tokens two kernels read the parameters as they are, the chosen experts' B only.
DECODE_TOKENS = 16


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
    all_mature: bool = False,
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
        all_mature: the caller knows that every flag in ``mature`` is True, so that experts nobody
            chose may be left out where that is faster.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> one, options = torch.ones(1, 1), RouterOptions(1, 1, 1.0, 2.0)
        >>> routed_linear(one, one, None, one, one, one, options=options).output
        tensor([[3.]])
    """
    choice = _choice(x, lora_a, options, backend)
    tensors = (x, base_weight, bias, lora_a, lora_b, router, token_mask)
    if choice.backend == "triton":
        # without a capacity padding is served too, but not counted: no slots are known for it
        countable = token_mask is None or options.capacity_factor is not None
        if choice.is_sparse and countable and (mature is None or all_mature):
            result = RoutedLinearSparse.apply(*tensors, options, is_conv1d)
        else:
            result = RoutedLinear.apply(*tensors, mature, options, is_conv1d)
        output, statistics, decision = result
        logits, weights = decision.unbind() if record else (None, None)
    else:
        output, statistics, logits, weights = routed_linear_eager(
            *tensors, mature, options, is_conv1d
        )
    return RoutedOutput(output, logits, weights, statistics)


def _choice(x: Tensor, lora_a: Tensor, options: RouterOptions, backend: str) -> Choice:
    return explain(
        device=x.device.type,
        dtype=x.dtype,
        num_experts=options.num_experts,
        top_k=options.top_k,
        rank=lora_a.shape[0] // options.num_experts,
        backend=backend,
    )


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
    all_mature: bool = False,
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
        all_mature: as there.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.
    """
    choice = _choice(x, lora_a, options, backend)
    if choice.backend != "triton":
        tensors = (x, base_weight, bias, lora_a, lora_b, router, None, mature)
        output, _, logits, weights = routed_linear_eager(*tensors, options, is_conv1d)
        return RoutedOutput(output, logits, weights, None)
    flat = x.reshape(-1, x.shape[-1])
    if 0 < flat.shape[0] <= DECODE_TOKENS:
        output = base_product(x, base_weight, bias, is_conv1d=is_conv1d)
        adapter = (lora_a, lora_b, router.to(lora_a.dtype))
        is_sparse = choice.is_sparse and (mature is None or all_mature)
        decision = decode(
            flat, output, adapter, mature, options, record=record, is_sparse=is_sparse
        )
    else:
        sizes = sizes_of(lora_a.shape[0], options.num_experts, lora_a.shape[1], x.dtype)
        rows, lora_b = pack(x, lora_a, lora_b, router, sizes)
        z = wide_mm(flat, rows.t())
        decision, mixed, _ = route(z, None, mature, options, sizes, x.dtype)
        output = accumulate(flat, base_weight, bias, mixed, lora_b, is_conv1d=is_conv1d)
    output = output.view(*x.shape[:-1], output.shape[-1])
    if not record or decision is None:
        return RoutedOutput(output, None, None, None)
    return RoutedOutput(output, decision[0], decision[1], None)
