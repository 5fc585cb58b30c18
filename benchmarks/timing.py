"""Clocks: wall, host and GPU time of a step, with warm-up, synchronisation and quantiles."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

QUANTILES = (20, 50, 80)
#: Written between two runs of an op, so that its inputs come from memory: five times an H100's L2.
_FLUSH_BYTES = 256 * 2**20
OnError = Callable[[int, Exception], None]


def do_nothing() -> None:
    """What there is to prepare when there is nothing."""


@dataclass(frozen=True)
class Step:
    """Something to time.

    Attributes:
        run: does it; returns what tells whether it was right (a loss, logits).
        prepare: what has to happen before each run and is not timed.
        rewind: the part of it that a replay of the recorded step needs too.
        repeats: how many times ``run`` does it inside, for what is too short to time alone.
    """

    run: Callable[[], Any]
    prepare: Callable[[], None] = do_nothing
    rewind: Callable[[], None] = do_nothing
    repeats: int = 1


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        warmup: untimed runs.
        least: timed runs at least, however long they take.
        most: timed runs at most.
        seconds: time after which no run is added.
    """

    warmup: int = 3
    least: int = 5
    most: int = 50
    seconds: float = 5.0


def quantile(samples: Sequence[float], percent: float) -> float:
    """The ``percent`` % quantile, interpolated linearly between the two nearest samples.

    Raises:
        ValueError: if there are no samples.

    Example:
        >>> quantile([4.0, 1.0, 2.0, 3.0], 50)
        2.5
    """
    if not samples:
        raise ValueError("No samples, so no quantile.")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """The reported quantiles and the number of samples.

    Example:
        >>> summary([1.0, 2.0, 3.0])["p50"]
        2.0
    """
    named = {f"p{percent}": quantile(samples, percent) for percent in QUANTILES}
    return {**named, "samples": len(samples)}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class L2Flush:
    """Overwrites the GPU's cache, so that the next kernel reads its inputs from memory."""

    def __init__(self, device: torch.device) -> None:
        size = _FLUSH_BYTES if device.type == "cuda" else 0
        self._buffer = torch.zeros(size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        """Flush."""
        self._buffer.zero_()


@dataclass
class Samples:
    """Milliseconds of each timed run by clock."""

    wall: list[float]
    host: list[float]
    events: list[float]

    def add(self, other: Samples) -> None:
        """Take over another's samples."""
        self.wall += other.wall
        self.host += other.host
        self.events += other.events

    def metrics(self) -> dict[str, dict[str, float]]:
        """Their quantiles by metric name."""
        found = {"wall_ms": self.wall, "host_ms": self.host, "events_ms": self.events}
        return {name: summary(samples) for name, samples in found.items() if samples}


def time_once(step: Step, device: torch.device, samples: Samples) -> None:
    """Add one run to ``samples``.

    ``wall`` is from the first launch until the device is done, ``host`` until the last launch,
    ``events`` between two events on the device, so with the gaps in which it waits for the host.
    """
    step.prepare()
    synchronize(device)
    on_gpu = device.type == "cuda"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None,) * 2
    began = time.perf_counter()
    if start is not None:
        start.record()
    step.run()
    launched = time.perf_counter()
    if end is not None:
        end.record()
    synchronize(device)
    done = time.perf_counter()
    samples.wall.append((done - began) * 1e3 / step.repeats)
    samples.host.append((launched - began) * 1e3 / step.repeats)
    if start is not None and end is not None:
        samples.events.append(start.elapsed_time(end) / step.repeats)


def segments(device: torch.device) -> int:
    """How often the allocator has asked the driver for memory; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("segment.all.allocated", 0))


def sample(step: Step, device: torch.device, flusher: Callable[[], None]) -> Samples:
    """One run; another one instead of it if the allocator had to ask the driver for memory.

    Asking is slow, and a step that runs alone does so in its first runs only. In turns it has to
    again where a large neighbour has taken all memory that was left.
    """
    for _ in range(2):
        found = Samples([], [], [])
        before = segments(device)
        flusher()
        time_once(step, device, found)
        if segments(device) == before:
            break
    return found


@dataclass
class _Turns:
    """The steps that still take part.

    Attributes:
        running: by their place.
        device: where they run.
        on_error: told which step failed and why; without it the error is raised.
    """

    running: dict[int, Step]
    device: torch.device
    on_error: OnError | None

    def each(self, act: Callable[[int, Step], None]) -> None:
        """Let every step have its turn; one that fails leaves."""
        for index, step in list(self.running.items()):
            if not self._succeeds(index, step, act):
                del self.running[index]
                # not before the error is gone: it holds all that the failed run had made
                with suppress(RuntimeError):
                    step.prepare()
                release(self.device)

    def _succeeds(self, index: int, step: Step, act: Callable[[int, Step], None]) -> bool:
        try:
            act(index, step)
            # while the others run it holds no gradients
            step.prepare()
        except Exception as error:
            if self.on_error is None:
                raise
            self.on_error(index, error)
            return False
        return True


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        # after an error of the device neither works, and the next case says so
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def time_steps(
    steps: Sequence[Step],
    device: torch.device,
    effort: Effort,
    *,
    flush: bool = False,
    on_error: OnError | None = None,
) -> list[dict[str, dict[str, float]]]:
    """Time several steps in turns, so that what disturbs the machine disturbs all of them.

    All take part in every round, however long each takes: numbers that are compared come from the
    same stretch of time. So a slow one costs the others samples, down to ``effort.least``.

    Args:
        steps: what to time; each is warmed up first.
        device: where they run.
        effort: how long, all steps together.
        flush: overwrite the GPU's cache before each run.
        on_error: called with the place of a step that fails, and its error; the others go on.

    Returns:
        The metrics of each step.
    """
    flusher = L2Flush(device) if flush else do_nothing
    turns = _Turns(dict(enumerate(steps)), device, on_error)
    samples = [Samples([], [], []) for _ in steps]

    def warm_up(_: int, step: Step) -> None:
        for _ in range(effort.warmup):
            step.prepare()
            step.run()
        # what a run launched may fail later than it returns
        synchronize(device)

    turns.each(warm_up)
    began = time.perf_counter()
    # the collector stays on, as in real training, but need not look at the models each time
    gc.collect()
    gc.freeze()
    try:
        for count in range(effort.most):
            if count >= effort.least and time.perf_counter() - began > effort.seconds:
                break
            turns.each(lambda index, step: samples[index].add(sample(step, device, flusher)))
    finally:
        gc.unfreeze()
    return [found.metrics() for found in samples]


def host_time(step: Step, device: torch.device, *, runs: int) -> list[float]:
    """Microseconds of the host per run, when runs are enqueued without waiting for the device."""
    for _ in range(3):
        step.prepare()
        step.run()
    synchronize(device)
    gc.disable()
    found = []
    try:
        for _ in range(runs):
            step.prepare()
            began = time.perf_counter()
            step.run()
            found.append((time.perf_counter() - began) * 1e6 / step.repeats)
            # the device must never be the one that is waited for
            synchronize(device)
    finally:
        gc.enable()
    return found


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Where steps run before they are recorded.

    One for all: products take 64 MiB of workspace on each stream that they meet, for good, which
    would count as the memory of the cases that follow.
    """
    return torch.cuda.Stream()


def capture(step: Step) -> Step:
    """Record ``step`` in a CUDA graph; the result replays it.

    The step's ``prepare`` runs before the recording, its ``rewind`` before each replay; the latter
    must leave all tensors where they are.
    """
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.prepare()
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    step.prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step.run()

    def replay() -> Any:
        graph.replay()
        return output

    # the graph reads the step's inputs where they lay when it was recorded: they have to live on
    replay.recorded = step  # type: ignore[attr-defined]
    return Step(replay, prepare=step.rewind, repeats=step.repeats)


def _profiled(step: Step) -> Sequence[Any]:
    """The profiler's events of one run."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step.run()
        torch.cuda.synchronize()
    return profile.events() or ()


def _is_kernel(event: Any) -> bool:
    """Whether an event is work of the device, not a range that someone marked."""
    on_device = event.device_type.name == "CUDA"
    return on_device and not getattr(event, "is_user_annotation", False)


def kernel_profile(step: Step, *, top: int = 0) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What one run did on the device.

    Args:
        step: what to run.
        top: how many of the kernels that take the most time to list.

    Returns:
        ``kernels_ms``, the sum of the kernels' own times, which unlike the time between two events
        has no gaps: what the run would take if the host were infinitely fast; ``launches``, the
        number of kernels, copies and fills that the host started; and the list, with name, calls
        and ms.
    """
    times: dict[str, list[float]] = {}
    launches = 0
    for event in _profiled(step):
        if _is_kernel(event):
            times.setdefault(event.name, []).append(event.self_device_time_total / 1e3)
        elif _is_launch(event.name):
            launches += 1
    rows: list[dict[str, Any]] = [
        {"kernel": name[:120], "calls": len(found), "ms": round(sum(found), 4)}
        for name, found in times.items()
    ]
    total = sum(map(sum, times.values()))
    metrics = {"launches": launches / step.repeats}
    if times:
        metrics["kernels_ms"] = total / step.repeats
    return metrics, sorted(rows, key=lambda row: -row["ms"])[:top]


def _is_launch(name: str) -> bool:
    """Whether a runtime call starts a kernel, a copy or a fill on the device."""
    return name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemset"))


def median(samples: Iterable[float]) -> float:
    """The 50 % quantile."""
    return quantile(list(samples), 50)
