"""What a report computes: pure functions, no model and no text.

Letters: ``D`` domains, ``E`` experts, ``T`` tokens, ``L`` sets of labels. A *share* is the part
that an expert has in the routing weight of a token; the shares of a token sum to 1. Sums of shares
are what is collected; ``sums / sums.sum()`` is a load.

Every router numbers its experts by itself, so expert 2 of one layer has nothing to do with expert 2
of another. What is averaged over routers therefore shows balance; specialisation shows in single
routers, and in means of numbers (entropy, information) that no renaming of experts changes.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.errors import ReportError


def token_shares(
    routing_weights: Float[Tensor, "*batch experts"],
) -> Float[Tensor, "*batch experts"]:
    """Return each expert's share in the weight of a token: ``|w_e| / sum_i |w_i|``, float64.

    A token without any weight has only zeros, and so counts nowhere.

    Args:
        routing_weights: what multiplies the experts; of either sign, of any sum.

    Example:
        >>> token_shares(torch.tensor([[0.6, 0.0, 0.2], [0.0, 0.0, 0.0]]))
        tensor([[0.7500, 0.0000, 0.2500],
                [0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    size = routing_weights.double().abs()
    total = size.sum(dim=-1, keepdim=True)
    return size / torch.where(total > 0, total, torch.ones_like(total))


def load_of(sums: Float[Tensor, "*rows experts"]) -> Float[Tensor, "*rows experts"]:
    """Return sums of shares as loads, which sum to 1; a row without tokens gives zeros.

    Args:
        sums: of the shares of any number of tokens.
    """
    total = sums.sum(dim=-1, keepdim=True)
    return sums / torch.where(total > 0, total, torch.ones_like(total))


def entropy(shares: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    """Return ``- sum_e p_e log2 p_e``, in bits: 0 if one expert has all, ``log2 E`` if all alike.

    Args:
        shares: each row sums to 1, or is zero.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0., 1.])
    """
    # adding zero turns -0. into 0.
    bits: Tensor = -torch.special.xlogy(shares, shares).sum(dim=-1) / math.log(2.0) + 0.0
    return bits


def mutual_information(sums: Float[Tensor, "*batch domains experts"]) -> Float[Tensor, "*batch"]:
    """Return how much the domain of a token says about its expert, in bits.

    ``I = sum_de p(d, e) log2( p(d, e) / (p(d) p(e)) )`` with ``p(d, e) = sums[d, e] / sums.sum()``:
    draw a token, then an expert with the probability of its share. 0 if all domains load the
    experts alike; at most the entropy of the domains, and at most that of the load. It is also the
    mean, over tokens, of the Kullback-Leibler divergence of a domain's load from the whole load.

    Args:
        sums: of the shares of the tokens of each domain.

    Example:
        >>> mutual_information(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
        tensor(1.)
    """
    joint = sums / sums.sum(dim=(-2, -1), keepdim=True)
    whole = entropy(joint.flatten(-2))
    bits = entropy(joint.sum(dim=-1)) + entropy(joint.sum(dim=-2)) - whole
    # what rounding leaves below 0 is 0
    return bits.clamp(min=0.0)


def coactivation_sums(
    routing_weights: Float[Tensor, "*batch tokens experts"],
) -> Float[Tensor, "*batch experts experts"]:
    """Count the tokens that both of two experts serve, with any weight but 0; float64.

    The diagonal counts the tokens that an expert serves.

    Args:
        routing_weights: what multiplies the experts.

    Example:
        >>> coactivation_sums(torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.0, 0.1]]))
        tensor([[2., 1., 1.],
                [1., 1., 0.],
                [1., 0., 1.]], dtype=torch.float64)
    """
    active = (routing_weights != 0).double()
    return active.transpose(-1, -2) @ active


def shuffled_labels(
    labels: Int[Tensor, " passages"], *, permutations: int, seed: int
) -> Int[Tensor, "sets passages"]:
    """Return the labels and, below them, random permutations of them.

    Each permutation keeps how many passages a domain has. Passages are shuffled, not tokens: those
    of one passage resemble one another, and torn apart they would make any difference look certain.

    Args:
        labels: the domain of each passage.
        permutations: rows below the first.
        seed: the same seed gives the same permutations.

    Example:
        >>> shuffled_labels(torch.tensor([0, 0, 1]), permutations=2, seed=0).shape
        torch.Size([3, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(permutations)]
    return torch.stack([labels, *(labels[order] for order in orders)])


def pair_products(
    pairs: Sequence[tuple[Tensor, Tensor, float]],
) -> Float[Tensor, "experts experts"]:
    """Return ``< s_i B_i A_i , s_j B_j A_j >`` for all pairs of one layer's experts, float64.

    ``< B_i A_i, B_j A_j > = sum( (B_i^T B_j) * (A_i A_j^T) )``: two products of size
    ``[rank, rank]``, never one of ``[out, in]``.

    Args:
        pairs: of each expert A ``(rank, in)``, B ``(out, rank)`` and scaling; ranks may differ.

    Raises:
        ReportError: if the experts are of different widths.

    Example:
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [1.0]])
        >>> pair_products([(a, b, 1.0), (a, b, -2.0)])
        tensor([[  50., -100.],
                [-100.,  200.]], dtype=torch.float64)
    """
    if len({(a.shape[1], b.shape[0]) for a, b, _ in pairs}) != 1:
        raise ReportError("Experts of different widths cannot be compared.")
    ranks = [a.shape[0] for a, _, _ in pairs]
    a = torch.cat([a.double() for a, _, _ in pairs])
    b = torch.cat([scaling * b.double() for _, b, scaling in pairs], dim=1)
    products = (b.T @ b) * (a @ a.T)
    rows = [block.sum(dim=0) for block in products.split(ranks)]
    return torch.stack([part.sum(dim=-1) for part in torch.stack(rows).split(ranks, dim=1)], dim=1)


def cosines(products: Float[Tensor, "experts experts"]) -> Float[Tensor, "experts experts"]:
    """Return the cosines of vectors from their inner products; NaN where one of them is zero.

    Args:
        products: as `pair_products` returns them, or a sum of such over layers.

    Example:
        >>> cosines(torch.tensor([[4.0, 3.0], [3.0, 9.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    length = products.diagonal().clamp(min=0.0).sqrt()
    scale = length.unsqueeze(1) * length.unsqueeze(0)
    values = (products / scale).clamp(-1.0, 1.0)
    return values.masked_fill(scale == 0, float("nan"))
