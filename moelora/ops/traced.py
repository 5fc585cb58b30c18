"""The routed ops as a compiler sees them: operators of known shapes, the backward one of them.

``torch.compile`` traces neither launches of kernels nor an autograd function around them. These
operators run what ``routed_triton`` and ``routed_sparse`` compute. There is one for each number of
layers that share an input: lists of tensors would be flattened at every call.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.ops.gradients import in_given_dtypes
from moelora.ops.options import Member, RoutedOutput, RouterOptions
from moelora.ops.routed import routed_linears_inference
from moelora.ops.routed_sparse import RoutedLinearsSparse, compact_rows, slots_width
from moelora.ops.routed_triton import (
    FIRST_TENSOR,
    MAX_MEMBERS,
    TENSORS,
    RoutedLinears,
    Sizes,
    pack,
    sizes_of,
)

_INPUTS = ("Tensor x", "Tensor? token_mask")
#: As in ``Member``.
_MEMBER = (
    "Tensor? base_weight", "Tensor? bias", "Tensor lora_a", "Tensor lora_b", "Tensor router",
    "Tensor? mature", "bool is_conv1d", "Tensor? dropped",
)  # fmt: skip
#: As in ``RouterOptions``, and whether to compute with the chosen experts only.
_OPTIONS = (
    "int num_experts", "int top_k", "float temperature", "float scaling",
    "float? capacity_factor", "str? loss_type", "bool is_sparse",
)  # fmt: skip
#: What a forward makes for backward: packed rows or slots, logits and weights, statistics; then of
#: each member its scaled ranks (or of all in the first one) and B in the dtype of the input.
_ROWS, _DECISION, _STATISTICS, _RANKS = range(4)
#: A, B, router and dropped input among a member's arguments.
_WITH_GRADIENT = (2, 3, 4, 7)


class _Call:
    """An operator's arguments, and what an autograd function's forward and backward ask for.

    Stands for the context that autograd gives them.

    Args:
        arguments: those of ``_INPUTS``, of each ``_MEMBER``, and of ``_OPTIONS``.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.x, self.token_mask = arguments[: len(_INPUTS)]
        places = range(len(_INPUTS), len(arguments) - len(_OPTIONS), len(_MEMBER))
        self.layers = [Member(*arguments[place : place + len(_MEMBER)]) for place in places]
        *router_options, self.is_sparse = arguments[-len(_OPTIONS) :]
        self.options = RouterOptions(*router_options)
        self.function: Any = RoutedLinearsSparse if self.is_sparse else RoutedLinears
        first = self.layers[0]
        self.takes_b_as_is = first.lora_b.dtype == self.x.dtype
        self.wide = torch.promote_types(self.x.dtype, torch.float32)
        # as the functions' forward leaves it in the context
        self.members, self.shape = len(self.layers), self.x.shape
        self.are_conv1d = [member.is_conv1d for member in self.layers]
        self.dtypes = (first.lora_a.dtype, first.lora_b.dtype, first.router.dtype)
        # kernels are made for the parameters' sizes: a trace fixes these, not the number of tokens
        ranks, d_in = map(int, first.lora_a.shape)
        self.sizes: Sizes = sizes_of(
            ranks, self.options.num_experts, d_in, self.x.dtype, self.members
        )
        # and as autograd does
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep them."""
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:  # noqa: FBT001 - as torch calls it
        """Missing gradients are None here."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing has a gradient here."""

    def nothing(self, dtype: torch.dtype | None = None) -> Tensor:
        """What stands where there is no tensor."""
        return torch.empty(0, dtype=dtype or self.x.dtype, device=self.x.device)

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs, and what backward reads."""
        mask = None if self.token_mask is None else self.token_mask.contiguous()
        number = self.members
        outputs = self.function.forward(self, self.x, mask, self.layers, self.options, pack, False)
        if self.is_sparse:
            _, rows, decision, _, statistics, *rest = self.saved_tensors
            ranks, lora_bs = rest[:number], rest[number : 2 * number]
        else:
            _, rows, mixed, decision, _, statistics, *rest = self.saved_tensors
            ranks = [mixed, *(self.nothing() for _ in range(number - 1))]
            lora_bs = rest[number : 2 * number]
        if statistics is None:
            statistics = self.nothing(self.wide)
        # an operator may return none of its arguments
        narrow = [self.nothing() for _ in lora_bs] if self.takes_b_as_is else lora_bs
        return *outputs[:number], rows, decision, statistics, *ranks, *narrow

    def shapes(self) -> tuple[Tensor, ...]:
        """What :meth:`forward` gives, its values unknown."""
        x, sizes, options, number = self.x, self.sizes, self.options, self.members
        tokens = math.prod(x.shape[:-1])
        if self.is_sparse:
            width = slots_width(tokens, options, sizes)
            rows = x.new_empty(number, width, dtype=torch.int32)
            shape = (compact_rows(width, sizes), sizes.rank)
            ranks = [x.new_empty(shape) for _ in range(number)]
        else:
            rows = x.new_empty(sizes.rows, sizes.d_in)
            ranks = [x.new_empty(number, tokens, sizes.ranks)]
            ranks += [self.nothing() for _ in range(number - 1)]
        decision = x.new_empty(number, 2, tokens, sizes.experts, dtype=self.wide)
        statistics = self.nothing(self.wide)
        if options.loss_type is not None:
            statistics = x.new_empty(number, sizes.statistics, dtype=self.wide)
        narrow = [x.new_empty(0 if self.takes_b_as_is else m.lora_b.shape) for m in self.layers]
        outputs = [x.new_empty(*x.shape[:-1], m.lora_b.shape[0]) for m in self.layers]
        return *outputs, rows, decision, statistics, *ranks, *narrow

    def backward(
        self,
        grads: Sequence[Tensor | None],
        pull: Tensor | None,
        made: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of the input, and each member's A, B, router and dropped input.

        Args:
            grads: of the outputs.
            pull: of the statistics, ``(members, ...)``.
            made: as :meth:`forward` gave it.
            needs: which are needed; others may be missing.
        """
        number, flat = self.members, self.x.reshape(-1, self.x.shape[-1])
        ranks, narrow = made[_RANKS : _RANKS + number], made[_RANKS + number :]
        lora_bs = [member.lora_b for member in self.layers] if self.takes_b_as_is else narrow
        sums = None if self.options.loss_type is None else made[_STATISTICS]
        mask = None if self.token_mask is None else self.token_mask.contiguous()
        weights = [member.base_weight for member in self.layers]
        if self.is_sparse:
            self.saved_tensors = (
                flat, made[_ROWS], made[_DECISION], mask, sums, *ranks, *lora_bs, *weights,
                *(member.lora_a for member in self.layers),
                *(member.router for member in self.layers),
            )  # fmt: skip
        else:
            dropped = [m.dropped.reshape(flat.shape) for m in self.layers if m.dropped is not None]
            self.saved_tensors = (
                flat, made[_ROWS], ranks[0], made[_DECISION], mask, sums, *weights, *lora_bs,
                *dropped,
            )  # fmt: skip
        self.needs_input_grad = (needs[0], *([False] * (FIRST_TENSOR - 1)), *needs[1:])
        pulls = [None] * number if pull is None or sums is None else pull.unbind()
        found = self.function.backward(self, *grads, *pulls, None)
        return [found[0], *found[FIRST_TENSOR:]]

    def shapes_of_gradients(self, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """What the backward operator gives, its values unknown."""
        inputs = [self.x, *(tensor for m in self.layers for tensor in m.differentiable)]
        return tuple(
            tensor.new_empty(tensor.shape) if needed and tensor is not None else self.nothing()
            for tensor, needed in zip(inputs, needs, strict=True)
        )


@in_given_dtypes
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The layers' outputs, and what backward reads."""
    return _Call(arguments).forward()


def _shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return _Call(arguments).shapes()


@in_given_dtypes
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the input, and each member's A, B, router and dropped input.

    Empty where none is needed.
    """
    call, grads, pull, made, needs = _of_backward(arguments)
    with torch.no_grad():
        found = call.backward(grads, pull, made, needs)
    return tuple(
        _alone(gradient) if needed and gradient is not None else call.nothing()
        for gradient, needed in zip(found, needs, strict=True)
    )


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    call, *_, needs = _of_backward(arguments)
    return call.shapes_of_gradients(needs)


def _of_backward(arguments: Sequence[Any]) -> tuple[_Call, Any, Any, Any, Any]:
    """The layers, and the gradients, what the forward made, and what is needed."""
    # of each member: its arguments, the gradient of its output, ranks and B
    number = (len(arguments) - len(_INPUTS) - len(_OPTIONS) - _RANKS - 2) // (len(_MEMBER) + 3)
    end = len(_INPUTS) + number * len(_MEMBER) + len(_OPTIONS)
    grads, rest = arguments[end : end + number], arguments[end + number :]
    return _Call(arguments[:end]), grads, rest[0], rest[1:-1], rest[-1]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: what an operator returns may share none."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _places(number: int) -> list[int]:
    """Where what may have a gradient stands among the arguments."""
    starts = range(len(_INPUTS), len(_INPUTS) + number * len(_MEMBER), len(_MEMBER))
    return [0, *(start + place for start in starts for place in _WITH_GRADIENT)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the arguments, tensors and others, and what the forward made."""
    ctx.number = (len(inputs) - len(_INPUTS) - len(_OPTIONS)) // len(_MEMBER)
    are_tensors = [value is None or isinstance(value, Tensor) for value in inputs]
    # what has no value may be an option as well, which is kept all the same
    ctx.save_for_backward(
        *(
            value if is_tensor else None
            for value, is_tensor in zip(inputs, are_tensors, strict=True)
        ),
        *output[ctx.number :],
    )
    ctx.others = [
        None if is_tensor else value for value, is_tensor in zip(inputs, are_tensors, strict=True)
    ]


def _derive(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of each argument, from those of all results."""
    number, others = ctx.number, ctx.others
    saved, made = ctx.saved_tensors[: len(others)], ctx.saved_tensors[len(others) :]
    arguments = [t if other is None else other for t, other in zip(saved, others, strict=True)]
    places = _places(number)
    needs = [ctx.needs_input_grad[place] for place in places]
    operator = getattr(torch.ops.moelora, f"routed_linears_{number}_backward")
    found = operator(*arguments, *grads[:number], grads[number + _STATISTICS], *made, needs)
    results: list[Tensor | None] = [None] * len(arguments)
    for place, needed, gradient in zip(places, needs, found, strict=True):
        results[place] = gradient if needed else None
    return tuple(results)


def _infer(*arguments: Any) -> tuple[Tensor, ...]:
    """The layers' outputs without gradients, capacity and statistics; then decisions or nothing."""
    *own, record = arguments
    call = _Call(own)
    results = routed_linears_inference(
        call.x, call.layers, options=call.options, record=record, backend="triton",
        all_mature=call.layers[0].mature is None,
    )  # fmt: skip
    decisions = [t for r in results for t in (r.router_logits, r.routing_weights) if t is not None]
    decision = call.nothing(call.wide)
    if decisions:
        decision = torch.stack(decisions).unflatten(0, (call.members, 2))
    return *(result.output for result in results), decision


def _infer_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    *own, record = arguments
    call = _Call(own)
    number, shapes = call.members, call.shapes()
    decision = shapes[number + _DECISION]
    return *shapes[:number], decision if record else call.nothing(call.wide)


def _version(x: Tensor) -> Tensor:
    """A tensor of as many elements as ``x`` was changed in place, and one."""
    return torch.empty(0 if x.is_inference() else 1 + x._version, device=x.device)


# not torch.library.custom_op, which looks in every call for results that share memory
_LIBRARY = torch.library.Library("moelora", "FRAGMENT")


def _define(name: str, arguments: Sequence[str], results: int, run: Any, shapes: Any) -> None:
    returned = ", ".join(["Tensor"] * results)
    _LIBRARY.define(f"{name}({', '.join(arguments)}) -> ({returned})")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moelora::{name}", shapes, lib=_LIBRARY)


def _define_all(number: int) -> None:
    """The operators of so many layers."""
    name = f"routed_linears_{number}"
    members = [f"{field}{index}" for index in range(number) for field in _MEMBER]
    layers = (*_INPUTS, *members, *_OPTIONS)
    made = [f"Tensor made{index}" for index in range(_RANKS + 2 * number)]
    grads = [f"Tensor? grad{index}" for index in range(number)]
    _define(name, layers, number + len(made), _forward, _shapes)
    _define(
        f"{name}_backward", (*layers, *grads, "Tensor? pull", *made, "bool[] needs"),
        1 + TENSORS * number, _backward, _backward_shapes,
    )  # fmt: skip
    torch.library.register_autograd(f"moelora::{name}", _derive, setup_context=_keep, lib=_LIBRARY)
    _define(f"{name}_inference", (*layers, "bool record"), number + 1, _infer, _infer_shapes)


for _number in range(1, MAX_MEMBERS + 1):
    _define_all(_number)
_define("version_of", ("Tensor x",), 1, _version, _version)


def version_of(x: Tensor) -> int:
    """A number that grows whenever ``x`` is changed in place, and that a trace knows.

    A trace has no value for ``x._version``. But it knows sizes, from the very tensors that stand
    for its values.

    Args:
        x: any tensor.

    Example:
        >>> version_of(torch.ones(2).mul_(3)) - version_of(torch.ones(2))
        1
    """
    return len(torch.ops.moelora.version_of(x))


def routed_linears_traced(
    x: Tensor,
    members: Sequence[Member],
    *,
    options: RouterOptions,
    is_sparse: bool = False,
    token_mask: Tensor | None = None,
    record: bool = False,
) -> list[RoutedOutput]:
    """:func:`moelora.ops.routed_linears` by Triton's kernels, in a trace.

    Args:
        x: ``(*batch, d_in)``; float32 or bfloat16.
        members: up to three layers of one kind.
        options: how their routers decide.
        is_sparse: compute with the chosen experts only; no expert may be young then, nothing
            dropped out, and padding only under a capacity.
        token_mask: ``(tokens,)`` bool, False for padding, or None.
        record: whether logits and weights are wanted.
    """
    number = len(members)
    name = f"routed_linears_{number}"
    arguments = (
        x, token_mask, *(value for member in members for value in member), options.num_experts,
        options.top_k, options.temperature, options.scaling, options.capacity_factor,
        options.loss_type, is_sparse,
    )  # fmt: skip
    trains = options.capacity_factor is not None or options.loss_type is not None
    statistics: Sequence[Tensor | None] = [None] * number
    if trains or members[0].dropped is not None or torch.is_grad_enabled():
        found = getattr(torch.ops.moelora, name)(*arguments)
        outputs, decision = found[:number], found[number + _DECISION].detach()
        if options.loss_type is not None:
            statistics = found[number + _STATISTICS].unbind()
    else:
        *outputs, decision = getattr(torch.ops.moelora, f"{name}_inference")(*arguments, record)
    decisions: Sequence[Any] = [(None, None)] * number
    if record:
        decisions = [own.unbind() for own in decision.unbind()]
    return [
        RoutedOutput(output, logits, weights, sums)
        for output, (logits, weights), sums in zip(outputs, decisions, statistics, strict=True)
    ]
