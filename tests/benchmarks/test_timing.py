"""The statistics by numbers worked out by hand, and the clocks on steps of known length."""

from __future__ import annotations

import time
import weakref

import pytest
import torch

from benchmarks.timing import (
    Effort,
    Step,
    host_time,
    median,
    quantile,
    sample,
    summary,
    time_steps,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([5.0], 20, 5.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 20, 2.0),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 80, 5.0),
        ([1.0, 2.0], 50, 1.5),
        ([0.0, 10.0, 20.0], 80, 16.0),
        ([3.0, 1.0], 0, 1.0),
        ([3.0, 1.0], 100, 3.0),
    ],
)
def test_a_quantile_interpolates_between_the_nearest_samples(
    samples: list[float], percent: float, expected: float
) -> None:
    assert quantile(samples, percent) == pytest.approx(expected)


def test_the_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="No samples, so no quantile"):
        quantile([], 50)


def test_a_summary_holds_the_three_quantiles_and_the_count() -> None:
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        "p20": 2.0,
        "p50": 3.5,
        "p80": 5.0,
        "samples": 6,
    }


def test_the_median_takes_any_iterable() -> None:
    assert median(x for x in (3.0, 1.0, 2.0)) == 2.0


def test_a_step_is_timed_per_repeat_and_its_preparation_is_not() -> None:
    step = Step(lambda: time.sleep(0.02), prepare=lambda: time.sleep(0.1), repeats=2)
    effort = Effort(warmup=0, least=3, most=3, seconds=0.0)
    (metrics,) = time_steps([step], CPU, effort)
    assert metrics["wall_ms"]["samples"] == 3
    assert 10.0 <= metrics["wall_ms"]["p20"] < 40.0
    # no device, so no events
    assert sorted(metrics) == ["host_ms", "wall_ms"]


def test_steps_are_timed_in_turns_after_their_warm_up() -> None:
    calls: list[str] = []
    steps = [Step(lambda name=name: calls.append(name)) for name in "ab"]
    time_steps(steps, CPU, Effort(warmup=1, least=2, most=2, seconds=0.0))
    assert "".join(calls) == "ab" + "ab" * 2


def test_no_run_is_added_once_the_time_is_over() -> None:
    calls: list[int] = []
    step = Step(lambda: (calls.append(1), time.sleep(0.02)))
    time_steps([step], CPU, Effort(warmup=0, least=2, most=50, seconds=0.0))
    assert len(calls) == 2


def test_a_step_that_fails_leaves_and_the_others_go_on() -> None:
    calls: list[str] = []
    told: list[tuple[int, str]] = []

    def fail() -> None:
        calls.append("b")
        if calls.count("b") == 3:
            raise torch.OutOfMemoryError("no memory")

    steps = [Step(lambda: calls.append("a")), Step(fail), Step(lambda: calls.append("c"))]
    found = time_steps(
        steps,
        CPU,
        Effort(warmup=1, least=4, most=4, seconds=0.0),
        on_error=lambda index, error: told.append((index, str(error))),
    )
    assert "".join(calls) == "abc" + "abc" * 2 + "ac" * 2
    assert told == [(1, "no memory")]
    assert [metrics["wall_ms"]["samples"] for metrics in found] == [4, 1, 4]


def test_what_a_failed_run_had_made_is_gone_before_the_next_turn() -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    gone: list[bool] = []

    def fail() -> None:
        large = torch.zeros(8)
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no memory")

    steps = [Step(fail), Step(lambda: gone.append(made[0]() is None))]
    effort = Effort(warmup=1, least=1, most=1, seconds=0.0)
    time_steps(steps, CPU, effort, on_error=lambda *_: None)
    assert gone == [True, True]


def test_without_somebody_to_tell_an_error_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no step")

    with pytest.raises(ValueError, match="no step"):
        time_steps([Step(fail)], CPU, Effort())


@pytest.mark.parametrize(("asks", "runs"), [([0, 0], 1), ([0, 1, 1, 1], 2), ([0, 1, 1, 2], 2)])
def test_a_run_that_asked_the_driver_for_memory_is_repeated_once(
    asks: list[int], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(asks)
    monkeypatch.setattr("benchmarks.timing.segments", lambda device: next(counts))
    calls: list[str] = []
    step = Step(lambda: calls.append("run"), prepare=lambda: calls.append("prepare"))
    found = sample(step, CPU, lambda: calls.append("flush"))
    assert calls == ["flush", "prepare", "run"] * runs
    assert len(found.wall) == 1


def test_host_time_is_in_microseconds_per_repeat() -> None:
    found = host_time(Step(lambda: time.sleep(0.01), repeats=10), CPU, runs=3)
    assert len(found) == 3
    assert 1000.0 <= median(found) < 10_000.0
