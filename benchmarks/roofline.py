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
    source = torch.zeros(2**30 if large else 2**24, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    steps = [Step(lambda: torch.mm(a, b)), Step(lambda: target.copy_(source))]
    effort = Effort(warmup=3, least=5, most=30, seconds=2.0 if large else 0.2)
    found = time_steps(steps, device, effort)
    clock = "events_ms" if large else "wall_ms"
    product, copy = (metrics[clock]["p50"] / 1e3 for metrics in found)
    return Ceilings(flops=2 * size**3 / product, bandwidth=2 * source.numel() / copy)


def work_of(
    tokens: int,
    d_in: int,
    d_out: int,
    *,
    ranks: int,
    with_base: bool,
    itemsize: int,
    training: bool,
) -> Work:
    """Of a frozen linear (``with_base``), of an update of so many ranks, or of both in one op.

    Forward: the base is one product, the update two. Backward: the base has one more, to the input;
    the update four (to the input, to A, to B, to the rank space). Input, output, their gradients
    and all weights are counted once each; nothing else has to touch memory, since the rank space is
    small. Gradients of A and B are float32. All experts are counted; a way that leaves out those
    that nobody chose may stay below.

    Args:
        tokens: rows of the input.
        d_in: its width.
        d_out: the output's.
        ranks: of all experts together; 0 for the base alone.
        with_base: whether the frozen product is part of it.
        itemsize: bytes of one number.
        training: forward and backward instead of forward alone.

    Example:
        >>> work_of(10, 4, 6, ranks=2, with_base=False, itemsize=2, training=False).flops
        400.0
    """
    base = d_in * d_out * with_base
    update = ranks * (d_in + d_out)
    forward = tokens * (d_in + d_out) + base + update
    if not training:
        return Work(2.0 * tokens * (base + update), float(forward * itemsize))
    # the output's gradient is read, the input's written; the input is read again for that of A
    reads = tokens * (d_in + d_out + d_in * bool(ranks)) + base + update
    flops = 2.0 * tokens * (2 * base + 3 * update)
    return Work(flops, (forward + reads) * itemsize + 4.0 * update)
