"""Host time and kernel launches per adapted linear: what decides small batches in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines import Built, Variant
from benchmarks.cases import Case, Conditions
from benchmarks.correctness import check, expected_of
from benchmarks.shapes import BaseModels, adapted_layers
from benchmarks.steps import build_for, make_step
from benchmarks.timing import Effort, Step, host_time, kernel_profile, median, summary


@dataclass(frozen=True)
class _Way:
    """Forward without gradients, or a whole training step."""

    name: str
    kind: str


_WAYS = (_Way("forward", "prefill"), _Way("training", "train"))
#: Of turns, so that what slows the host down for a while slows everyone.
_ROUNDS = 5


@dataclass(frozen=True)
class HostSteps:
    """A variant that was found right, ready to be timed.

    Attributes:
        case: which.
        errors: how right, by way.
        steps: by way.
        linears: how many of its layers are adapted.
    """

    case: Case
    errors: dict[str, float]
    steps: dict[str, Step]
    linears: int


def _step(conditions: Conditions, variant: Variant, bases: BaseModels, way: _Way) -> Any:
    there = replace(conditions, kind=way.kind)
    built = build_for(there, variant, bases)
    expected = expected_of(variant, built, there)
    step = make_step(built, there)
    return built, step, check(variant, built, there, step, expected)


def host_steps(case: Case, bases: BaseModels) -> HostSteps:
    """Build and check a variant, forward without gradients and in training with its losses."""
    errors: dict[str, float] = {}
    steps: dict[str, Step] = {}
    linears = 0
    for way in _WAYS:
        built, steps[way.name], found = _step(case.conditions, case.variant, bases, way)
        errors.update({f"{way.name} {name}": error for name, error in found.items()})
        linears = _linears(built)
    return HostSteps(case, errors, steps, linears)


def linear_steps(bases: BaseModels, conditions: Conditions) -> HostSteps:
    """One frozen linear, forward and with backward."""
    base = bases.copy_of(conditions.shape, conditions.dtype)
    weight = next(p for p in base.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1])
    x = torch.randn(1, conditions.tokens, weight.shape[1]).to(weight).requires_grad_()

    def both() -> None:
        output = F.linear(x, weight)
        output.backward(output.detach())

    def forget() -> None:
        x.grad = None

    forward = Step(torch.no_grad()(lambda: F.linear(x, weight)))
    steps = {"forward": forward, "training": Step(both, prepare=forget)}
    return HostSteps(Case(conditions, Variant("linear")), {}, steps, 0)


def measure_hosts(
    joined: Sequence[HostSteps], bases: BaseModels, effort: Effort
) -> list[dict[str, Any]]:
    """Host time per adapted linear of several variants, all in turns with their base.

    ``(variant - base) / linears`` is what an adapter adds to one linear, and with the time of a
    plain linear it is one adapted linear's.

    Args:
        joined: the variants, of one group.
        bases: their base models.
        effort: how often.

    Returns:
        The metrics of each.
    """
    conditions = joined[0].case.conditions
    alone = linear_steps(bases, conditions)
    base = host_steps(Case(conditions, Variant("base")), bases)
    everyone = [alone, base, *joined]
    times: list[dict[str, list[float]]] = [{way.name: [] for way in _WAYS} for _ in everyone]
    for _ in range(_ROUNDS):
        for way in _WAYS:
            for one, found in zip(everyone, times, strict=True):
                # a lone linear is short, so it is run more often
                runs = max(1, effort.most // _ROUNDS) * (10 if one is alone else 1)
                found[way.name] += host_time(one.steps[way.name], bases.device, runs=runs)
    return [
        _metrics(one, found, base=times[1], alone=times[0])
        for one, found in zip(joined, times[2:], strict=True)
    ]


def _metrics(
    one: HostSteps,
    times: dict[str, list[float]],
    *,
    base: dict[str, list[float]],
    alone: dict[str, list[float]],
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, samples in times.items():
        metrics[f"{name}_model_us"] = summary(samples)
        if one.linears:
            added = (median(samples) - median(base[name])) / one.linears
            metrics[f"{name}_added_us_per_linear"] = added
            metrics[f"{name}_us_per_linear"] = added + median(alone[name])
    return metrics


def measure_launches(case: Case, bases: BaseModels) -> dict[str, float]:
    """Kernel launches that an adapter adds to one linear, by way; the profiler counts them."""
    found = {}
    for way in _WAYS:
        built, step, _ = _step(case.conditions, case.variant, bases, way)
        _, base_step, _ = _step(case.conditions, Variant("base"), bases, way)
        launches = _launches(step) - _launches(base_step)
        found[f"{way.name}_added_launches_per_linear"] = launches / max(1, _linears(built))
    return found


def _linears(built: Built) -> int:
    return len(adapted_layers(built.model))


def _launches(step: Step) -> float:
    return kernel_profile(step)[0]["launches"]
