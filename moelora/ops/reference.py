"""The definition of correct: plain loops over tokens and experts."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moelora.ops.options import RouterOptions


def lora_combine_reference(
    x: Float[Tensor, "tokens d_in"],
    lora_a: Float[Tensor, "ranks d_in"],
    lora_b: Float[Tensor, "d_out ranks"],
    weights: Float[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens d_out"]:
    """The weighted update of a mixture: ``delta[t] = sum_e weights[t, e] * B_e (A_e x[t])``.

    Expert ``e`` owns the rows ``e * r .. (e + 1) * r`` of ``lora_a`` and those columns of
    ``lora_b``, with ``r = ranks / experts``. ``weights`` already holds each expert's scaling.

    Raises:
        ValueError: if ``ranks`` is not a multiple of ``experts``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> lora_combine_reference(one, one, one, 2 * one)
        tensor([[2.]])
    """
    experts, ranks = weights.shape[-1], lora_a.shape[0]
    if experts == 0 or ranks % experts:
        raise ValueError(f"ranks={ranks} cannot be split evenly over experts={experts}.")
    r = ranks // experts
    rows = []
    for token in range(x.shape[0]):
        delta = x.new_zeros(lora_b.shape[0])
        for expert in range(experts):
            own = slice(expert * r, (expert + 1) * r)
            delta = delta + weights[token, expert] * (lora_b[:, own] @ (lora_a[own] @ x[token]))
        rows.append(delta)
    return torch.stack(rows) if rows else x.new_zeros(0, lora_b.shape[0])


def routed_linear_reference(
    x: Float[Tensor, "tokens d_in"],
    base_weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    lora_a: Float[Tensor, "ranks d_in"],
    lora_b: Float[Tensor, "d_out ranks"],
    router: Float[Tensor, "experts d_in"],
    *,
    options: RouterOptions,
    token_mask: Bool[Tensor, " tokens"] | None = None,
    mature: Bool[Tensor, " experts"] | None = None,
) -> tuple[Float[Tensor, "tokens d_out"], dict[str, Tensor]]:
    """A frozen linear layer and its mixture, routed by a linear router that reads the same input.

    For each token in order: softmax of ``router x / temperature``; the ``top_k`` highest are chosen
    (the lower index first among equals), those whose expert has served its share already are lost,
    and the softmax over the rest weighs the experts (for ``top_k == 1`` the probability over all).
    Padding takes no share and, under a capacity, gets no expert. While an expert is young, the
    probabilities themselves are the weights.

    Returns:
        The output, and the statistics over valid tokens: ``mean_probs``, ``slot_share``,
        ``first_share`` (each ``(experts,)``), ``mean_squared_logsumexp`` and ``tokens``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> options = RouterOptions(1, 1, 1.0, 2.0)
        >>> routed_linear_reference(one, one, None, one, one, one, options=options)[0]
        tensor([[3.]])
    """
    experts, top_k = options.num_experts, options.top_k
    valid = [True] * len(x) if token_mask is None else [bool(flag) for flag in token_mask]
    number = max(1, sum(valid))
    limit = math.inf
    if options.capacity_factor is not None:
        # a product that is a whole number but for rounding is that number
        limit = math.ceil(options.capacity_factor * sum(valid) * top_k / experts - 1e-4)
    shares = mature is not None and not bool(mature.all())
    served = [0] * experts
    slots, firsts = x.new_zeros(experts), x.new_zeros(experts)
    mean_probs, squares = x.new_zeros(experts), x.new_zeros(())
    weights = []
    for token in range(len(x)):
        logits = router @ x[token] / options.temperature
        probs = logits.softmax(dim=0)
        order = sorted(range(experts), key=lambda expert: (-float(logits[expert]), expert))[:top_k]
        kept = [e for e in order if served[e] < limit]
        if limit < math.inf and not valid[token]:
            kept = []
        row = [x.new_zeros(())] * experts
        for expert in kept:
            others = logits[kept] if top_k > 1 else logits
            row[expert] = 1 / (others - logits[expert]).exp().sum()
        weights.append(probs if shares else torch.stack(row))
        if not valid[token]:
            continue
        for expert in order:
            served[expert] += 1
            slots[expert] += 1 / (number * top_k)
        firsts[order[0]] += 1 / number
        mean_probs = mean_probs + probs / number
        squares = squares + logits.logsumexp(dim=0) ** 2 / number
    output = x @ base_weight.t() if bias is None else x @ base_weight.t() + bias
    stacked = torch.stack(weights) if weights else x.new_zeros(0, experts)
    update = lora_combine_reference(x, lora_a, lora_b, stacked * options.scaling)
    return output + update, {
        "weights": stacked,
        "mean_probs": mean_probs,
        "slot_share": slots,
        "first_share": firsts,
        "mean_squared_logsumexp": squares,
        "tokens": torch.tensor(float(number)),
    }
