"""What a routed op is told about its router, and what it gives."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

LossType = Literal["aux_loss", "z_loss", "switch"]


@dataclass(frozen=True)
class RouterOptions:
    """How a router decides.

    Attributes:
        num_experts: ``E``.
        top_k: experts per token.
        temperature: divides the scores.
        scaling: multiplies every weight.
        capacity_factor: multiple of the even share an expert may serve; None for no limit.
        loss_type: the auxiliary loss whose statistics are wanted; None for none.

    Raises:
        ValueError: if ``top_k`` is not in ``[1, num_experts]``.
    """

    num_experts: int
    top_k: int
    temperature: float
    scaling: float
    capacity_factor: float | None = None
    loss_type: LossType | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}."
            )


class Member(NamedTuple):
    """One of the frozen layers, with their mixtures, that read the same input.

    Attributes:
        base_weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of a ``Conv1D``; no gradient. None
            if the base computes itself (quantised, trained): the output is the update alone.
        bias: ``(d_out,)`` or None; no gradient.
        lora_a: ``(experts * r, d_in)``, contiguous.
        lora_b: ``(d_out, experts * r)``, contiguous.
        router: ``(experts, d_in)``, contiguous.
        mature: ``(experts,)`` bool; while one is False all experts share every token. Or None.
        is_conv1d: the base is a ``Conv1D``.
        dropped: ``(*batch, d_in)``, what A reads instead of the input (after dropout), or None.
            Layers that are served together have one each, or none has.
    """

    base_weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    router: Tensor
    mature: Tensor | None = None
    is_conv1d: bool = False
    dropped: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient besides the input, as the autograd functions take it."""
        return self.lora_a, self.lora_b, self.router, self.dropped


class RoutedOutput(NamedTuple):
    """What a routed layer gives.

    Attributes:
        output: ``(*batch, d_out)``, in the dtype of the input.
        router_logits: ``(tokens, experts)`` divided by the temperature, at least float32, without
            a graph; None where not asked for.
        routing_weights: the same for the weights, after capacity.
        statistics: sums for the auxiliary losses over valid tokens, at least float32: mean
            probabilities of the experts, their shares of slots, of first choices (each padded with
            anything to the same width), the mean squared logsumexp, the number of tokens. What the
            loss does not read may be missing (0). None where not asked for.
    """

    output: Tensor
    router_logits: Tensor | None
    routing_weights: Tensor | None
    statistics: Tensor | None
