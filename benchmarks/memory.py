"""Memory: the peak of a step above the model's own weights, and whether many steps leak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.correctness import WrongResultError
from benchmarks.shapes import unique_bytes
from benchmarks.timing import Step

_MIB = 2**20


def is_counted(device: torch.device) -> bool:
    """Whether the device has an allocator that tells what it has handed out."""
    return device.type == "cuda"


def peak_above_weights(
    step: Step, model: nn.Module, device: torch.device, *, others: int = 0
) -> dict[str, float]:
    """MiB: the weights, and the most that a step had allocated beyond them.

    Weights are all parameters and buffers, so copies of them that a variant keeps count as its own
    need, and gradients too. Empty on the CPU, where nobody counts.

    Args:
        step: what to run; it is run once before, so that what it keeps for good is there.
        model: whose weights are taken off.
        device: where.
        others: bytes that other variants over the same base hold, which are taken off too.
    """
    if not is_counted(device):
        return {}
    step.prepare()
    step.run()
    step.prepare()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    weights = unique_bytes(model)
    peak = torch.cuda.max_memory_allocated(device) - others
    return {"weights_mib": weights / _MIB, "peak_mib": (peak - weights) / _MIB}


@dataclass
class Neighbours:
    """Counts what the variants of a group hold that were built before the next one.

    Ask before each variant is built, first when only the base model is there.

    Attributes:
        device: where.
        floor: bytes that no variant answers for: the base model, and the libraries' workspaces.
    """

    device: torch.device
    floor: int | None = None

    def held(self) -> int:
        """Bytes allocated now, less those at the first call; 0 on the CPU."""
        if not is_counted(self.device):
            return 0
        if self.floor is None:
            wake_libraries(self.device)
        gc.collect()
        torch.cuda.synchronize(self.device)
        now = torch.cuda.memory_allocated(self.device)
        if self.floor is None:
            self.floor = now
        return now - self.floor


def wake_libraries(device: torch.device) -> None:
    """Let the matrix products of both threads, forward and backward, take their workspaces.

    They keep them for good: taken by the first variant, they would count as held by it.
    """
    x = torch.ones(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()


def live_tensors() -> tuple[int, int]:
    """Number and bytes of all tensors that Python's collector can reach.

    Example:
        >>> before = live_tensors()[0]
        >>> kept = torch.zeros(3)
        >>> live_tensors()[0] - before
        1
    """
    gc.collect()
    # type() asks no proxy object what it stands for, as isinstance would
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    # sparse tensors have no storage of their own
    found = [item for item in found if item.layout == torch.strided]
    storages = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in found
    }
    return len(found), sum(storages.values())


def growth(run: Callable[[], Any], *, steps: int, device: torch.device) -> dict[str, Any]:
    """Run many steps and tell how what stays allocated grew, after the first tenth of them.

    On the GPU bytes are the allocator's, else those of all tensors that are alive.

    Returns:
        The number of steps, bytes after the first tenth and at the end, live tensors at both.
    """
    early = max(1, steps // 10)
    for _ in range(early):
        run()
    first_bytes, first_tensors = _held(device)
    for _ in range(steps - early):
        run()
    last_bytes, last_tensors = _held(device)
    return {
        "steps": steps,
        "early_bytes": first_bytes,
        "late_bytes": last_bytes,
        "early_tensors": first_tensors,
        "late_tensors": last_tensors,
    }


def refuse_growth(metrics: dict[str, Any]) -> None:
    """Call a leak what it is.

    Raises:
        WrongResultError: if more tensors are alive at the end, or more than a page of memory.
    """
    tensors = metrics["late_tensors"] - metrics["early_tensors"]
    grown = metrics["late_bytes"] - metrics["early_bytes"]
    if tensors > 0 or grown > _MIB:
        raise WrongResultError(
            f"{grown} bytes and {tensors} tensors more are alive after {metrics['steps']} steps"
        )


def _held(device: torch.device) -> tuple[int, int]:
    count, size = live_tensors()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device), count
    return size, count
