"""How the auxiliary loss reaches the router: once, with its weight, or not without an error.

* The output holds a loss: ``mean over routers of coefficient * loss`` is added to it, times this
  micro-batch's share of ``num_items_in_batch`` when the trainer passes that.
* Which of its outputs a forward's caller uses shows in backward only (a trainer may compute the
  loss itself from logits, or scale ``outputs.aux_loss`` itself), so all of them pass one autograd
  node: if neither the loss nor ``aux_loss`` was used, it attaches the gradient, with the scale that
  was told, or 1; if that cannot be known, it raises.
* A router ran without a gradient (reentrant checkpointing): its gradient is attached when its block
  is recomputed, with the scale that the node has found; it comes before every block in backward.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from moelora.distributed import average_over_ranks, number_of_ranks, statistics_of
from moelora.errors import AuxLossError
from moelora.losses import auxiliary_losses, gradient_by_statistics, loss_of_statistics
from moelora.ops.gradients import is_autocast
from moelora.outputs import carried_tensors, with_aux_loss, with_tensors
from moelora.routing import Routing
from moelora.scope import RoutingScope, Tape, TapeEntry
from moelora.traced import deliver_traced

_IGNORED_LABEL = -100
_FLOAT16 = (
    "The auxiliary loss cannot follow the float16 loss scaler when the loss is computed outside "
    "the model. Pass labels to the model, use bfloat16, or set router_aux_loss_coef=0."
)
_UNKNOWN_SCALE = (
    "The loss is computed outside the model (label_smoothing_factor, compute_loss_func, a trainer "
    "or a loop of your own), so how it is scaled over accumulated batches is not known. Add "
    "moelora.MoETrainerCallback() to the Trainer's callbacks, use the loss that the model returns "
    "for labels, set router_aux_loss_coef in TRL's config, or set router_aux_loss_coef=0 in the "
    "mixture's."
)


class _AttachGradient(torch.autograd.Function):
    """Pass ``output`` through; in backward give ``loss`` the gradient ``scale``.

    Source: Megatron-LM's MoEAuxLossAutoScaler; here the scale is an argument, not global state.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.scale = scale
        ctx.loss_like = loss.new_ones(())
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None]:
        return grad_outputs[0], ctx.loss_like * ctx.scale, None


@dataclass
class _Delivery:
    """What one forward's node needs to know in backward.

    Attributes:
        tape: where blocks that are recomputed find their scale.
        routers: how many there are, of whose losses the mean is taken.
        deferred: whether some of them wait for the recomputation of their block.
        loss_scale: the gradient of the model's loss by the weighted mean; None without a loss.
        outside_scale: the same for a loss that is computed outside, or why it cannot be known.
    """

    tape: Tape
    routers: int
    deferred: bool
    loss_scale: Tensor | float | None
    outside_scale: float | str


class _Deliver(torch.autograd.Function):
    """Pass all outputs of a forward through; in backward see which of them were used.

    All scaling of a loss (accumulation, float16 loss scaler, a mean over devices) is in its
    gradient, and backward comes here before it reaches any block. Source: Megatron-LM's
    MoEAuxLossAutoScaler attaches always, with a scale that is global state.
    """

    @staticmethod
    def forward(
        ctx: Any, delivery: _Delivery, weighted: Tensor, mean: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.delivery = delivery
        ctx.weighted_like = weighted.new_ones(())
        # aliases without a view's ties, since callers change logits in place; copies of single
        # numbers, since trainers scale their loss in place
        return mean.clone(), *(t.clone() if t.ndim == 0 else t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        delivery, (grad_mean, *grads) = ctx.delivery, grad_outputs
        in_loss = None
        if delivery.loss_scale is not None and grads[0] is not None:
            in_loss = grads[0] * delivery.loss_scale
        attached = None
        if in_loss is None and grad_mean is None:
            if isinstance(delivery.outside_scale, str):
                raise AuxLossError(delivery.outside_scale)
            attached = ctx.weighted_like * delivery.outside_scale
        if delivery.deferred:
            weighted_scale = attached if in_loss is None else in_loss
            delivery.tape.deferred = (
                0.0 if weighted_scale is None else weighted_scale / delivery.routers,
                0.0 if grad_mean is None else grad_mean / delivery.routers,
            )
        return None, attached, grad_mean, *grads


def add_auxiliary_loss(
    base: nn.Module, output: Any, kwargs: dict[str, Any], *, tape: Tape, scope: RoutingScope
) -> Any:
    """Close the tape and return ``output`` with the auxiliary loss of its decisions in it.

    Args:
        base: the model, for how it shifts labels.
        output: what its forward returned.
        kwargs: the forward's keyword arguments.
        tape: the router decisions of this forward.
        scope: who looks on, and how the trainer scales a loss that it computes itself.

    Raises:
        AuxLossError: if a router ran without a gradient outside of checkpointing, or the scale of
            the loss cannot be known.
    """
    seen = tape.close()
    entries = [entry for entry in seen if entry.coefficient != 0]
    if not entries:
        _show(seen, None, tape, scope)
        return with_aux_loss(output, _zero_like(output)) if tape.asked else output
    if tape.training:
        _check_not_lost(entries)
    mean, weighted = router_losses(entries)
    _show(seen, mean, tape, scope)
    has_loss = _has_loss(output)
    outside = _outside_scale(mean.device.type, kwargs, scope.aux_loss_scale)
    if not tape.training:
        return with_aux_loss(output, mean)
    if isinstance(outside, str) and not (has_loss or tape.asked):
        raise AuxLossError(outside)
    share = None
    if has_loss:
        share = _share_of_batch(base, kwargs)
        output = _add_to_loss(output, weighted * share)
    deferred = any(entry.deferred for entry in entries)
    if weighted.requires_grad or deferred:
        delivery = _Delivery(tape, len(entries), deferred, share, outside)
        output, mean = _delivered(output, weighted, mean, delivery)
    return with_aux_loss(output, mean)


def router_losses(entries: list[TapeEntry]) -> tuple[Tensor, Tensor]:
    """The mean over routers of their loss, and of coefficient times loss."""
    groups: dict[tuple[Any, ...], list[TapeEntry]] = {}
    for number, entry in enumerate(_joined(entries)):
        kind = _traced_kind(number, entry) if torch.compiler.is_compiling() else _kind(entry)
        groups.setdefault(kind, []).append(entry)
    sums = [(group[0].coefficient, _losses(group).sum()) for group in groups.values()]
    device = sums[0][1].device
    mean = torch.stack([total.to(device) for _, total in sums]).sum() / len(entries)
    if len({coefficient for coefficient, _ in sums}) == 1:
        return mean, sums[0][0] * mean
    weighted = torch.stack([coefficient * total.to(device) for coefficient, total in sums])
    return mean, weighted.sum() / len(entries)


def _joined(entries: list[TapeEntry]) -> list[TapeEntry]:
    """The same entries; those of ``over_ranks`` with the statistics of all processes' tokens.

    One collective for all of them: grouped like the losses, ranks might disagree on the groups.
    """
    joining = [entry for entry in entries if entry.over_ranks]
    if not joining or number_of_ranks() == 1:
        return entries
    averaged = iter(average_over_ranks([_statistics(entry) for entry in joining]))
    return [
        entry._replace(statistics=(next(averaged), _num_experts(entry)), token_mask=None)
        if entry.over_ranks
        else entry
        for entry in entries
    ]


def _statistics(entry: TapeEntry) -> Tensor:
    """A router's statistics, without the padding of a fused op."""
    if entry.statistics is None:
        return statistics_of(_routing_of(entry), token_mask=entry.token_mask)
    values, num_experts = entry.statistics
    width = (len(values) - 2) // 3
    means = values[:-2].reshape(3, width)[:, :num_experts].reshape(-1)
    return torch.cat([means, values[-2:]])


def _num_experts(entry: TapeEntry) -> int:
    return entry.statistics[1] if entry.statistics else _routing_of(entry).router_probs.shape[-1]


def _kind(entry: TapeEntry) -> tuple[Any, ...]:
    """What routers must have in common for their losses to be computed together."""
    if entry.statistics is not None:
        values, num_experts = entry.statistics
        shape: tuple[int, ...] = (num_experts, len(values))
    else:
        values, shape = _routing_of(entry).router_probs, _routing_of(entry).router_probs.shape
    mask = None if entry.token_mask is None else entry.token_mask.data_ptr()
    fused = entry.statistics is not None
    top_k = 0 if fused else _routing_of(entry).selected_experts.shape[-1]
    return fused, values.device, shape, top_k, entry.loss_type, entry.coefficient, mask


def _traced_kind(number: int, entry: TapeEntry) -> tuple[Any, ...]:
    """The same in a trace, where a size as a key would fix it and a mask has no address."""
    if entry.statistics is None:
        return (number,)
    values, num_experts = entry.statistics
    return values.device, len(values), num_experts, entry.loss_type, entry.coefficient


def _losses(group: list[TapeEntry]) -> Tensor:
    """The loss of each router of one kind."""
    first = group[0]
    if first.statistics is not None:
        rows = [entry.statistics[0] for entry in group if entry.statistics is not None]
        return loss_of_statistics(
            torch.stack(rows), num_experts=first.statistics[1], loss_type=first.loss_type
        )
    routings = [_routing_of(entry) for entry in group]
    return auxiliary_losses(routings, loss_type=first.loss_type, token_mask=first.token_mask)


def _routing_of(entry: TapeEntry) -> Routing:
    if entry.routing is None:
        raise AuxLossError(f"The router of {entry.layer_name!r} left no decision.")
    return entry.routing


def _show(seen: list[TapeEntry], mean: Tensor | None, tape: Tape, scope: RoutingScope) -> None:
    """Let observers look at a training forward's decisions."""
    if not (seen and tape.observed):
        return
    if torch.compiler.is_compiling():
        if scope.traced is not None:
            scope.traced.add(seen, mean)
        return
    for observer in scope.observers:
        observer.observe(seen, None if mean is None else mean.detach())


def _zero_like(output: Any) -> Tensor:
    """The auxiliary loss of a forward in which no router chose."""
    carried = carried_tensors(output, has_loss=False) or {}
    device = next((tensor.device for tensor in carried.values()), None)
    return torch.zeros((), device=device)


def _check_not_lost(entries: list[TapeEntry]) -> None:
    for entry in entries:
        if entry.lost:
            raise AuxLossError(
                f"The router of {entry.layer_name!r} ran without a gradient while training, so "
                "its auxiliary loss would be lost. If the model calls reentrant checkpointing by "
                "itself, use use_reentrant=False; else set router_aux_loss_coef=0."
            )


def _delivered(
    output: Any, weighted: Tensor, mean: Tensor, delivery: _Delivery
) -> tuple[Any, Tensor]:
    """Let all outputs and ``mean`` pass the node; return them."""
    carried = carried_tensors(output, has_loss=delivery.loss_scale is not None)
    if carried is None:
        raise AuxLossError(
            f"The auxiliary loss cannot be attached to an output of type {type(output).__name__}. "
            "Return a tensor, tuple or ModelOutput, or set router_aux_loss_coef=0."
        )
    if not carried:
        return output, mean
    node: Any = _Deliver.apply
    if torch.compiler.is_compiling():
        if not delivery.deferred:
            return _delivered_in_trace(output, carried, weighted, mean, delivery)
        node = _deliver_untraced
    mean, *passed = node(delivery, weighted, mean, *carried.values())
    return with_tensors(output, dict(zip(carried, passed, strict=True))), mean


# as torch.compiler.disable, but that imports the compiler here
@_disable_dynamo
def _deliver_untraced(delivery: _Delivery, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Break the trace, as reentrant checkpointing has done already."""
    passed: tuple[Tensor, ...] = _Deliver.apply(delivery, *tensors)
    return passed


def _delivered_in_trace(
    output: Any,
    carried: dict[tuple[Any, ...], Tensor],
    weighted: Tensor,
    mean: Tensor,
    delivery: _Delivery,
) -> tuple[Any, Tensor]:
    """The same in a trace, where an output that was not used has a gradient of zero."""
    watched = 1 if delivery.loss_scale is None else 2
    mean, *passed = deliver_traced(
        weighted,
        (mean, *carried.values()),
        watched=watched,
        outside_scale=delivery.outside_scale,
    )
    return with_tensors(output, dict(zip(carried, passed, strict=True))), mean


def attach_deferred(result: Tensor, entry: TapeEntry, tape: Tape) -> Tensor:
    """Attach one router's auxiliary loss to what it led to while its block is recomputed.

    Non-reentrant recomputation, whose tape holds no scale, is left as it was.

    Args:
        result: the routing weights, or the layer's output.
        entry: the decision that the recomputation made.
        tape: the closed tape of the forward.
    """
    if entry.coefficient == 0 or tape.deferred is None or not entry.has_graph:
        return result
    weighted_scale, plain_scale = tape.deferred
    scale = weighted_scale * entry.coefficient + plain_scale
    if entry.statistics is not None and not entry.over_ranks:
        # layer by layer, the loss itself would cost three times as many small operations
        loss, num_experts = entry.statistics
        slope: Tensor | float = gradient_by_statistics(
            loss.detach(), num_experts=num_experts, loss_type=entry.loss_type
        )
    else:
        loss, slope = _losses(_joined([entry])).sum(), 1.0
    if isinstance(scale, Tensor):
        scale = scale.to(loss.device)
    attached: Tensor = _AttachGradient.apply(result, loss, slope * scale)
    return attached


def _outside_scale(
    device_type: str, kwargs: dict[str, Any], told_scale: float | None
) -> float | str:
    """The scale of a loss that is computed outside of the model, or why it cannot be known."""
    if is_autocast(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
        return _FLOAT16
    if told_scale is not None:
        return told_scale
    if kwargs.get("num_items_in_batch") is not None or _is_accumulating():
        return _UNKNOWN_SCALE
    return 1.0


def _is_accumulating() -> bool:
    """Whether accelerate (and so the Trainer) is between the micro-batches of one step."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return False
    gradients = state.GradientState()
    return gradients.in_dataloader and not gradients.sync_gradients


def _has_loss(output: Any) -> bool:
    """Whether the model computed a loss; in a tuple it comes first and is the one scalar."""
    first = output.get("loss") if isinstance(output, dict) else None
    if isinstance(output, tuple) and output:
        first = output[0]
    return isinstance(first, Tensor) and first.ndim == 0


def _share_of_batch(base: nn.Module, kwargs: dict[str, Any]) -> float | Tensor:
    """This micro-batch's part of the accumulated batch.

    With ``num_items_in_batch`` the trainer sums micro-batch losses without dividing, so a term that
    is a mean of its own must bring the divisor along.
    """
    total = kwargs.get("num_items_in_batch")
    labels = kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    shift_labels = kwargs.get("shift_labels")
    if isinstance(shift_labels, Tensor):
        labels = shift_labels
    elif _shifts_labels(base):
        labels = labels[..., 1:]
    share: Tensor = labels.ne(_IGNORED_LABEL).sum() / total
    return share


def _shifts_labels(base: nn.Module) -> bool:
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(base, "loss_type", None) == "ForCausalLM"


def _add_to_loss(output: Any, weighted: Tensor) -> Any:
    if isinstance(output, tuple):
        return (output[0] + weighted.to(output[0].device), *output[1:])
    output["loss"] = output["loss"] + weighted.to(output["loss"].device)
    return output
