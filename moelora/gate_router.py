"""The router of DyLoRA-MoE: one linear gate with a bias, dense when young, sparse when grown."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.router import Router
from moelora.routing import Routing


class GateRouter(Router):
    """DyLoRA-MoE's ``DynamicHybridRouter``, for checkpoints that were trained with it.

    In training, and while an expert is immature: ``softmax((x @ weight.T + bias) / temperature)``.
    Otherwise the softmax over the ``top_k`` largest raw scores, without the temperature; with
    ``top_k == 1`` the chosen expert has weight 1. In these three points (bias, temperature, weight
    of a single expert) it differs from :class:`~moelora.Router`, which is the better choice for a
    new training: there the temperature of training and inference agree, and a router with
    ``top_k == 1`` has a gradient.

    Args:
        input_size: width of the hidden states.
        num_experts: experts to choose from.
        top_k: experts per token once all are mature.
        temperature: divides the scores of the dense routing, > 0.
        hidden_size: None; this router has no hidden layer.
        track_maturity: keep the buffer ``mature``.
        growing: ``top_k`` may be more than ``num_experts``, as in :class:`~moelora.Router`.
        row_blocks: how many rows each parameter holds; None for one parameter.

    Raises:
        ConfigError: as :class:`~moelora.Router`.
        ValueError: if ``hidden_size`` is given.

    Example:
        >>> router = GateRouter(16, 4, top_k=1).eval()
        >>> router(torch.randn(2, 3, 16)).sum(dim=-1).unique()
        tensor([1.], grad_fn=...)
    """

    row_parameters = ("weight", "bias")
    bias: nn.Parameter

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        *,
        top_k: int = 1,
        temperature: float = 2.0,
        hidden_size: int | None = None,
        track_maturity: bool = False,
        growing: bool = False,
        row_blocks: list[int] | None = None,
    ) -> None:
        if hidden_size is not None:
            raise ValueError(f"hidden_size of a GateRouter must be None, got {hidden_size}.")
        super().__init__(
            input_size,
            num_experts,
            top_k=top_k,
            temperature=temperature,
            track_maturity=track_maturity,
            growing=growing,
        )
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self._cut_rows(row_blocks)

    def routing(self, hidden_states: Float[Tensor, "*batch features"]) -> Routing:
        """The whole decision for the flattened tokens; its logits are divided by the temperature.

        Raises:
            RoutingWeightsError: if the hidden states are of another width than ``input_size``.
        """
        scores = self.logits(hidden_states)
        scores = scores + self.stacked("bias").to(scores.dtype)
        dense = (scores / self.temperature).softmax(dim=-1)
        chosen, selected_experts = scores.topk(min(self.top_k, self.num_experts), dim=-1)
        weights = torch.zeros_like(dense).scatter(-1, selected_experts, chosen.softmax(dim=-1))
        if self.training:
            weights = dense
        elif self.mature is not None:
            weights = torch.where(self.mature.all(), weights, dense)
        return Routing(scores / self.temperature, dense, weights, selected_experts)
