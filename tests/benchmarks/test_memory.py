"""The arithmetic of memory, with an allocator that only pretends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import Neighbours, peak_above_weights
from benchmarks.timing import Step

GPU, MIB = torch.device("cuda"), 2**20


class Allocator:
    """Counts bytes by hand."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, mib: float) -> None:
        """Allocate; with a negative number free."""
        self.now += int(mib * MIB)
        self.peak = max(self.peak, self.now)

    def forget_peak(self, _: Any = None) -> None:
        """From now on."""
        self.peak = self.now


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    fake = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: fake.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: fake.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.forget_peak)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    # both threads' workspaces, for good
    monkeypatch.setattr("benchmarks.memory.wake_libraries", lambda _: fake.take(64))
    return fake


class Training:
    """A variant over a base of 8 MiB: adapters, a copy of them, and steps that need memory."""

    def __init__(self, allocator: Allocator, *, adapters: float, activations: float) -> None:
        self.model = nn.ParameterList([torch.zeros(int((8 + adapters) * MIB / 4))])
        self.gradients, self.adapters, self.copied = 0.0, adapters, False
        self.allocator, self.activations = allocator, activations
        allocator.take(adapters)

    @property
    def step(self) -> Step:
        return Step(self.run, prepare=self.forget)

    def run(self) -> None:
        if not self.copied:
            # its first run takes more for a moment
            self.allocator.take(500)
            self.allocator.take(-500 + self.adapters)
            self.copied = True
        self.allocator.take(self.activations)
        self.allocator.take(self.adapters)
        self.gradients += self.adapters
        self.allocator.take(-self.activations)

    def forget(self) -> None:
        self.allocator.take(-self.gradients)
        self.gradients = 0


def test_a_peak_is_less_the_weights_and_what_others_hold(allocator: Allocator) -> None:
    allocator.take(8)
    neighbours = Neighbours(GPU)
    peaks, held = [], []
    for adapters, activations in ((1, 10), (2, 30), (0.5, 20)):
        held.append(neighbours.held() / MIB)
        one = Training(allocator, adapters=adapters, activations=activations)
        peaks.append(
            peak_above_weights(one.step, one.model, GPU, others=int(held[-1] * MIB))["peak_mib"]
        )
        one.step.prepare()
    # each keeps its adapters and their copy
    assert held == [0, 2, 6]
    # workspaces, the copy, activations, gradients
    assert peaks == [64 + 1 + 10 + 1, 64 + 2 + 30 + 2, 64 + 0.5 + 20 + 0.5]


def test_a_variant_that_could_not_be_built_and_left_something_is_not_counted_to_the_next(
    allocator: Allocator,
) -> None:
    neighbours = Neighbours(GPU)
    assert neighbours.held() == 0
    allocator.take(3)
    assert neighbours.held() == 3 * MIB


def test_nobody_counts_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert Neighbours(cpu).held() == 0
    assert peak_above_weights(Step(lambda: None), nn.Linear(1, 1), cpu) == {}
