"""Host time and kernel launches per adapted linear: what decides small batches in eager mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines import Built, Variant
from benchmarks.cases import Case, Conditions
from benchmarks.correctness import check, expected_of
from benchmarks.shapes import BaseModels, adapted_layers
from benchmarks.steps import build_for, make_step
from benchmarks.timing import Effort, Step, host_time, kernel_profile, summary


@dataclass(frozen=True)
class _Way:
    """Forward without gradients, or a whole training step."""

    name: str
    kind: str


_WAYS = (_Way("forward", "prefill"), _Way("training", "train"))


def _step(conditions: Conditions, variant: Variant, bases: BaseModels, way: _Way) -> Any:
    there = replace(conditions, kind=way.kind)
    built = build_for(there, variant, bases)
    expected = expected_of(variant, built, there)
    step = make_step(built, there)
    return built, step, check(variant, built, there, step, expected)


def linear_host_time(bases: BaseModels, conditions: Conditions, effort: Effort) -> dict[str, float]:
    """Microseconds of the host for one frozen linear, forward and with backward."""
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
    runs = 20 * effort.least
    return {
        name: summary(host_time(step, weight.device, runs=runs))["p50"]
        for name, step in steps.items()
    }


def measure_host(case: Case, bases: BaseModels, effort: Effort) -> dict[str, Any]:
    """Host time per adapted linear in a whole model, training with its losses.

    ``(variant - base) / linears`` is what an adapter adds to one linear, and with the time of a
    plain linear it is one adapted linear's. Both models are measured in turns.
    """
    metrics: dict[str, Any] = {}
    errors: dict[str, float] = {}
    alone = linear_host_time(bases, case.conditions, effort)
    for way in _WAYS:
        built, step, found = _step(case.conditions, case.variant, bases, way)
        errors.update({f"{way.name} {name}": error for name, error in found.items()})
        _, base_step, _ = _step(case.conditions, Variant("base"), bases, way)
        device = next(built.model.parameters()).device
        times, base_times = [], []
        for _ in range(2):
            times += host_time(step, device, runs=effort.most // 2)
            base_times += host_time(base_step, device, runs=effort.most // 2)
        metrics[f"{way.name}_model_us"] = summary(times)
        linears = _linears(built)
        if linears:
            added = (summary(times)["p50"] - summary(base_times)["p50"]) / linears
            metrics[f"{way.name}_added_us_per_linear"] = added
            metrics[f"{way.name}_us_per_linear"] = added + alone[way.name]
    return {"metrics": metrics, "errors": errors}


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
