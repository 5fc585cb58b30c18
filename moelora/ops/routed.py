"""Linear layers routed by their own routers: one signature, whichever implementation runs."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.ops.backend import Choice, explain
from moelora.ops.gradients import in_given_dtypes
from moelora.ops.options import Member, RoutedOutput, RouterOptions
from moelora.ops.packing import Packer
from moelora.ops.products import base_output, wide_mm
from moelora.ops.reference import lora_combine_reference, routed_linear_reference
from moelora.ops.routed_eager import RoutedLinearsEager, compute
from moelora.ops.routed_sparse import RoutedLinearsSparse
from moelora.ops.routed_triton import (
    MAX_MEMBERS,
    RoutedLinears,
    decode,
    outputs_of,
    pack,
    route,
    sizes_of,
)

#: Up to so many tokens two kernels read the parameters as they are, the chosen experts' B only.
DECODE_TOKENS = 16


def routed_linear(
    x: Tensor,
    base_weight: Tensor | None,
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
        base_weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of a ``Conv1D``; no gradient. None for
            the update alone.
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
        backend: ``"auto"``, ``"eager"``, ``"triton"`` or ``"reference"``; see
            :func:`moelora.ops.explain`.
        all_mature: the caller knows that every flag in ``mature`` is True, so that experts nobody
            chose may be left out where that is faster.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.
        ValueError: if the ranks cannot be split evenly over the experts.

    Example:
        >>> import torch
        >>> one, options = torch.ones(1, 1), RouterOptions(1, 1, 1.0, 2.0)
        >>> routed_linear(one, one, None, one, one, one, options=options).output
        tensor([[3.]])
    """
    member = Member(base_weight, bias, lora_a, lora_b, router, mature, is_conv1d)
    return routed_linears(
        x, (member,), options=options, token_mask=token_mask, record=record, backend=backend,
        all_mature=all_mature,
    )[0]  # fmt: skip


@in_given_dtypes
def routed_linears(
    x: Tensor,
    members: Sequence[Member],
    *,
    options: RouterOptions,
    token_mask: Tensor | None = None,
    record: bool = False,
    backend: str = "auto",
    all_mature: bool = False,
    packer: Packer = pack,
    choice: Choice | None = None,
) -> list[RoutedOutput]:
    """:func:`routed_linear` of several layers that read the same input, at less than their sum.

    Args:
        x: ``(*batch, d_in)``.
        members: one or more layers; up to three at a time share the kernels' work. Shapes but
            ``d_out``, and dtypes, are the same for all; all have maturity flags or none has, and
            base weights likewise. Of those with and without ``dropped`` each is served alone.
        options: how each router decides.
        token_mask: as there, and all that follow.
        record: as there.
        backend: as there.
        all_mature: as there.
        packer: gives the kernels A, B and router in the dtype of ``x``.
        choice: what :func:`explain` said of these members; they are known to be alike, and nothing
            is checked.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.
        ValueError: if the ranks cannot be split evenly over the experts, or the kernels are to
            serve layers that are not alike.

    Example:
        >>> import torch
        >>> one, options = torch.ones(1, 1), RouterOptions(1, 1, 1.0, 2.0)
        >>> first, second = Member(one, None, one, one, one), Member(-one, None, one, one, one)
        >>> results = routed_linears(one, [first, second], options=options)
        >>> [result.output.item() for result in results]
        [3.0, 1.0]
    """
    choice, portions = _checked(x, members, options, backend, choice)
    if choice.backend == "reference":
        return [_reference(x, member, token_mask, options) for member in members]
    found: list[RoutedOutput] = []
    if choice.backend == "eager":
        for some in portions:
            found += _eager(x, some, token_mask, options, all_mature=all_mature)
        return found
    if token_mask is not None:
        token_mask = token_mask.contiguous()
    # without a capacity padding is served too, but not counted: no slots are known for it
    countable = token_mask is None or options.capacity_factor is not None
    is_sparse = choice.is_sparse and countable and (members[0].mature is None or all_mature)
    for some in portions:
        op: Any = RoutedLinearsSparse if is_sparse and some[0].dropped is None else RoutedLinears
        tensors = [tensor for member in some for tensor in member.differentiable]
        *results, decision = op.apply(x, token_mask, some, options, packer, record, *tensors)
        decisions = [None] * len(some) if decision is None else decision.unbind()
        outputs, statistics = results[: len(some)], results[len(some) :]
        found += map(_recorded, outputs, statistics, decisions)
    return found


def _checked(
    x: Tensor,
    members: Sequence[Member],
    options: RouterOptions,
    backend: str,
    choice: Choice | None,
) -> tuple[Choice, Sequence[Sequence[Member]]]:
    """What runs, and on which members at a time; as told, if the caller knows."""
    if choice is not None:
        return choice, (members,)
    choice = _choice(x, members[0], options, backend)
    return choice, _portions(members, choice)


def _portions(members: Sequence[Member], choice: Choice) -> Sequence[Sequence[Member]]:
    """The members that are computed together: as many as the kernels take, or all that are alike.

    Raises:
        ValueError: if they are not alike: the kernels would read the others as the first.
    """
    if len({member.dropped is None for member in members}) > 1:
        return [(member,) for member in members]
    kinds = {_kind(member) for member in members}
    if choice.backend != "triton":
        return [members] if len(kinds) == 1 else [(member,) for member in members]
    if len(kinds) > 1:
        raise ValueError(
            "Layers that are routed together must have the same experts, ranks and dtypes, and "
            f"maturity flags and base weights all or none, got {len(kinds)} kinds of layers."
        )
    return [members[start : start + MAX_MEMBERS] for start in range(0, len(members), MAX_MEMBERS)]


def _kind(member: Member) -> tuple[Any, ...]:
    """What members that are computed together have in common."""
    base, _, lora_a, lora_b, router, mature, _, _ = member
    dtypes = (lora_a.dtype, lora_b.dtype, router.dtype)
    return (lora_a.shape, lora_b.shape[1], router.shape, mature is None, base is None, dtypes)


def _recorded(
    output: Tensor, statistics: Tensor | None, decision: Sequence[Tensor] | Tensor | None
) -> RoutedOutput:
    if decision is None:
        return RoutedOutput(output, None, None, statistics)
    return RoutedOutput(output, decision[0], decision[1], statistics)


def _eager(
    x: Tensor,
    members: Sequence[Member],
    token_mask: Tensor | None,
    options: RouterOptions,
    *,
    all_mature: bool,
) -> list[RoutedOutput]:
    op: Any = RoutedLinearsEager
    tensors = [tensor for member in members for tensor in member.differentiable]
    *results, logits, weights = op.apply(x, token_mask, members, options, all_mature, *tensors)
    decisions = zip(logits.unbind(1), weights.unbind(1), strict=True)
    outputs, statistics = results[: len(members)], results[len(members) :]
    return list(map(_recorded, outputs, statistics, decisions))


def _eager_inference(
    x: Tensor,
    members: Sequence[Member],
    options: RouterOptions,
    *,
    record: bool,
    all_mature: bool,
) -> list[RoutedOutput]:
    found = compute(x, members, options, all_mature=all_mature)
    if not record:
        return [RoutedOutput(output, None, None, None) for output in found.outputs]
    decisions = zip(found.logits.unbind(1), found.weights.unbind(1), strict=True)
    return list(map(_recorded, found.outputs, [None] * len(members), decisions))


def _reference(
    x: Tensor, member: Member, token_mask: Tensor | None, options: RouterOptions
) -> RoutedOutput:
    """The definition, in at least float32."""
    dtypes = (torch.float32, x.dtype, member.lora_a.dtype, member.router.dtype)
    wide = functools.reduce(torch.promote_types, dtypes)
    bias = None if member.bias is None else member.bias.to(wide)
    weight = member.base_weight
    if weight is None:
        weight = x.new_zeros(member.lora_b.shape[0], x.shape[-1])
    elif member.is_conv1d:
        weight = weight.t()
    router = member.router.to(wide)
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    output, sums = routed_linear_reference(
        flat, weight.to(wide), bias, member.lora_a.to(wide), member.lora_b.to(wide), router,
        options=options, token_mask=token_mask, mature=member.mature,
    )  # fmt: skip
    shares = (sums[name] for name in ("mean_probs", "slot_share", "first_share"))
    numbers = (sums["mean_squared_logsumexp"].reshape(1), sums["tokens"].to(flat).reshape(1))
    statistics = None if options.loss_type is None else torch.cat([*shares, *numbers])
    if member.dropped is not None:
        inputs = member.dropped.reshape(-1, x.shape[-1]).to(wide)
        base = flat @ weight.to(wide).t() + (0 if bias is None else bias)
        scaled = sums["weights"] * options.scaling
        lora_a, lora_b = member.lora_a.to(wide), member.lora_b.to(wide)
        output = base + lora_combine_reference(inputs, lora_a, lora_b, scaled)
    logits = (flat @ router.t()).detach() / options.temperature
    output = output.to(x.dtype).reshape(*x.shape[:-1], output.shape[-1])
    return RoutedOutput(output, logits, sums["weights"].detach(), statistics)


def _choice(x: Tensor, member: Member, options: RouterOptions, backend: str) -> Choice:
    ranks, experts = member.lora_a.shape[0], options.num_experts
    if ranks % experts:
        raise ValueError(f"ranks={ranks} cannot be split evenly over experts={experts}.")
    return explain(
        device=x.device.type,
        dtype=x.dtype,
        num_experts=experts,
        top_k=options.top_k,
        rank=ranks // experts,
        backend=backend,
    )


@in_given_dtypes
def routed_linears_inference(
    x: Tensor,
    members: Sequence[Member],
    *,
    options: RouterOptions,
    record: bool = False,
    backend: str = "auto",
    all_mature: bool = False,
    packer: Packer = pack,
    choice: Choice | None = None,
) -> list[RoutedOutput]:
    """:func:`routed_linears` without gradients, capacity and statistics.

    On a GPU a few tokens take two kernels, which read the parameters as they are.

    Args:
        x: as there, and all that follow.
        members: as there; ``dropped`` must be None.
        options: as there; ``capacity_factor`` and ``loss_type`` must be None.
        record: as there.
        backend: as there.
        all_mature: as there.
        packer: as there.
        choice: as there.

    Raises:
        BackendError: if ``backend`` is unknown or cannot run here.
        ValueError: if the ranks cannot be split evenly over the experts, or a member has an input
            after dropout.
    """
    if choice is None and any(member.dropped is not None for member in members):
        raise ValueError("Inputs after dropout belong to training: call routed_linears.")
    choice, portions = _checked(x, members, options, backend, choice)
    if choice.backend == "reference":
        return [_reference(x, member, None, options) for member in members]
    found: list[RoutedOutput] = []
    for some in portions:
        if choice.backend == "eager":
            found += _eager_inference(x, some, options, record=record, all_mature=all_mature)
        else:
            found += _inference(
                x, some, options, choice, record=record, all_mature=all_mature, packer=packer
            )
    return found


def _inference(
    x: Tensor,
    members: Sequence[Member],
    options: RouterOptions,
    choice: Choice,
    *,
    record: bool,
    all_mature: bool,
    packer: Packer,
) -> list[RoutedOutput]:
    """As many layers as the kernels take at once."""
    flat = x.reshape(-1, x.shape[-1])
    first = members[0]
    decision: Tensor | None
    if 0 < flat.shape[0] <= DECODE_TOKENS:
        outputs = [
            x.new_zeros(*x.shape[:-1], member.lora_b.shape[0])
            if member.base_weight is None
            else base_output(x, member.base_weight, member.bias, is_conv1d=member.is_conv1d)
            for member in members
        ]
        is_sparse = choice.is_sparse and (first.mature is None or all_mature)
        # the kernels step over tokens only
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        decision = decode(flat, outputs, members, options, record=record, is_sparse=is_sparse)
    else:
        ranks, d_in = first.lora_a.shape
        sizes = sizes_of(ranks, options.num_experts, d_in, x.dtype, len(members))
        rows, lora_bs = packer(x, members, sizes)
        matures = [member.mature for member in members]
        decision, mixed, _ = route(wide_mm(flat, rows.t()), None, matures, options, sizes, x.dtype)
        outputs = outputs_of(x, flat, members, mixed, lora_bs)
    if not record or decision is None:
        return [RoutedOutput(output, None, None, None) for output in outputs]
    return [
        RoutedOutput(output, own[0], own[1], None)
        for output, own in zip(outputs, decision, strict=True)
    ]
