"""The routed ops as a compiler sees them: operators of known shapes, the backward one of them.

``torch.compile`` traces neither launches of kernels nor an autograd function around them. These
operators run what ``routed_triton`` and ``routed_sparse`` compute, one layer at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from moelora.ops.gradients import in_given_dtypes
from moelora.ops.options import Member, RoutedOutput, RouterOptions
from moelora.ops.routed import routed_linears_inference
from moelora.ops.routed_sparse import RoutedLinearsSparse, compact_rows, slots_width
from moelora.ops.routed_triton import FIRST_TENSOR, RoutedLinears, Sizes, pack, sizes_of

_LAYER = (
    "Tensor x, Tensor? token_mask, Tensor? dropped, Tensor? base_weight, Tensor? bias, "
    "Tensor lora_a, Tensor lora_b, Tensor router, Tensor? mature, bool is_conv1d"
)
_OPTIONS = (
    "int num_experts, int top_k, float temperature, float scaling, float? capacity_factor, "
    "str? loss_type, bool is_sparse"
)
#: What a forward makes for backward: packed rows or slots, scaled ranks of all experts or of the
#: chosen ones, logits and weights, statistics, B in the dtype of the input.
_MADE = ("rows", "ranks", "decision", "statistics", "narrow_b")
#: Where these stand among the tensors that the autograd functions save.
_DENSE_PLACES, _SPARSE_PLACES = (1, 2, 3, 5, 7), (1, 5, 2, 4, 6)
_LAYER_ARGUMENTS = 10
#: Input, A, B, router and dropped input among the arguments.
_WITH_GRADIENT = (0, 5, 6, 7, 2)


def _tensors(number: int) -> str:
    """So many results, as a schema writes them."""
    return ", ".join(["Tensor"] * number)


class _Call:
    """An operator's arguments, and what an autograd function's forward and backward ask for.

    Stands for the context that autograd gives them.

    Args:
        arguments: those of ``_LAYER``, then those of ``_OPTIONS``.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.x, self.token_mask, self.dropped, *member = arguments[:_LAYER_ARGUMENTS]
        base_weight, bias, lora_a, lora_b, router, mature, is_conv1d = member
        *router_options, self.is_sparse = arguments[_LAYER_ARGUMENTS:]
        self.member = Member(
            base_weight, bias, lora_a, lora_b, router, mature, is_conv1d, self.dropped
        )
        self.options = RouterOptions(*router_options)
        self.function: Any = RoutedLinearsSparse if self.is_sparse else RoutedLinears
        # as the functions' forward leaves it in the context
        self.members, self.shape, self.are_conv1d = 1, self.x.shape, [is_conv1d]
        self.dtypes = (lora_a.dtype, lora_b.dtype, router.dtype)
        # kernels are made for the parameters' sizes: a trace fixes these, not the number of tokens
        ranks, d_in = map(int, lora_a.shape)
        self.wide = torch.promote_types(self.x.dtype, torch.float32)
        self.sizes: Sizes = sizes_of(ranks, self.options.num_experts, d_in, self.x.dtype)
        # and as autograd does
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep them."""
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:  # noqa: FBT001 - as torch calls it
        """Missing gradients are None here."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing has a gradient here."""

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The output, and what ``_MADE`` lists; empty is what there is none of."""
        mask = None if self.token_mask is None else self.token_mask.contiguous()
        output, *_ = self.function.forward(
            self, self.x, mask, (self.member,), self.options, pack, False
        )
        places = _SPARSE_PLACES if self.is_sparse else _DENSE_PLACES
        made = [self.saved_tensors[place] for place in places]
        # an operator may return none of its arguments, and nothing but tensors
        if made[3] is None:
            made[3] = self.x.new_empty(0, dtype=self.wide)
        if made[4] is self.member.lora_b:
            made[4] = self.x.new_empty(0)
        return output, cast("list[Tensor]", made)

    def shapes(self) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`forward` gives, its values unknown."""
        x, sizes, options = self.x, self.sizes, self.options
        tokens = math.prod(x.shape[:-1])
        if self.is_sparse:
            width = slots_width(tokens, options, sizes)
            rows = x.new_empty(1, width, dtype=torch.int32)
            ranks = x.new_empty(compact_rows(width, sizes), sizes.rank)
        else:
            rows = x.new_empty(sizes.rows, sizes.d_in)
            ranks = x.new_empty(1, tokens, sizes.ranks)
        decision = x.new_empty(1, 2, tokens, sizes.experts, dtype=self.wide)
        has_statistics, lora_b = options.loss_type is not None, self.member.lora_b
        statistics = x.new_empty((1, sizes.statistics) if has_statistics else 0, dtype=self.wide)
        narrow_b = x.new_empty(0 if lora_b.dtype == x.dtype else lora_b.shape)
        output = x.new_empty(*x.shape[:-1], lora_b.shape[0])
        return output, [rows, ranks, decision, statistics, narrow_b]

    def backward(
        self,
        grad: Tensor | None,
        pull: Tensor | None,
        made: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of input, A, B, router and dropped input, those that are needed.

        Args:
            grad: of the output.
            pull: of the statistics, ``(1, ...)``.
            made: as :meth:`forward` gave it.
            needs: which are.
        """
        rows, ranks, decision, statistics, narrow_b = made
        member, flat = self.member, self.x.reshape(-1, self.x.shape[-1])
        sums = None if self.options.loss_type is None else statistics
        narrow_b = member.lora_b if member.lora_b.dtype == self.x.dtype else narrow_b
        mask = None if self.token_mask is None else self.token_mask.contiguous()
        if self.is_sparse:
            self.saved_tensors = (
                flat, rows, decision, mask, sums, ranks, narrow_b, member.base_weight,
                member.lora_a, member.router,
            )  # fmt: skip
        else:
            dropped = [] if self.dropped is None else [self.dropped.reshape(flat.shape)]
            self.saved_tensors = (
                flat, rows, ranks, decision, mask, sums, member.base_weight, narrow_b, *dropped,
            )  # fmt: skip
        self.needs_input_grad = (needs[0], *([False] * (FIRST_TENSOR - 1)), *needs[1:])
        pull = None if pull is None or sums is None else pull[0]
        found = self.function.backward(self, grad, pull, None)
        return [found[0], *found[FIRST_TENSOR:]]


# not torch.library.custom_op, which looks in every call for results that share memory, and no lists
# of tensors, which autograd would flatten: together a fifth of the layer's own time on the host
_LIBRARY = torch.library.Library("moelora", "FRAGMENT")
_LIBRARY.define(f"routed_linear({_LAYER}, {_OPTIONS}) -> ({_tensors(1 + len(_MADE))})")
_LIBRARY.define(
    f"routed_linear_backward({_LAYER}, {_OPTIONS}, Tensor? grad, Tensor? pull, "
    f"{', '.join(f'Tensor {name}' for name in _MADE)}, bool[] needs) -> "
    f"({_tensors(len(_WITH_GRADIENT))})"
)
_LIBRARY.define(f"routed_linear_inference({_LAYER}, {_OPTIONS}, bool record) -> (Tensor, Tensor)")


@torch.library.impl(_LIBRARY, "routed_linear", "CompositeExplicitAutograd")
@in_given_dtypes
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """A layer's output, and what backward reads."""
    output, made = _Call(arguments).forward()
    return output, *made


@torch.library.register_fake("moelora::routed_linear", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    output, made = _Call(arguments).shapes()
    return output, *made


@torch.library.impl(_LIBRARY, "routed_linear_backward", "CompositeExplicitAutograd")
@in_given_dtypes
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of input, A, B, router and dropped input; empty where none is needed."""
    *own, grad, pull, rows, ranks, decision, statistics, narrow_b, needs = arguments
    call = _Call(own)
    with torch.no_grad():
        found = call.backward(grad, pull, (rows, ranks, decision, statistics, narrow_b), needs)
    return tuple(
        _alone(gradient) if needed and gradient is not None else call.x.new_empty(0)
        for gradient, needed in zip(found, needs, strict=True)
    )


@torch.library.register_fake("moelora::routed_linear_backward", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *own, _grad, _pull, _rows, _ranks, _decision, _statistics, _narrow_b, needs = arguments
    call = _Call(own)
    inputs = (call.x, *call.member.differentiable)
    return tuple(
        tensor.new_empty(tensor.shape) if needed and tensor is not None else call.x.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: what an operator returns may share none."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _LAYER_ARGUMENTS - 1], *output[1:])
    ctx.rest = inputs[_LAYER_ARGUMENTS - 1 :]


def _derive(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    number = _LAYER_ARGUMENTS - 1
    tensors, made = ctx.saved_tensors[:number], ctx.saved_tensors[number:]
    needs = [ctx.needs_input_grad[place] for place in _WITH_GRADIENT]
    found = torch.ops.moelora.routed_linear_backward(
        *tensors, *ctx.rest, grads[0], grads[1 + _MADE.index("statistics")], *made, needs
    )
    results: list[Tensor | None] = [None] * (len(tensors) + len(ctx.rest))
    for place, needed, gradient in zip(_WITH_GRADIENT, needs, found, strict=True):
        results[place] = gradient if needed else None
    return tuple(results)


torch.library.register_autograd(
    "moelora::routed_linear", _derive, setup_context=_keep, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "routed_linear_inference", "CompositeExplicitAutograd")
def _infer(*arguments: Any) -> tuple[Tensor, Tensor]:
    """A layer's output without gradients, capacity and statistics; and its decision or nothing."""
    *own, record = arguments
    call = _Call(own)
    result = routed_linears_inference(
        call.x, (call.member,), options=call.options, record=record, backend="triton",
        all_mature=call.member.mature is None,
    )[0]  # fmt: skip
    if result.router_logits is None or result.routing_weights is None:
        return result.output, call.x.new_empty(0, dtype=call.wide)
    return result.output, torch.stack([result.router_logits, result.routing_weights])


@torch.library.register_fake("moelora::routed_linear_inference", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *own, record = arguments
    output, (_, _, decision, _, _) = _Call(own).shapes()
    return output, decision[0] if record else decision.new_empty(0)


def routed_linear_traced(
    x: Tensor,
    member: Member,
    *,
    options: RouterOptions,
    is_sparse: bool = False,
    token_mask: Tensor | None = None,
    record: bool = False,
) -> RoutedOutput:
    """:func:`moelora.ops.routed_linears` of one layer by Triton's kernels, in a trace.

    Args:
        x: ``(*batch, d_in)``; float32 or bfloat16.
        member: the layer.
        options: how its router decides.
        is_sparse: compute with the chosen experts only; no expert may be young then, none dropped
            out, and padding only under a capacity.
        token_mask: ``(tokens,)`` bool, False for padding, or None.
        record: whether logits and weights are wanted.
    """
    arguments = (
        x, token_mask, member.dropped, *member[:7], options.num_experts, options.top_k,
        options.temperature, options.scaling, options.capacity_factor, options.loss_type, is_sparse,
    )  # fmt: skip
    trains = options.capacity_factor is not None or options.loss_type is not None
    if not (trains or member.dropped is not None or torch.is_grad_enabled()):
        output, decision = torch.ops.moelora.routed_linear_inference(*arguments, record)
        logits, weights = decision.unbind() if record else (None, None)
        return RoutedOutput(output, logits, weights, None)
    output, *made = torch.ops.moelora.routed_linear(*arguments)
    decision, statistics = made[_MADE.index("decision")].detach(), None
    logits, weights = decision[0].unbind() if record else (None, None)
    if options.loss_type is not None:
        statistics = made[_MADE.index("statistics")][0]
    return RoutedOutput(output, logits, weights, statistics)
