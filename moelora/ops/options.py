"""What a routed op is told about its router, and what it gives."""

from dataclasses import dataclass
from typing import Literal

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
    """

    num_experts: int
    top_k: int
    temperature: float
    scaling: float
    capacity_factor: float | None = None
    loss_type: LossType | None = None


@dataclass(frozen=True)
class RoutedOutput:
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
