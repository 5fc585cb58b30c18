"""Time and memory of every way: median of interleaved repeats, and the peak of allocated bytes."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelora.validation.candidate import lora_layers
from moelora.validation.ways import Batch, Way, trainable

#: How memory is measured, by the kind of device.
MEMORY_METHODS = {
    "cpu": "peak of the bytes that torch's CPU allocator handed out during the call "
    "(torch.profiler's memory events; deterministic, no other process counts)",
    "cuda": "torch.cuda.max_memory_allocated during the call, less what was allocated before",
}


@dataclass(frozen=True)
class Seconds:
    """Times of repeated calls.

    Attributes:
        median: the middle one.
        low: 20 % were faster.
        high: 20 % were slower.
        repeats: how many there were.
    """

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Measured:
    """One way of running, measured.

    Attributes:
        way: its name.
        label: for people.
        passes: passes through the base model.
        forward: seconds of a forward without gradient.
        step: seconds of a training step (forward, backward, AdamW); None for the base alone.
        resident: bytes of the parameters it needs: base model, its adapters, its router.
        forward_peak: bytes that a forward allocates at most beyond them; None if not measured.
        step_peak: the same of a training step, its optimiser's state included.
    """

    way: str
    label: str
    passes: int
    forward: Seconds
    step: Seconds | None
    resident: int
    forward_peak: int | None
    step_peak: int | None


def summarise(times: Sequence[float]) -> Seconds:
    """Median and the 20 % and 80 % quantiles of some seconds.

    Example:
        >>> summarise([3.0, 1.0, 2.0]).median
        2.0
    """
    ordered = sorted(times)
    last = len(ordered) - 1
    return Seconds(
        median=statistics.median(ordered),
        low=ordered[round(0.2 * last)],
        high=ordered[round(0.8 * last)],
        repeats=len(ordered),
    )


def measure(
    model: Any,
    ways: Sequence[Way],
    batch: Batch,
    *,
    warmup: int,
    repeats: int,
    tick: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measure every way on one batch.

    The ways take turns, so that a machine that slows down for a while slows all of them.

    Args:
        model: a PEFT model; its parameters, gradients and active adapters change.
        ways: what to measure.
        batch: the model's inputs.
        warmup: calls of each that do not count.
        repeats: calls of each that do.
        tick: told after every call, with what was called.
    """
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    device = batch["input_ids"].device
    forwards: dict[str, list[float]] = {way.name: [] for way in ways}
    steps: dict[str, list[float]] = {way.name: [] for way in ways if way.adapters}
    optimisers: dict[str, torch.optim.Optimizer] = {}
    for round_ in range(warmup + repeats):
        for way in ways:
            seconds = _timed(device, way, functools.partial(_forward, model, way, batch))
            _keep(forwards[way.name], seconds, counts=round_ >= warmup)
            tick(way.label)
    for round_ in range(warmup + repeats):
        for way in ways:
            if way.adapters:
                # each way has a state of its own, made in its warm-up
                step = _stepper(model, way, batch, optimisers)
                seconds = _timed(device, way, step)
                _keep(steps[way.name], seconds, counts=round_ >= warmup)
                tick(f"{way.label}, training step")
    measured = [
        _with_memory(model, way, batch, forwards[way.name], steps.get(way.name), optimisers)
        for way in ways
    ]
    _restore(model, kept)
    return measured


def _keep(times: list[float], seconds: float, *, counts: bool) -> None:
    if counts:
        times.append(seconds)


def _restore(model: Any, kept: dict[str, Tensor]) -> None:
    """Undo the training steps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in kept:
                parameter.copy_(kept[name])
    model.eval()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _timed(device: torch.device, way: Way, call: Callable[[], None]) -> float:
    way.prepare()
    try:
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        return time.perf_counter() - start
    finally:
        way.finish()


def _forward(model: Any, way: Way, batch: Batch) -> None:
    model.eval()
    with torch.no_grad():
        way.run(batch, None)


def _stepper(
    model: Any, way: Way, batch: Batch, optimisers: dict[str, torch.optim.Optimizer]
) -> Callable[[], None]:
    def step() -> None:
        model.train()
        parameters = trainable(model, way)
        if way.name not in optimisers:
            optimisers[way.name] = torch.optim.AdamW(parameters, lr=1e-5)
        _, loss = way.run(batch, batch["input_ids"])
        if loss is None:
            raise RuntimeError(f"{way.label} gave no loss.")
        loss.backward()
        optimisers[way.name].step()
        optimisers[way.name].zero_grad(set_to_none=True)

    return step


# Memory --------------------------------------------------------------------------------------


def _with_memory(
    model: Any,
    way: Way,
    batch: Batch,
    forwards: list[float],
    steps: list[float] | None,
    optimisers: dict[str, torch.optim.Optimizer],
) -> Measured:
    device = batch["input_ids"].device
    resident = _resident(model, way)
    forward_peak = _peak_of(device, way, functools.partial(_forward, model, way, batch))
    step_peak = None
    if steps is not None:
        step_peak = _peak_of(device, way, _stepper(model, way, batch, optimisers))
        if step_peak is not None:
            step_peak += _state_bytes(optimisers[way.name])
    return Measured(
        way=way.name,
        label=way.label,
        passes=way.passes,
        forward=summarise(forwards),
        step=None if steps is None else summarise(steps),
        resident=resident,
        forward_peak=forward_peak,
        step_peak=step_peak,
    )


def _peak_of(device: torch.device, way: Way, call: Callable[[], None]) -> int | None:
    way.prepare()
    try:
        return peak_bytes(device, call)
    finally:
        way.finish()


def peak_bytes(device: torch.device, call: Callable[[], None]) -> int | None:
    """Bytes that are allocated at most during a call, beyond those at its start.

    Args:
        device: where the tensors are.
        call: what to measure.

    Returns:
        The bytes; None on a device for which there is no measurement.

    Example:
        >>> peak_bytes(torch.device("cpu"), lambda: torch.ones(1000).neg())
        8000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _resident(model: Any, way: Way) -> int:
    """Bytes of the base model's parameters, each once, and of this way's own."""
    adapter_tensors = {
        id(parameter) for layer in lora_layers(model).values() for parameter in layer.parameters()
    } - {
        id(parameter)
        for layer in lora_layers(model).values()
        for parameter in layer.base_layer.parameters()
    }
    own = {id(parameter) for parameter in trainable(model, way)} if way.adapters else set()
    needed = {
        id(p): p.numel() * p.element_size()
        for p in [*model.parameters(), *(way.router.parameters() if way.router else [])]
        if id(p) not in adapter_tensors or id(p) in own
    }
    return sum(needed.values())


def _state_bytes(optimiser: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimiser.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
