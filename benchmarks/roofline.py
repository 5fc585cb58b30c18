"""FLOPs and bytes of an update, the machine's measured ceilings, and the floor they set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Effort, Step, time_steps


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach in this run.

    Attributes:
        flops: per second, of a large matrix product in the dtype that is measured.
        bandwidth: bytes per second of a large copy, read and written ones.
    """

    flops: float
    bandwidth: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """The least time for so much arithmetic and so many bytes, in ms.

        Example:
            >>> Ceilings(flops=1e12, bandwidth=1e9).floor_ms(2e9, 1e6)
            2.0
        """
        return max(flops / self.flops, moved / self.bandwidth) * 1e3


@dataclass(frozen=True)
class Work:
    """Arithmetic and unavoidable traffic of one op."""

    flops: float
    moved: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a matrix product and a copy that are large enough to fill the device."""
    large = device.type == "cuda"
    size = 8192 if large else 1024
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for _ in range(2)
    )
    source = torch.zeros(2**30 if large else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    steps = [Step(lambda: torch.mm(a, b)), Step(lambda: target.copy_(source))]
    found = time_steps(steps, device, Effort(warmup=3, least=5, most=30, seconds=2.0))
    clock = "events_ms" if large else "wall_ms"
    product, copy = (metrics[clock]["p50"] / 1e3 for metrics in found)
    return Ceilings(flops=2 * size**3 / product, bandwidth=2 * source.numel() / copy)


def combine_work(
    tokens: int, d_in: int, d_out: int, ranks: int, *, itemsize: int, training: bool
) -> Work:
    """Of ``delta = B (w * (A x))`` for all tokens.

    Forward: two products. Backward: four (to x, to A, to B and to the rank space); x, A, B and the
    output's gradient are read, their gradients written. Nothing else has to touch memory: the rank
    space is small and the delta is counted as written once.

    Example:
        >>> combine_work(10, 4, 6, 2, itemsize=2, training=False).flops
        400.0
    """
    product = 2.0 * tokens * ranks * (d_in + d_out)
    weights = ranks * (d_in + d_out)
    forward = tokens * (d_in + d_out) + weights
    if not training:
        return Work(product, float(forward * itemsize))
    backward = tokens * (2 * d_in + d_out) + weights
    moved = (forward + backward) * itemsize + 4.0 * weights
    return Work(3 * product, moved)


def linear_work(tokens: int, d_in: int, d_out: int, *, itemsize: int, training: bool) -> Work:
    """Of a frozen linear: a product forward, one back to its input."""
    flops = 2.0 * tokens * d_in * d_out
    moved = float((tokens * (d_in + d_out) + d_in * d_out) * itemsize)
    return Work(2 * flops, 2 * moved) if training else Work(flops, moved)
