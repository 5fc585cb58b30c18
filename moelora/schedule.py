"""The learning rate of a new expert: high while it is seeded, low while it consolidates."""

from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moelora.config import is_int, is_number
from moelora.errors import ConfigError


class TwoPhaseSchedule(LRScheduler):
    """Two phases: seeding at the optimiser's own rates, then consolidation at a fraction of them.

    The factor on each group's rate rises from 0 to 1 over ``warmup_steps``, stays 1 until
    ``seeding_steps`` are done (warm-up included), falls in a straight line over
    ``transition_steps`` and stays at ``consolidation_factor``. :meth:`restart` begins anew with the
    next expert. Groups that join the optimiser later follow, from the rate they came with.

    Use it as any of torch's schedulers, or give ``Trainer(optimizers=(optimizer, schedule))`` both.

    Args:
        optimizer: the optimiser, made with the rates of the seeding phase.
        seeding_steps: steps of the first phase, at least 1.
        consolidation_factor: what the rates are multiplied by in the second phase, in (0, 1].
        warmup_steps: steps until the full rate, less than ``seeding_steps``.
        transition_steps: steps of the second phase in which the rate falls; 0 for at once.
        last_epoch: steps already done; -1 for a new training.

    Raises:
        ConfigError: if a number is out of its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = TwoPhaseSchedule(optimizer, seeding_steps=2, consolidation_factor=0.25)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 0.25, 0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        seeding_steps: int,
        consolidation_factor: float = 0.1,
        warmup_steps: int = 0,
        transition_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        steps = {
            "seeding_steps": (seeding_steps, 1),
            "warmup_steps": (warmup_steps, 0),
            "transition_steps": (transition_steps, 0),
        }
        for name, (value, least) in steps.items():
            if not is_int(value) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if warmup_steps >= seeding_steps:
            raise ConfigError(
                f"warmup_steps must be less than seeding_steps={seeding_steps}, got {warmup_steps}."
            )
        if not is_number(consolidation_factor) or not 0 < consolidation_factor <= 1:
            raise ConfigError(
                f"consolidation_factor must be a number in (0, 1], got {consolidation_factor!r}."
            )
        self.seeding_steps = seeding_steps
        self.consolidation_factor = float(consolidation_factor)
        self.warmup_steps = warmup_steps
        self.transition_steps = transition_steps
        self.started_at = 0
        super().__init__(optimizer, last_epoch)

    @property
    def phase(self) -> Literal["seeding", "consolidation"]:
        """The phase that the next optimiser step belongs to."""
        return "seeding" if self._done() < self.seeding_steps else "consolidation"

    def restart(self) -> None:
        """Begin the seeding phase again with the next optimiser step, for the next expert."""
        self.started_at = self.last_epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            _set_rate(group, rate)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        """The rate of each group for the next step: its own times the phase's factor."""
        factor = self._factor()
        rates = []
        for number, group in enumerate(self.optimizer.param_groups):
            group.setdefault("initial_lr", group["lr"])
            known = number < len(self.base_lrs)
            rates.append((self.base_lrs[number] if known else group["initial_lr"]) * factor)
        return rates

    def _done(self) -> int:
        return self.last_epoch - self.started_at

    def _factor(self) -> float:
        done = self._done()
        if done < self.warmup_steps:
            return (done + 1) / (self.warmup_steps + 1)
        if done < self.seeding_steps:
            return 1.0
        fallen = min(1.0, (done - self.seeding_steps + 1) / (self.transition_steps + 1))
        return 1.0 + fallen * (self.consolidation_factor - 1.0)


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    """Change a rate that may be a tensor (capturable optimisers keep theirs in place)."""
    if hasattr(group["lr"], "fill_"):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
