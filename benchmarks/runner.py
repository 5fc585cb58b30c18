"""Runs cases one by one: build, check, then measure; every outcome becomes a result."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import Built
from benchmarks.cases import COMPILED, Case, groups_of
from benchmarks.correctness import (
    WrongResultError,
    check,
    expected_of,
    is_judged_in_float32,
)
from benchmarks.hosttime import HostSteps, host_steps, measure_hosts, measure_launches
from benchmarks.memory import (
    Neighbours,
    growth,
    is_counted,
    peak_above_weights,
    refuse_growth,
)
from benchmarks.ops import measure_op
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.shapes import DTYPES, BaseModels
from benchmarks.steps import build_for, make_step
from benchmarks.timing import Effort, Step, kernel_profile, release, time_steps

FORMAT = 1


@dataclass
class Runner:
    """Measures cases on one device.

    Attributes:
        device: where.
        effort: how long per case.
        seconds: after so long no case is started.
        leak_steps: steps of a leak case.
        profile: number of kernels to list per case; 0 for none.
    """

    device: torch.device
    effort: Effort = field(default_factory=Effort)
    seconds: float = float("inf")
    leak_steps: int = 200
    profile: int = 0
    began: float = field(default_factory=time.monotonic)
    _bases: BaseModels | None = None
    _ceilings: dict[str, Ceilings] = field(default_factory=dict)

    @property
    def bases(self) -> BaseModels:
        """The base models of this run."""
        if self._bases is None:
            self._bases = BaseModels(self.device)
        return self._bases

    @property
    def looks_at_kernels(self) -> bool:
        """Whether there is a device whose kernels can be counted."""
        return self.device.type == "cuda"

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def run(self, cases: Sequence[Case]) -> Iterable[dict[str, Any]]:
        """Measure ``cases``; yields each result as soon as it is there."""
        for conditions, members in groups_of(cases).items():
            if conditions.in_turns:
                yield from self._group_in_turns(members)
            elif conditions.kind == "host":
                yield from self._host_group(members)
            else:
                for case in members:
                    yield self._outcome(case)

    def _outcome(self, case: Case) -> dict[str, Any]:
        if self.elapsed > self.seconds:
            return result_of(case, status="skipped", reason="no time left")
        began = self.elapsed
        result = guarded(case, lambda: self._measure(case))
        result["took_s"] = round(self.elapsed - began, 2)
        if case.conditions.mode in COMPILED:
            torch.compiler.reset()
        release(self.device)
        return result

    def ceilings(self, dtype: str) -> Ceilings:
        """The machine's ceilings for a dtype, measured once."""
        if dtype not in self._ceilings:
            self._ceilings[dtype] = measure_ceilings(self.device, DTYPES[dtype])
        return self._ceilings[dtype]

    def measured_ceilings(self) -> dict[str, dict[str, float]]:
        """All ceilings of this run by dtype."""
        return {dtype: asdict(found) for dtype, found in self._ceilings.items()}

    def _measure(self, case: Case) -> dict[str, Any]:
        kind = case.conditions.kind
        if kind == "op":
            peak = self.ceilings(case.conditions.dtype)
            return measure_op(
                case.variant, case.conditions, self.device, effort=self.effort, peak=peak
            )
        built = build_for(case.conditions, case.variant, self.bases)
        if kind == "leak":
            return self._leak(case, built)
        return self._model(case, built)

    def _model(self, case: Case, built: Built) -> dict[str, Any]:
        """Look at memory, check, then time; the kernels come when every case has been timed."""
        memory = self._eager_peak(case, built)
        errors, step = self._checked(case, built)
        (metrics,) = time_steps([step], self.device, self.effort)
        return {"metrics": {**metrics, **memory}, "errors": errors}

    def look_at_kernels(self, case: Case) -> dict[str, Any]:
        """What a case that was timed does on the device: ``metrics``, and ``kernels`` if asked for.

        The profiler leaves its hooks in the driver, which every later launch of the process pays
        for: nothing may be timed after it.
        """
        if case.conditions.kind == "host":
            return {"metrics": measure_launches(case, self.bases)}
        if case.conditions.kind in {"op", "leak"}:
            return {"metrics": {}}
        step = make_step(build_for(case.conditions, case.variant, self.bases), case.conditions)
        for _ in range(3):
            step.prepare()
            step.run()
        step.prepare()
        metrics, top = kernel_profile(step, top=self.profile)
        return {"metrics": metrics, **({"kernels": top} if top else {})}

    def _eager_peak(self, case: Case, built: Built) -> dict[str, float]:
        """The peak of a step that will be recorded: a recorded one keeps its memory."""
        if not is_counted(self.device):
            return {}
        step = make_step(built, replace(case.conditions, mode="eager"))
        found = peak_above_weights(step, built.model, self.device)
        step.prepare()
        return found

    def _checked(self, case: Case, built: Built) -> tuple[dict[str, float], Step]:
        """The step to time, after it was found right."""
        errors = self._float32_errors(case)
        expected = expected_of(case.variant, built, case.conditions)
        step = make_step(built, case.conditions)
        return {**errors, **check(case.variant, built, case.conditions, step, expected)}, step

    def _float32_errors(self, case: Case) -> dict[str, float]:
        """Those of the same step in float32, where they cannot be told in the model's own dtype."""
        if not is_judged_in_float32(case.variant, case.conditions):
            return {}
        wide = replace(case, conditions=replace(case.conditions, dtype="fp32"))
        errors, _ = self._checked(wide, build_for(wide.conditions, wide.variant, self.bases))
        torch.compiler.reset()
        release(self.device)
        return {f"{name}, in float32": error for name, error in errors.items()}

    def _leak(self, case: Case, built: Built) -> dict[str, Any]:
        errors, step = self._checked(case, built)

        def once() -> None:
            step.prepare()
            step.run()

        metrics = growth(once, steps=self.leak_steps, device=self.device)
        refuse_growth(metrics)
        return {"metrics": metrics, "errors": errors}

    def _group_in_turns(self, members: Sequence[Case]) -> Iterable[dict[str, Any]]:
        """All variants of a group alive together, timed in turns."""
        results: dict[Case, dict[str, Any]] = {}
        steps: dict[Case, Step] = {}
        neighbours = Neighbours(self.device)
        for case in members:
            if self.elapsed > self.seconds:
                results[case] = result_of(case, status="skipped", reason="no time left")
                continue
            results[case] = guarded(case, partial(self._join, case, steps, neighbours))
            # the next one is built beside what this one keeps, not beside what its check took
            release(self.device)
            tell(f"[{self.elapsed:6.1f} s] {case.name}: checked, {results[case]['status']}")
        self._time_in_turns(steps, results)
        steps.clear()
        release(self.device)
        yield from results.values()

    def _host_group(self, members: Sequence[Case]) -> Iterable[dict[str, Any]]:
        """The host's time of all variants of a group, in turns with their base."""
        results: dict[Case, dict[str, Any]] = {}
        joined: list[HostSteps] = []
        for case in members:
            if self.elapsed > self.seconds:
                results[case] = result_of(case, status="skipped", reason="no time left")
                continue

            def join(case: Case = case) -> dict[str, Any]:
                joined.append(host_steps(case, self.bases))
                return {"errors": joined[-1].errors}

            results[case] = guarded(case, join)
            tell(f"[{self.elapsed:6.1f} s] {case.name}: checked, {results[case]['status']}")
        for one, metrics in zip(joined, self._host_metrics(joined), strict=True):
            results[one.case].update(metrics)
        joined.clear()
        release(self.device)
        yield from results.values()

    def _host_metrics(self, joined: Sequence[HostSteps]) -> list[dict[str, Any]]:
        """What each result is to be updated with: its metrics, or why there are none."""
        if not joined:
            return []
        try:
            found = measure_hosts(joined, self.bases, self.effort)
        except Exception as error:  # noqa: BLE001 - becomes results that say so
            return [outcome_of(one.case, error) for one in joined]
        return [{"metrics": metrics} for metrics in found]

    def _join(self, case: Case, steps: dict[Case, Step], neighbours: Neighbours) -> dict[str, Any]:
        """Build a variant beside those in ``steps``, check it, look at its memory, add it."""
        conditions = case.conditions
        self.bases.of(conditions.shape, conditions.dtype)
        others = neighbours.held()
        built = build_for(conditions, case.variant, self.bases)
        errors, step = self._checked(case, built)
        memory = peak_above_weights(step, built.model, self.device, others=others)
        # idle from here on: without gradients
        step.prepare()
        steps[case] = step
        return {"metrics": memory, "errors": errors}

    def _time_in_turns(self, steps: dict[Case, Step], results: dict[Case, dict[str, Any]]) -> None:
        """Add times to the results of ``steps``; one that fails now has no result any more."""
        cases = list(steps)

        def lost(index: int, error: Exception) -> None:
            results[cases[index]] = outcome_of(cases[index], error)

        effort = replace(self.effort, seconds=self.effort.seconds * max(1, len(cases)))
        timed = time_steps(list(steps.values()), self.device, effort, on_error=lost)
        for case, metrics in zip(cases, timed, strict=True):
            if results[case]["status"] == "ok":
                results[case]["metrics"] = {**metrics, **results[case]["metrics"]}


def result_of(case: Case, **fields: Any) -> dict[str, Any]:
    """A result with everything that identifies its case."""
    return {
        "case": case.name,
        "group": case.conditions.name,
        "variant": case.variant.name,
        "conditions": {**asdict(case.conditions), "in_turns": case.conditions.in_turns},
        "sizes": asdict(case.variant),
        **fields,
    }


def guarded(case: Case, measure: Any) -> dict[str, Any]:
    """A result, whatever happens: a case that cannot run must not take the others with it."""
    try:
        return result_of(case, status="ok", **measure())
    except Exception as error:  # noqa: BLE001 - becomes a result that says so
        return outcome_of(case, error)


def outcome_of(case: Case, error: Exception) -> dict[str, Any]:
    """What is said of a case that ended with an error; keeps nothing of the error itself."""
    if isinstance(error, WrongResultError):
        return result_of(case, status="wrong", reason=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return result_of(case, status="out of memory", reason=_first_line(error))
    if os.environ.get("BENCHMARKS_TRACEBACK"):
        traceback.print_exception(error)
    return result_of(case, status="failed", reason=_first_line(error))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    Path(beside).replace(path)


def run_and_write(
    runner: Runner, cases: Sequence[Case], path: Path, *, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run ``cases``, keep the file up to date after each, and tell the progress on stderr."""
    results: list[dict[str, Any]] = []

    def write() -> None:
        ceilings = runner.measured_ceilings()
        write_json(path, {"format": FORMAT, **about, "ceilings": ceilings, "results": results})

    for result in runner.run(cases):
        results.append(result)
        tell(f"[{runner.elapsed:6.1f} s {len(results)}/{len(cases)}] {line_of(result)}")
        write()
    if not runner.looks_at_kernels:
        return results
    of_name = {case.name: case for case in cases}
    for result in results:
        if result["status"] != "ok" or runner.elapsed > runner.seconds:
            continue
        case = of_name[result["case"]]
        seen = guarded(case, partial(runner.look_at_kernels, case))
        release(runner.device)
        if seen["status"] != "ok":
            tell(f"{case.name}: its kernels could not be looked at: {seen['reason']}")
            continue
        result["metrics"].update(seen["metrics"])
        if "kernels" in seen:
            result["kernels"] = seen["kernels"]
        write()
    return results


def tell(line: str) -> None:
    """One line on stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def line_of(result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["status"] != "ok":
        return f"{result['case']}: {result['status'].upper()}: {result['reason']}"
    shown = []
    for name, value in result["metrics"].items():
        if isinstance(value, dict):
            shown.append(f"{name} {value['p50']:.4g}")
        elif name in {"peak_mib", "kernels_ms", "launches", "early_bytes", "late_bytes"}:
            shown.append(f"{name} {value:.6g}")
    worst = max(result["errors"].values(), default=0.0)
    return f"{result['case']}: {', '.join(shown)} (error {worst:.1e})"
