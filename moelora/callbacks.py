"""What transformers' Trainer has to tell a mixture."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moelora.model import base_of, scope_of


class MoETrainerCallback(TrainerCallback):
    """Tells the model how the Trainer scales losses over accumulated batches.

    Needed where the Trainer computes the loss itself (``label_smoothing_factor``,
    ``compute_loss_func``); harmless elsewhere. Each micro-batch's auxiliary loss then counts
    ``1 / gradient_accumulation_steps``.

    Example:
        >>> trainer_callbacks = [MoETrainerCallback()]
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Tell the scale."""
        _tell(kwargs["model"], 1.0 / args.gradient_accumulation_steps)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Take it back."""
        _tell(kwargs["model"], None)


def _tell(model: nn.Module, scale: float | None) -> None:
    scope = scope_of(base_of(model))
    if scope is not None:
        scope.aux_loss_scale = scale
