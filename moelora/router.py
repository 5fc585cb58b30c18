"""Router modules: they own parameters and turn hidden states into router logits."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moelora.config import is_int, is_number
from moelora.errors import ConfigError, RoutingWeightsError
from moelora.routing import Routing, share_while_immature, top_k_routing

#: Router rows start small and random: with equal rows every token would go to the first experts.
ROUTER_INIT_STD = 0.02


class ModuleRouter(nn.Module):
    """The router of one adapted layer, reading the layer's own input.

    ``logits = x @ weight.T``, or ``silu(x @ hidden_weight.T) @ weight.T`` with a hidden layer. Its
    parameters lie directly in it (no submodules), so that PEFT's state-dict functions find them as
    ``<layer>.lora_router.<adapter>.<name>``.

    Args:
        in_features: width of what the layer's ``lora_A`` reads.
        num_experts: experts to choose from.
        hidden_size: width of the hidden layer, or None.
        track_maturity: keep the buffer ``mature`` (all True at first).
        reads_indices: the layer is an embedding; the input is token ids, each a one-hot vector.
    """

    weight: nn.Parameter
    hidden_weight: nn.Parameter | None
    mature: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        num_experts: int,
        hidden_size: int | None = None,
        track_maturity: bool = False,
        reads_indices: bool = False,
    ) -> None:
        super().__init__()
        self.reads_indices = reads_indices
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size or in_features))
        hidden = (
            None if hidden_size is None else nn.Parameter(torch.zeros(hidden_size, in_features))
        )
        self.register_parameter("hidden_weight", hidden)
        mature = torch.ones(num_experts, dtype=torch.bool) if track_maturity else None
        self.register_buffer("mature", mature)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """The number of experts this router chooses from."""
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw all rows anew from a normal distribution."""
        nn.init.normal_(self.weight, std=ROUTER_INIT_STD)
        if self.hidden_weight is not None:
            # variance is kept through the hidden layer, as nn.Linear does
            nn.init.kaiming_uniform_(self.hidden_weight, a=5**0.5)

    def forward(self, hidden_states: Tensor) -> Float[Tensor, "*batch experts"]:
        """Return the router logits, at least float32, also under autocast.

        Args:
            hidden_states: ``(..., in_features)`` floats, or ``(...)`` token ids for an embedding.
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            first = self.weight if self.hidden_weight is None else self.hidden_weight
            if self.reads_indices:
                scores = F.embedding(hidden_states, first.t().to(dtype))
            else:
                dtype = torch.promote_types(dtype, hidden_states.dtype)
                scores = F.linear(hidden_states.to(dtype), first.to(dtype))
            if self.hidden_weight is None:
                return scores
            return F.linear(F.silu(scores), self.weight.to(dtype))

    def extra_repr(self) -> str:
        """Name the sizes in ``repr(model)``."""
        hidden = (
            "" if self.hidden_weight is None else f", hidden_size={self.hidden_weight.shape[0]}"
        )
        return f"num_experts={self.num_experts}{hidden}"


class Router(ModuleRouter):
    """A router over the experts of a whole model, for ``attach_router``.

    Reads hidden states and returns routing weights: softmax of ``logits / temperature``, the top k
    kept and renormalised (:func:`~moelora.routing.top_k_routing`), or dense while any expert is
    immature.

    Args:
        input_size: width of the hidden states.
        num_experts: experts to choose from.
        top_k: experts per token.
        temperature: divides the logits, > 0.
        hidden_size: width of a hidden layer, or None.
        track_maturity: keep the buffer ``mature``.

    Raises:
        ConfigError: if a size is no positive integer, ``top_k`` not in ``[1, num_experts]`` or the
            temperature not finite and positive.

    Example:
        >>> Router(16, 4)(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        temperature: float = 2.0,
        hidden_size: int | None = None,
        track_maturity: bool = False,
    ) -> None:
        sizes = {"input_size": input_size, "num_experts": num_experts, "top_k": top_k}
        if hidden_size is not None:
            sizes["hidden_size"] = hidden_size
        for name, value in sizes.items():
            if not is_int(value):
                raise ConfigError(f"{name} must be an integer, got {value!r}.")
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if top_k > num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k}."
            )
        if not is_number(temperature):
            raise ConfigError(f"temperature must be a finite number, got {temperature!r}.")
        if temperature <= 0:
            raise ConfigError(f"temperature must be > 0, got {temperature}.")
        super().__init__(
            in_features=input_size,
            num_experts=num_experts,
            hidden_size=hidden_size,
            track_maturity=track_maturity,
        )
        self.input_size = input_size
        self.top_k = top_k
        self.temperature = temperature

    def config(self) -> dict[str, Any]:
        """The arguments that make such a router again."""
        return {
            "input_size": self.input_size,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "hidden_size": None if self.hidden_weight is None else self.hidden_weight.shape[0],
            "track_maturity": self.mature is not None,
        }

    def routing(self, hidden_states: Float[Tensor, "*batch features"]) -> Routing:
        """The whole decision for the flattened tokens.

        Raises:
            RoutingWeightsError: if the hidden states are of another width than ``input_size``.
        """
        if hidden_states.shape[-1] != self.input_size:
            raise RoutingWeightsError(
                f"The Router reads hidden states of width input_size={self.input_size}, got "
                f"{hidden_states.shape[-1]}."
            )
        logits = super().forward(hidden_states).reshape(-1, self.num_experts) / self.temperature
        routing = top_k_routing(logits, top_k=self.top_k)
        return routing if self.mature is None else share_while_immature(routing, self.mature)

    def forward(
        self, hidden_states: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*batch experts"]:
        """Return the routing weights, at least float32."""
        weights = self.routing(hidden_states).routing_weights
        return weights.reshape(*hidden_states.shape[:-1], self.num_experts)
