"""The definition of correct: one plain loop over tokens and experts."""

import torch
from jaxtyping import Float
from torch import Tensor


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
