"""From router logits to routing weights: pure functions, no parameters and no LoRA.

Words and shapes: ``T`` tokens, ``E`` experts, ``K`` experts per token. Everything here is at least
float32, whatever the model's dtype, and every token is decided by its own logits alone, except for
capacity, which is counted in token order and used in training only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROUNDING = 1e-4


@dataclass(frozen=True)
class Routing:
    """What a router decided for the tokens of one layer.

    Attributes:
        router_logits: ``(T, E)`` raw scores divided by the temperature, float32.
        router_probs: ``(T, E)`` softmax of the logits over all experts, float32.
        routing_weights: ``(T, E)`` what multiplies the experts, float32; 0 for those not selected.
        selected_experts: ``(T, K)`` indices in ``[0, E)``, int64, by falling probability. Slots
            lost to capacity or expert dropout stay listed; their weight is 0.
    """

    router_logits: Float[Tensor, "tokens experts"]
    router_probs: Float[Tensor, "tokens experts"]
    routing_weights: Float[Tensor, "tokens experts"]
    selected_experts: Int[Tensor, "tokens k"]

    def detach(self) -> "Routing":
        """Return the same decision without its graph."""
        return Routing(
            self.router_logits.detach(),
            self.router_probs.detach(),
            self.routing_weights.detach(),
            self.selected_experts,
        )


def top_k_routing(router_logits: Float[Tensor, "tokens experts"], *, top_k: int) -> Routing:
    """Choose each token's ``top_k`` experts and weight them by their renormalised probability.

    ``weights = softmax(logits)`` restricted to the top k and divided by their sum, which equals
    the softmax over the top-k logits; weights of a token sum to 1. With ``top_k == 1`` that would
    be the constant 1 and the router would get no gradient from the task, so the probability itself
    is kept.

    Source: Mixtral (arXiv:2401.04088), section 2.1; for ``top_k == 1`` Switch Transformers
    (arXiv:2101.03961), eq. 2.

    Args:
        router_logits: scores already divided by the temperature, float32.
        top_k: experts per token; all of them when it equals ``experts``.

    Raises:
        ValueError: if ``top_k`` is not in ``[1, experts]``.

    Example:
        >>> top_k_routing(torch.tensor([[2.0, 0.0, 2.0]]), top_k=2).routing_weights
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    num_experts = router_logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts={num_experts}, got {top_k}.")
    router_probs = router_logits.softmax(dim=-1)
    top_logits, selected_experts = router_logits.topk(top_k, dim=-1)
    if top_k > 1:
        # softmax over the chosen logits instead of a division: no 0 / 0 when logits are far apart
        top_probs = top_logits.softmax(dim=-1)
    else:
        top_probs = router_probs.gather(-1, selected_experts)
    routing_weights = torch.zeros_like(router_probs).scatter(-1, selected_experts, top_probs)
    return Routing(router_logits, router_probs, routing_weights, selected_experts)


def share_while_immature(routing: Routing, mature: Bool[Tensor, " experts"]) -> Routing:
    """Let all experts share every token by probability while any of them is immature.

    A young expert so learns in company of all others; once all are mature the sparse weights of
    ``routing`` are used. Both are at hand and one is taken, since asking the buffer on the host
    would cost a synchronisation in every layer.

    Args:
        routing: the sparse decision.
        mature: True for each expert that was marked mature.

    Example:
        >>> routing = top_k_routing(torch.tensor([[1.0, 0.0]]), top_k=1)
        >>> share_while_immature(routing, torch.tensor([True, False])).routing_weights
        tensor([[0.7311, 0.2689]])
    """
    weights = torch.where(mature.all(), routing.routing_weights, routing.router_probs)
    return Routing(routing.router_logits, routing.router_probs, weights, routing.selected_experts)


def limit_capacity(
    routing: Routing,
    *,
    capacity_factor: float,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Routing:
    """Take an expert away from tokens that come after it is full, and renormalise the rest.

    An expert serves at most ``ceil(capacity_factor * tokens * k / experts)`` tokens. It is given to
    them in token order, so that no token depends on a later one. A token that loses all its experts
    keeps weight 0 everywhere (the base layer still serves it).

    Source: GShard (arXiv:2006.16668), section 2.2; first choices have no priority over second ones
    here, since that would make a token depend on later tokens.

    Args:
        routing: a sparse decision; its weights are kept in sum.
        capacity_factor: multiple of the even share, > 0.
        token_mask: True for real tokens; padding takes no capacity and counts in no share.

    Example:
        >>> routing = top_k_routing(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), top_k=1)
        >>> limit_capacity(routing, capacity_factor=1.0).routing_weights[:, 0]
        tensor([0.7311, 0.0000])
    """
    num_experts = routing.router_probs.shape[-1]
    top_k = routing.selected_experts.shape[-1]
    chosen = torch.zeros_like(routing.router_probs).scatter(-1, routing.selected_experts, 1.0)
    share = capacity_factor * top_k / num_experts
    if token_mask is None:
        # counted, since a compiled forward would be bound to this very number
        capacity = torch.ones_like(chosen[:, 0]).sum()
    else:
        chosen = chosen * token_mask.unsqueeze(-1)
        capacity = token_mask.sum().to(chosen.dtype)
    # a product that is a whole number but for rounding is that number
    capacity = (capacity * share - _ROUNDING).ceil()
    position = chosen.cumsum(dim=0) - chosen
    has_place = (chosen > 0) & (position < capacity)
    return keep_experts(routing, keep=has_place, among=chosen > 0)


def drop_experts(routing: Routing, *, probability: float) -> Routing:
    """Leave out each selected expert of each token with ``probability``, and renormalise the rest.

    Example:
        >>> routing = top_k_routing(torch.zeros(1, 2), top_k=2)
        >>> drop_experts(routing, probability=0.0).routing_weights
        tensor([[0.5000, 0.5000]])
    """
    keep = torch.rand_like(routing.routing_weights) >= probability
    return keep_experts(routing, keep=keep)


def keep_experts(
    routing: Routing,
    *,
    keep: Bool[Tensor, "tokens experts"],
    among: Bool[Tensor, "tokens experts"] | None = None,
) -> Routing:
    """Take the experts outside ``keep`` away; those that stay share the token as if chosen alone.

    Their weights are the softmax of their logits, which is the renormalised weight, without the
    division: a token may lose an expert of weight nearly 1 and keep one whose weight is too small
    to divide by. A token that keeps none has only zeros. With one expert per token there is nothing
    to share: its weight is kept or lost.

    Args:
        routing: the decision so far.
        keep: the experts that may stay.
        among: the experts the token has; those of weight above 0 by default.

    Example:
        >>> routing = top_k_routing(torch.zeros(1, 2), top_k=2)
        >>> keep_experts(routing, keep=torch.tensor([[True, False]])).routing_weights
        tensor([[1., 0.]])
    """
    if routing.selected_experts.shape[-1] == 1:
        weights = routing.routing_weights * keep
    else:
        kept = keep & (routing.routing_weights > 0 if among is None else among)
        has_any = kept.any(dim=-1, keepdim=True)
        # a row of -inf alone would give NaN; its result is 0 whatever stands in it
        logits = routing.router_logits.masked_fill(~kept & has_any, float("-inf"))
        weights = logits.softmax(dim=-1) * kept
    return Routing(routing.router_logits, routing.router_probs, weights, routing.selected_experts)
