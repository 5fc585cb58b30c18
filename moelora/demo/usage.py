"""Which experts serve whom: pure functions from recorded routing to shares.

Every router numbers its experts by itself, so expert 2 of one module has nothing to do with expert
2 of another. What is averaged over modules therefore shows load, and what is shown of a single
module shows specialisation.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.routing import Routing

SHUFFLES = 20


def stack_routing_weights(
    routing: Mapping[str, Routing], attention_mask: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq routers experts"]:
    """Stack the routing weights of one forward, in the order of the mapping.

    Args:
        routing: of every router, its tokens flattened row by row.
        attention_mask: of that forward; padding gets weight 0.
    """
    flat = torch.stack([each.routing_weights for each in routing.values()], dim=1)
    weights = flat.reshape(*attention_mask.shape, *flat.shape[1:]).float().cpu()
    return weights * attention_mask.cpu()[..., None, None]


def example_shares(
    routing_weights: Float[Tensor, "batch seq routers experts"],
) -> Float[Tensor, "batch routers experts"]:
    """Return each expert's share in serving each text, summing to 1 over the experts.

    Args:
        routing_weights: zero for padding; at least one token of each text is not.
    """
    sums = routing_weights.sum(dim=1)
    return sums / sums.sum(dim=-1, keepdim=True)


def skill_shares(
    shares: Float[Tensor, "examples routers experts"], skills: Int[Tensor, " examples"]
) -> Float[Tensor, "skills routers experts"]:
    """Return the mean share of each expert over the texts of each skill.

    Args:
        shares: as `example_shares` returns them.
        skills: the skill of each text, counted from 0, none left out.
    """
    return torch.stack([shares[skills == s].mean(dim=0) for s in range(int(skills.max()) + 1)])


def separation(
    by_skill: Float[Tensor, "skills routers experts"],
) -> Float[Tensor, " routers"]:
    """Measure how far a router tells the skills apart.

    Returns the mean over skills of the total variation distance between the skill's expert shares
    and those of all skills together: 0 if every skill uses the experts alike, at most
    ``1 - 1 / skills`` if no two skills share an expert.

    Args:
        by_skill: as `skill_shares` returns them.

    Example:
        >>> separation(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.5000])
    """
    deviation = by_skill - by_skill.mean(dim=0, keepdim=True)
    return deviation.abs().sum(dim=-1).mean(dim=0) / 2


def shuffled_separation(
    shares: Float[Tensor, "examples routers experts"],
    skills: Int[Tensor, " examples"],
    *,
    seed: int,
) -> Float[Tensor, " routers"]:
    """Return the separation that texts sorted into skills at random would show, 20 times averaged.

    Args:
        shares: as `example_shares` returns them.
        skills: the skill of each text, counted from 0, none left out.
        seed: of the random order.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(skills), generator=generator) for _ in range(SHUFFLES))
    return torch.stack([separation(skill_shares(shares, skills[o])) for o in orders]).mean(dim=0)


def layer_shares(
    by_skill: Float[Tensor, "skills routers experts"], layers: Sequence[int]
) -> Float[Tensor, "layers experts"]:
    """Return the mean share of each expert over the skills and the routers of each layer.

    Args:
        by_skill: as `skill_shares` returns them.
        layers: the layer of each router; the rows are its distinct values, ascending.
    """
    per_router = by_skill.mean(dim=0)
    of = torch.tensor(layers)
    return torch.stack([per_router[of == layer].mean(dim=0) for layer in sorted(set(layers))])


def clearest_routers(
    separations: Float[Tensor, " routers"], layers: Sequence[int]
) -> dict[int, int]:
    """Return for each layer its router with the largest separation, layers ascending.

    Args:
        separations: as `separation` returns them.
        layers: the layer of each router.
    """
    best: dict[int, int] = {}
    for router, layer in enumerate(layers):
        if layer not in best or separations[router] > separations[best[layer]]:
            best[layer] = router
    return dict(sorted(best.items()))
