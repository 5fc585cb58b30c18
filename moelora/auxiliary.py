"""How the auxiliary loss reaches the router: once, with its weight, or not without an error.

* The output holds a loss: ``mean over routers of coefficient * loss`` is added to it, times this
  micro-batch's share of ``num_items_in_batch`` when the trainer passes that.
* It holds none (the loss is computed outside): the gradient is attached to the output, with the
  scale that was told, or 1.
* A router ran without a gradient (reentrant checkpointing): its gradient is attached when its block
  is recomputed in backward, with the scale that the model's loss was found to have.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import AuxLossError
from moelora.losses import auxiliary_loss
from moelora.outputs import with_aux_loss
from moelora.routing import Routing
from moelora.scope import Tape, TapeEntry

_IGNORED_LABEL = -100


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


class _TellScale(torch.autograd.Function):
    """Pass ``loss`` through; in backward leave its gradient's value on the tape.

    All scaling of the loss (accumulation, float16 loss scaler, a mean over devices) is in that
    gradient, and backward comes here before it reaches any block.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, tape: Tape, factor: Tensor | float) -> Tensor:
        ctx.tape = tape
        ctx.factor = factor
        # a copy of one number, since trainers scale their loss in place
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        ctx.tape.deferred_scale = grad_outputs[0] * ctx.factor
        return grad_outputs[0], None, None


def add_auxiliary_loss(
    base: nn.Module,
    output: Any,
    entries: list[TapeEntry],
    kwargs: dict[str, Any],
    *,
    tape: Tape,
    told_scale: float | None,
) -> Any:
    """Return ``output`` with the auxiliary loss of ``entries`` in it.

    Args:
        base: the model, for how it shifts labels.
        output: what its forward returned.
        entries: the router decisions of this training forward.
        kwargs: the forward's keyword arguments.
        tape: where blocks that are recomputed find their scale.
        told_scale: how the trainer scales a loss that it computes itself, where it told.

    Raises:
        AuxLossError: if a router ran without a gradient outside of checkpointing, or the scale of
            the loss cannot be known.
    """
    for entry in entries:
        if entry.lost:
            raise AuxLossError(
                f"The router of {entry.layer_name!r} ran without a gradient while training, so "
                "its auxiliary loss would be lost. If the model calls reentrant checkpointing by "
                "itself, use use_reentrant=False; else set router_aux_loss_coef=0."
            )
    losses = [
        auxiliary_loss(e.routing, loss_type=e.loss_type, token_mask=e.token_mask) for e in entries
    ]
    device = losses[0].device
    mean_loss = torch.stack([loss.to(device) for loss in losses]).mean()
    weighted = torch.stack(
        [e.coefficient * loss.to(device) for e, loss in zip(entries, losses, strict=True)]
    ).mean()
    deferred = any(entry.deferred for entry in entries)
    if _has_loss(output):
        share = _share_of_batch(base, kwargs)
        output = _add_to_loss(output, weighted * share, mean_loss)
        return _tell_scale(output, tape, share / len(entries)) if deferred else output
    scale = _outside_scale(base, device.type, kwargs, told_scale)
    if deferred:
        tape.deferred_scale = scale / len(entries)
    return _attach(output, weighted, mean_loss, scale) if weighted.requires_grad else output


def attach_deferred(entry: TapeEntry, tape: Tape) -> Routing:
    """Attach one router's auxiliary loss to its weights while its block is recomputed.

    Non-reentrant recomputation, whose tape holds no scale, is left as it was.
    """
    routing = entry.routing
    if tape.deferred_scale is None or not routing.router_logits.requires_grad:
        return routing
    loss = auxiliary_loss(routing, loss_type=entry.loss_type, token_mask=entry.token_mask)
    scale = tape.deferred_scale * entry.coefficient
    if isinstance(scale, Tensor):
        scale = scale.to(loss.device)
    weights = _AttachGradient.apply(routing.routing_weights, loss, scale)
    return Routing(routing.router_logits, routing.router_probs, weights, routing.selected_experts)


def _outside_scale(
    base: nn.Module, device_type: str, kwargs: dict[str, Any], told_scale: float | None
) -> float:
    """The scale of a loss that is computed outside of the model."""
    if torch.is_autocast_enabled(device_type) and (
        torch.get_autocast_dtype(device_type) == torch.float16
    ):
        raise AuxLossError(
            "The auxiliary loss cannot follow the float16 loss scaler when the loss is computed "
            "outside the model. Pass labels to the model, use bfloat16, or set "
            "router_aux_loss_coef=0."
        )
    in_trainer = kwargs.get("num_items_in_batch") is not None
    if told_scale is not None and (in_trainer or not _accepts_loss_kwargs(base)):
        return told_scale
    if in_trainer or _is_accumulating():
        raise AuxLossError(
            "The loss is computed outside the model (label_smoothing_factor, compute_loss_func or "
            "a loop of your own), so how it is scaled over accumulated batches is not known. Add "
            "moelora.MoETrainerCallback() to the Trainer's callbacks, pass labels to the model, "
            "or set router_aux_loss_coef=0."
        )
    return 1.0


def _accepts_loss_kwargs(base: nn.Module) -> bool:
    """Whether the Trainer would pass ``num_items_in_batch`` to this model; its own rule."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


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


def _add_to_loss(output: Any, weighted: Tensor, mean_loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (output[0] + weighted.to(output[0].device), *output[1:])
    output = with_aux_loss(output, mean_loss)
    output["loss"] = output["loss"] + weighted.to(output["loss"].device)
    return output


def _tell_scale(output: Any, tape: Tape, factor: Tensor | float) -> Any:
    if isinstance(output, tuple):
        return (_TellScale.apply(output[0], tape, factor), *output[1:])
    output["loss"] = _TellScale.apply(output["loss"], tape, factor)
    return output


def _attach(output: Any, weighted: Tensor, mean_loss: Tensor, scale: float) -> Any:
    if isinstance(output, Tensor):
        return _AttachGradient.apply(output, weighted, scale)
    if isinstance(output, dict):
        key = next((key for key, value in output.items() if _carries_gradient(value)), None)
        if key is None:
            return output
        output = with_aux_loss(output, mean_loss)
        output[key] = _AttachGradient.apply(output[key], weighted, scale)
        return output
    if isinstance(output, tuple):
        attached = list(output)
        for index, value in enumerate(attached):
            if _carries_gradient(value):
                attached[index] = _AttachGradient.apply(value, weighted, scale)
                break
        return tuple(attached)
    raise AuxLossError(
        f"The auxiliary loss cannot be attached to an output of type {type(output).__name__}. "
        "Return a tensor, tuple or ModelOutput, or set router_aux_loss_coef=0."
    )


def _carries_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
