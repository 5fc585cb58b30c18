"""Balance statistics over several processes: one collective for all routers of a forward.

The load balancing loss is a product of two means over tokens, so the mean of the losses of several
ranks is not the loss of their joined batch. Averaging the means first makes it so.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributed as dist

from moelora.routing import Routing


class _SumOverRanks(torch.autograd.Function):
    """All-reduce by sum, whose backward is the same: every rank's loss depends on every rank."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004 - the signature is torch's
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:  # noqa: ARG004
        return _summed(grad_outputs[0])


def _summed(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def number_of_ranks() -> int:
    """How many processes train together; 1 without a process group.

    Example:
        >>> number_of_ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, with its gradient; itself in one process.

    The gradient is that of the sum of all ranks' losses. Where the gradients of parameters are then
    averaged over ranks (DDP, FSDP), a loss that is equal on all ranks gets its gradient once.

    Args:
        values: of equal shape and dtype on every rank.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if number_of_ranks() == 1:
        return values
    summed: Tensor = _SumOverRanks.apply(values)
    return summed


def whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP2 keeps in pieces, as a whole; any other as it is.

    FSDP2 makes parameters whole for the forward of the module they were grouped with; a router of
    the whole model decides before that. Its gradient is averaged over ranks as FSDP2 would.

    Args:
        tensor: a parameter or any tensor.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor
    averaged = [module.Partial("avg")] * tensor.device_mesh.ndim
    gathered: Tensor = tensor.full_tensor(grad_placements=averaged)
    return gathered


def statistics_of(
    routing: Routing, *, token_mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, " size"]:
    """What the auxiliary losses of one router are made of, as means over its real tokens.

    Args:
        routing: the decision.
        token_mask: True for real tokens.

    Returns:
        The experts' mean probabilities, shares of slots and shares of first choices, the mean
        squared logsumexp of the logits, and the number of tokens: what
        :func:`moelora.losses.loss_of_statistics` reads. Probabilities and the squares carry
        gradient.

    Example:
        >>> from moelora.routing import top_k_routing
        >>> statistics_of(top_k_routing(torch.zeros(3, 2), top_k=2))[-1]
        tensor(3.)
    """
    probs, selected = routing.router_probs, routing.selected_experts
    mask = probs.new_ones(len(probs)) if token_mask is None else token_mask.to(probs.dtype)
    tokens = mask.sum()
    divisor = tokens.clamp(min=1.0)
    slots = torch.zeros_like(probs).scatter(-1, selected, 1.0) / selected.shape[-1]
    first = torch.zeros_like(probs).scatter(-1, probs.argmax(dim=-1, keepdim=True), 1.0)
    squares = routing.router_logits.logsumexp(dim=-1).square()
    means = [(mask @ values) / divisor for values in (probs, slots, first)]
    return torch.cat([*means, ((mask @ squares) / divisor)[None], tokens[None]])


def average_over_ranks(statistics: Sequence[Tensor]) -> list[Tensor]:
    """Means over the tokens of all ranks, from means over each rank's own.

    One collective for all routers, in their order: every rank must give as many.

    Args:
        statistics: for each router a vector of means, whose last number counts its tokens; see
            :func:`statistics_of`.

    Returns:
        The same for the joined batch.

    Example:
        >>> average_over_ranks([torch.tensor([0.5, 0.5, 4.0])])
        [tensor([0.5000, 0.5000, 4.0000])]
    """
    if number_of_ranks() == 1:
        return list(statistics)
    sums = [torch.cat([row[:-1] * row[-1], row[-1:]]) for row in statistics]
    device = sums[0].device
    totals = sum_over_ranks(torch.cat([row.to(device) for row in sums]))
    pieces = totals.split([len(row) for row in sums])
    return [
        torch.cat([piece[:-1] / piece[-1].clamp(min=1.0), piece[-1:]]).to(row.device)
        for piece, row in zip(pieces, statistics, strict=True)
    ]
