"""What transformers' Trainer has to tell a mixture, and a mixture to whoever reads the log."""

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from moelora.binding import base_of
from moelora.config import is_number
from moelora.errors import ConfigError
from moelora.observation import RouterSummary, RoutingObservation
from moelora.scope import scope_of

#: Before a router has seen this many tokens per expert nothing is said of collapse.
_TOKENS_PER_EXPERT = 16
_DETAILS = ("moe/load/", "moe/entropy/", "moe/dropped/")


class MoETrainerCallback(TrainerCallback):
    """Logs what the routers do, warns of collapse, and tells the Trainer's scale of the loss.

    To whatever the Trainer reports to, each time it logs, over all tokens since the last time:

    * ``moe/load/<layer>/<expert>``: the expert's share of the routed slots,
    * ``moe/entropy/<layer>``: mean entropy of the router's probabilities, in nats,
    * ``moe/dropped/<layer>``: share of slots lost to capacity or expert dropout,
    * ``moe/entropy`` and ``moe/dropped``, their means, and ``moe/load_max``, the largest load,
    * ``moe/aux_loss``: the mean auxiliary loss, without its coefficient.

    The last two lines alone are printed and kept in ``state.log_history``, since a large model has
    thousands of experts. Padding counts nowhere, a recomputed block counts once, evaluation counts
    nowhere. For its figures to reach the other callbacks it moves to the front of the list. Several
    processes log the figures of all of them. Compiled forwards count as others do: whatever
    compiled them, they add to sums on the device.

    It also tells the model how the Trainer scales a loss that it computes itself
    (``label_smoothing_factor``, ``compute_loss_func``, a ``compute_loss`` of your own): each of a
    step's ``n`` micro-batches counts ``1 / n`` of the auxiliary loss. A training that raises within
    a step leaves that scale until the next one begins or ends.

    Args:
        log_routing: False logs nothing and warns of nothing.
        collapse_threshold: warn, once per layer, when a router's ``top_k`` busiest experts take
            more than this share of the slots, in (0, 1]; 1 never warns.

    Raises:
        ConfigError: a ``ValueError``, if ``collapse_threshold`` is not in (0, 1].

    Example:
        >>> trainer_callbacks = [MoETrainerCallback()]
    """

    def __init__(self, *, log_routing: bool = True, collapse_threshold: float | int = 0.95) -> None:
        if not is_number(collapse_threshold) or not 0 < collapse_threshold <= 1:
            raise ConfigError(
                f"collapse_threshold must be a number in (0, 1], got {collapse_threshold!r}."
            )
        self.log_routing = log_routing
        self.collapse_threshold = collapse_threshold
        self._observation = RoutingObservation()
        self._collapsed: set[str] = set()

    def on_init_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is the Trainer's
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Move to the front."""
        self._move_to_front()

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Begin to look at the routers."""
        self._move_to_front()
        scope = scope_of(base_of(kwargs["model"]))
        if scope is None or not self.log_routing:
            return
        self._observation = RoutingObservation(base_of(kwargs["model"]))
        self._collapsed = set()
        scope.observers.add(self._observation)
        scope.traced = self._observation.traced

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Tell the scale of this step."""
        batches = _of_caller("current_gradient_accumulation_steps")
        if not isinstance(batches, int) or batches < 1:
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

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Add the routers' figures to a log of the training loss, and warn of collapse."""
        logs = kwargs.get("logs")
        # the Trainer's own log of training, which every process makes
        if not self.log_routing or not isinstance(logs, dict):
            return
        if "loss" not in logs or "learning_rate" not in logs:
            return
        routers, aux_loss = self._observation.take()
        if not routers:
            return
        overview = _overview(routers, aux_loss)
        logs.update({**overview, **_details(routers)})
        if state.log_history:
            state.log_history[-1].update(overview)
        if state.is_world_process_zero:
            self._warn_of_collapse(routers)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Take the scale back, if the last step was left early, and look no more."""
        _tell(kwargs["model"], None)
        scope = scope_of(base_of(kwargs["model"]))
        if scope is not None:
            scope.observers.discard(self._observation)
            scope.traced = None

    def _warn_of_collapse(self, routers: dict[str, RouterSummary]) -> None:
        found = {
            name: router
            for name, router in routers.items()
            if name not in self._collapsed
            and len(router.load) > router.top_k
            and router.tokens >= _TOKENS_PER_EXPERT * len(router.load)
            and router.busiest() > self.collapse_threshold
        }
        if not found:
            return
        self._collapsed.update(found)
        shares = ", ".join(f"{name} ({router.busiest():.0%})" for name, router in found.items())
        warnings.warn(
            f"Routers send nearly all tokens to their top_k busiest experts: {shares}. The other "
            "experts learn nothing there. Raise router_aux_loss_coef or router_temperature, lower "
            "the routers' learning rate (moelora.param_groups), set expert_capacity_factor, or "
            "use fewer experts.",
            stacklevel=2,
        )

    def _move_to_front(self) -> None:
        """Run before the callbacks that write the log; hide details from the one that prints it."""
        callbacks = _of_caller("callbacks")
        if not isinstance(callbacks, list) or self not in callbacks or not self.log_routing:
            return
        callbacks.remove(self)
        callbacks.insert(0, self)
        if any(isinstance(callback, _HideDetails) for callback in callbacks):
            return
        printers = (PrinterCallback, ProgressCallback)
        for index, callback in enumerate(callbacks):
            if isinstance(callback, printers):
                callbacks.insert(index, _HideDetails())
                return


class _HideDetails(TrainerCallback):
    """Takes the figures of single layers out of a log before it is printed."""

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        logs = kwargs.get("logs")
        if isinstance(logs, dict):
            for name in [name for name in logs if name.startswith(_DETAILS)]:
                del logs[name]


def _of_caller(name: str) -> Any:
    """An attribute of the nearest caller that has it; None if none has.

    The Trainer hands callbacks neither itself nor its handler, and importing its class would import
    accelerate for everybody.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, name):
            return getattr(caller, name)
        frame = frame.f_back
    return None


def _overview(routers: dict[str, RouterSummary], aux_loss: float | None) -> dict[str, float]:
    """The figures of the whole model."""
    count = len(routers)
    overview = {
        "moe/entropy": sum(router.entropy for router in routers.values()) / count,
        "moe/dropped": sum(router.dropped for router in routers.values()) / count,
        "moe/load_max": max(max(router.load) for router in routers.values()),
    }
    return overview if aux_loss is None else {**overview, "moe/aux_loss": aux_loss}


def _details(routers: dict[str, RouterSummary]) -> dict[str, float]:
    """The figures of each layer."""
    details = {}
    for name, router in routers.items():
        details[f"moe/entropy/{name}"] = router.entropy
        details[f"moe/dropped/{name}"] = router.dropped
        for expert, load in enumerate(router.load):
            details[f"moe/load/{name}/{expert}"] = load
    return details


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
