"""What a validation found: plain data, and its JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moelora.validation.agreement import Comparison
from moelora.validation.speed import Measured

BINS = 20


@dataclass(frozen=True)
class Usage:
    """What the checkpoint's router did with the inputs.

    Attributes:
        over_time: mean routing weight of each expert, for each batch in order.
        histogram: for each expert, how many weights fell into each of 20 equal parts of [0, 1].
        entropy: mean entropy of a token's weights, divided by that of even ones.
    """

    over_time: list[list[float]]
    histogram: list[list[int]]
    entropy: float


@dataclass(frozen=True)
class Speed:
    """The ways at one number of experts.

    Attributes:
        experts: the number.
        ways: each one's figures.
    """

    experts: int
    ways: list[Measured]

    def way(self, name: str) -> Measured | None:
        """The figures of one way, or None."""
        return next((way for way in self.ways if way.way == name), None)

    @property
    def new(self) -> Measured:
        """The single pass; where the experts cannot be stacked, the attached router."""
        return self.way("one_pass") or self.ways[-1]

    def speed_up(self, name: str, *, training: bool = False) -> float | None:
        """How many times faster the single pass is than another way, by medians.

        Args:
            name: of the other way.
            training: compare training steps, not forwards.
        """
        other, new = self.way(name), self.new
        old_time = None if other is None else (other.step if training else other.forward)
        new_time = new.step if training else new.forward
        if old_time is None or new_time is None or new_time.median == 0:
            return None
        return old_time.median / new_time.median

    def memory_ratio(self, name: str = "lora", *, training: bool = False) -> float | None:
        """Peak memory of the single pass, parameters included, divided by another way's.

        Args:
            name: of the other way.
            training: compare training steps, not forwards.
        """
        other, new = self.way(name), self.new
        if other is None:
            return None
        peaks = (
            (new.step_peak, other.step_peak) if training else (new.forward_peak, other.forward_peak)
        )
        if peaks[0] is None or peaks[1] is None:
            return None
        return (new.resident + peaks[0]) / (other.resident + peaks[1])


@dataclass(frozen=True)
class Report:
    """All that a validation found.

    Attributes:
        settings: how it was run.
        versions: of what it ran on.
        checkpoint: what was validated.
        comparisons: output against output.
        speed: for each number of experts.
        usage: None if the checkpoint has no router.
        memory_method: how memory was measured; None if it was not.
        notes: what a person should know.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    checkpoint: dict[str, Any]
    comparisons: list[Comparison]
    speed: list[Speed]
    usage: Usage | None
    memory_method: str | None
    notes: list[str]

    @property
    def agrees(self) -> bool:
        """Whether every comparison agrees of which that is demanded."""
        return all(one.agrees for one in self.comparisons if one.demanded)


def to_json(report: Report) -> str:
    """The report as one JSON object; numbers that JSON lacks (NaN, infinity) become strings.

    Args:
        report: what to write.
    """
    content = dataclasses.asdict(report)
    content["agrees"] = report.agrees
    content["speed_ups"] = [_ratios(speed) for speed in report.speed]
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _ratios(speed: Speed) -> dict[str, Any]:
    others = ("n_plus_1", "two_passes", "attached", "lora")
    return {
        "experts": speed.experts,
        "forward": {name: speed.speed_up(name) for name in others},
        "step": {name: speed.speed_up(name, training=True) for name in others},
        "memory_to_one_lora": {
            "forward": speed.memory_ratio(),
            "step": speed.memory_ratio(training=True),
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def usage_of(weights: Sequence[Tensor]) -> Usage | None:
    """Summarise routing weights ``(tokens, experts)``, one tensor for each batch.

    Args:
        weights: on the CPU, in order; none means that nothing routes.
    """
    if not weights:
        return None
    experts = weights[0].shape[-1]
    histogram = [[0] * BINS for _ in range(experts)]
    entropies = []
    for batch in weights:
        parts = (batch.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
        for expert in range(experts):
            counts = parts[:, expert].bincount(minlength=BINS).tolist()
            histogram[expert] = [a + b for a, b in zip(histogram[expert], counts, strict=True)]
        shares = batch.clamp(min=0)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        # x log x is 0 at 0
        terms = shares * shares.clamp(min=1e-12).log()
        entropies.append(float(-terms.sum(dim=-1).mean()))
    even = math.log(experts) if experts > 1 else 1.0
    return Usage(
        over_time=[batch.mean(dim=0).tolist() for batch in weights],
        histogram=histogram,
        entropy=sum(entropies) / len(entropies) / even,
    )
