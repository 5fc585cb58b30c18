"""What transformers' Trainer has to tell a mixture."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moelora.binding import base_of
from moelora.scope import scope_of


class MoETrainerCallback(TrainerCallback):
    """Tells the model how the Trainer scales losses over accumulated batches.

    Needed where the Trainer computes the loss itself (``label_smoothing_factor``,
    ``compute_loss_func``); harmless elsewhere. Each of a step's ``n`` micro-batches then counts
    ``1 / n`` of the auxiliary loss. A training that raises within a step leaves the scale until the
    next one begins or ends.

    Example:
        >>> trainer_callbacks = [MoETrainerCallback()]
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the signature is the Trainer's
        **kwargs: Any,
    ) -> None:
        """Tell the scale of this step."""
        batches = _micro_batches(
            args.gradient_accumulation_steps, state.global_step, kwargs.get("train_dataloader")
        )
        _tell(kwargs["model"], 1.0 / batches)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Take it back."""
        _tell(kwargs["model"], None)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Take it back, if the last step was left early."""
        _tell(kwargs["model"], None)


def _micro_batches(accumulation_steps: int, global_step: int, dataloader: Any) -> int:
    """How many micro-batches this step has: the last one of an epoch may have fewer."""
    try:
        per_epoch = len(dataloader)
    except TypeError:  # an iterable data set has no length
        return accumulation_steps
    remainder = per_epoch % accumulation_steps
    steps_per_epoch = -(-per_epoch // accumulation_steps)
    is_last = steps_per_epoch > 0 and global_step % steps_per_epoch == steps_per_epoch - 1
    return remainder if remainder and is_last else accumulation_steps


def _tell(model: nn.Module, scale: float | None) -> None:
    scope = scope_of(base_of(model))
    if scope is not None:
        scope.aux_loss_scale = scale
