"""The mixture's arithmetic in plain PyTorch: one product down, a scaling, one product up."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def mix_ranks(
    ranks: Float[Tensor, "*batch ranks"], weights: Float[Tensor, "*#batch experts"]
) -> Float[Tensor, "*batch ranks"]:
    """Scale each expert's share of the rank space by its weight: ``expand(weights) * ranks``.

    Args:
        ranks: ``A x``, expert by expert.
        weights: weight times scaling of each expert; leading axes may broadcast. Any float dtype;
            the result keeps the dtype of ``ranks``.

    Raises:
        ValueError: if the rank space cannot be split evenly over the experts.

    Example:
        >>> import torch
        >>> mix_ranks(torch.ones(1, 4), torch.tensor([[1.0, 0.0]]))
        tensor([[1., 1., 0., 0.]])
    """
    experts = weights.shape[-1]
    if experts == 0 or ranks.shape[-1] % experts:
        raise ValueError(f"ranks={ranks.shape[-1]} cannot be split evenly over experts={experts}.")
    weights = weights.to(ranks.dtype)
    if experts == 1:
        return ranks * weights
    per_expert: Tensor = ranks.unflatten(-1, (experts, ranks.shape[-1] // experts))
    return (per_expert * weights.unsqueeze(-1)).flatten(-2)


def lora_combine(
    x: Float[Tensor, "*batch d_in"],
    lora_a: Float[Tensor, "ranks d_in"],
    lora_b: Float[Tensor, "d_out ranks"],
    weights: Float[Tensor, "*#batch experts"],
) -> Float[Tensor, "*batch d_out"]:
    """The weighted update of a mixture: ``delta[t] = sum_e weights[t, e] * B_e (A_e x[t])``.

    Computed as ``B (expand(weights) * (A x))``: nothing of size tokens x d_out is made per expert.
    Same meaning as :func:`moelora.ops.reference.lora_combine_reference`.

    Raises:
        ValueError: if ``ranks`` is not a multiple of ``experts``.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> lora_combine(one, one, one, 2 * one)
        tensor([[2.]])
    """
    delta: Tensor = F.linear(mix_ranks(F.linear(x, lora_a), weights), lora_b)
    return delta
