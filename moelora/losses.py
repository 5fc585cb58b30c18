"""Auxiliary losses of a router, as pure functions of what it decided."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moelora.routing import Routing


def load_balancing_loss(
    router_probs: Float[Tensor, "tokens experts"],
    selected_experts: Int[Tensor, "tokens k"],
    *,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Penalise a router that sends most tokens to few experts.

    Returns ``experts * sum_e f[e] * P[e]``, where ``f[e]`` is the share of routed slots that chose
    expert ``e`` and ``P[e]`` its mean router probability. The value is 1 for a uniform router and
    approaches ``experts`` when one expert takes everything at k = 1. Only ``P`` carries gradient.
    No tokens at all give 0.

    Source: Fedus et al., Switch Transformers (arXiv:2101.03961), eq. 4-6, over all k slots as in
    GShard and Mixtral. Transformers' Mixtral divides by tokens instead of slots (balanced value k)
    and pools all layers before the product; here every router is judged alone.

    Args:
        router_probs: softmax of the router logits over all experts, float32.
        selected_experts: top-k indices, int64, each in ``[0, experts)``.
        token_mask: True for real tokens; padding counts in neither ``f`` nor ``P``.

    Raises:
        ValueError: if the two inputs hold different numbers of tokens.

    Example:
        >>> load_balancing_loss(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    tokens, num_experts = router_probs.shape
    if selected_experts.shape[0] != tokens:
        raise ValueError(
            f"router_probs holds {tokens} tokens but selected_experts {selected_experts.shape[0]}."
        )
    mask = _float_mask(router_probs, token_mask)
    slots = torch.zeros_like(router_probs).scatter(-1, selected_experts, 1.0)
    valid_tokens = mask.sum().clamp(min=1.0)
    slot_share = (slots * mask).sum(dim=0) / (valid_tokens * selected_experts.shape[-1])
    mean_probs = (router_probs * mask).sum(dim=0) / valid_tokens
    return num_experts * (slot_share.detach() * mean_probs).sum()


def switch_loss(
    router_probs: Float[Tensor, "tokens experts"],
    *,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Balance first choices only: :func:`load_balancing_loss` of every token's best expert.

    Source: Switch Transformers (arXiv:2101.03961), eq. 4-6.

    Example:
        >>> switch_loss(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
        tensor(1.)
    """
    best_expert = router_probs.argmax(dim=-1, keepdim=True)
    return load_balancing_loss(router_probs, best_expert, token_mask=token_mask)


def router_z_loss(
    router_logits: Float[Tensor, "tokens experts"],
    *,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Keep router logits small: the mean over tokens of ``logsumexp(logits) ** 2``, at least 0.

    Source: ST-MoE (arXiv:2202.08906), eq. 5.

    Example:
        >>> router_z_loss(torch.zeros(3, 1))
        tensor(0.)
    """
    mask = _float_mask(router_logits, token_mask).squeeze(-1)
    squares = router_logits.logsumexp(dim=-1).square()
    return (squares * mask).sum() / mask.sum().clamp(min=1.0)


def auxiliary_losses(
    routings: Sequence[Routing],
    *,
    loss_type: str,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " routers"]:
    """The loss of each of several routers over the same tokens, in a few operations for all.

    Example:
        >>> from moelora.routing import top_k_routing
        >>> routing = top_k_routing(torch.zeros(2, 2), top_k=2)
        >>> auxiliary_losses([routing, routing], loss_type="aux_loss")
        tensor([1., 1.])
    """
    if len(routings) == 1:
        return auxiliary_loss(routings[0], loss_type=loss_type, token_mask=token_mask)[None]
    logits = torch.stack([routing.router_logits for routing in routings])
    mask = _float_mask(logits[0], token_mask)
    valid_tokens = mask.sum().clamp(min=1.0)
    if loss_type == "z_loss":
        return (logits.logsumexp(dim=-1).square() * mask[:, 0]).sum(dim=-1) / valid_tokens
    probs = torch.stack([routing.router_probs for routing in routings])
    if loss_type == "switch":
        selected = probs.argmax(dim=-1, keepdim=True)
    else:
        selected = torch.stack([routing.selected_experts for routing in routings])
    slots = torch.zeros_like(probs).scatter(-1, selected, 1.0)
    slot_share = (slots * mask).sum(dim=-2) / (valid_tokens * selected.shape[-1])
    mean_probs = (probs * mask).sum(dim=-2) / valid_tokens
    return probs.shape[-1] * (slot_share.detach() * mean_probs).sum(dim=-1)


def loss_of_statistics(
    statistics: Float[Tensor, "routers size"], *, num_experts: int, loss_type: str
) -> Float[Tensor, " routers"]:
    """The loss of each router from the sums that a fused op made, see ``ops/routed.py``.

    Args:
        statistics: for each router its experts' mean probabilities, shares of slots, shares of
            first choices (each padded to the same width), the mean squared logsumexp, the tokens.
        num_experts: experts of each router.
        loss_type: as in the config.

    Example:
        >>> loss_of_statistics(
        ...     torch.tensor([[0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 3.0, 7.0]]),
        ...     num_experts=2,
        ...     loss_type="aux_loss",
        ... )
        tensor([1.])
    """
    width = (statistics.shape[-1] - 2) // 3
    if loss_type == "z_loss":
        return statistics[:, 3 * width]
    start = 2 * width if loss_type == "switch" else width
    share = statistics[:, start : start + num_experts].detach()
    return num_experts * (share * statistics[:, :num_experts]).sum(dim=-1)


def gradient_by_statistics(
    statistics: Float[Tensor, " size"], *, num_experts: int, loss_type: str
) -> Float[Tensor, " size"]:
    """The gradient of one router's :func:`loss_of_statistics`, without the loss itself.

    Args:
        statistics: a row of what is given there.
        num_experts: experts of the router.
        loss_type: as in the config.

    Example:
        >>> statistics = torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 3.0, 7.0])
        >>> gradient_by_statistics(statistics, num_experts=2, loss_type="aux_loss")
        tensor([2., 0., 0., 0., 0., 0., 0., 0.])
    """
    width = (statistics.shape[0] - 2) // 3
    gradient = torch.zeros_like(statistics)
    if loss_type == "z_loss":
        gradient[3 * width] = 1.0
        return gradient
    start = 2 * width if loss_type == "switch" else width
    share = statistics[start : start + num_experts]
    torch.mul(share, num_experts, out=gradient[:num_experts])
    return gradient


def auxiliary_loss(
    routing: Routing, *, loss_type: str, token_mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, ""]:
    """The loss of one router that ``load_balance_loss_type`` names.

    Raises:
        ValueError: if ``loss_type`` is not a known type.

    Example:
        >>> from moelora.routing import top_k_routing
        >>> auxiliary_loss(top_k_routing(torch.zeros(2, 2), top_k=2), loss_type="aux_loss")
        tensor(1.)
    """
    if loss_type == "aux_loss":
        return load_balancing_loss(
            routing.router_probs, routing.selected_experts, token_mask=token_mask
        )
    if loss_type == "switch":
        return switch_loss(routing.router_probs, token_mask=token_mask)
    if loss_type == "z_loss":
        return router_z_loss(routing.router_logits, token_mask=token_mask)
    raise ValueError(f"loss_type must be 'aux_loss', 'switch' or 'z_loss', got {loss_type!r}.")


def _float_mask(
    like: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, " tokens"] | None
) -> Float[Tensor, "tokens 1"]:
    if token_mask is None:
        return torch.ones_like(like[:, :1])
    return token_mask.to(like.dtype).unsqueeze(-1)
