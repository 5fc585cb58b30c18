"""What a routed op is told about its router."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterOptions:
    """How a router decides.

    Attributes:
        num_experts: ``E``.
        top_k: experts per token.
        temperature: divides the scores.
        scaling: multiplies every weight.
        capacity_factor: multiple of the even share an expert may serve; None for no limit.
        statistics: whether the sums for an auxiliary loss are wanted.
    """

    num_experts: int
    top_k: int
    temperature: float
    scaling: float
    capacity_factor: float | None
    statistics: bool
