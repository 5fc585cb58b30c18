"""Sums over all routing decisions of a stretch of training: cheap, and without a graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.routing import Routing
from moelora.scope import TapeEntry
from moelora.traced import TracedSums

#: At most this many numbers are stacked at once, so that looking costs little memory.
_STACKED = 2**23


@dataclass(frozen=True)
class RouterSummary:
    """What one router did since the last summary.

    Attributes:
        load: each expert's share of the routed slots; they sum to 1.
        entropy: mean entropy of the router's probabilities in nats, at most ``log(experts)``.
        dropped: share of the routed slots that were lost to capacity or expert dropout.
        tokens: how many real tokens it routed.
        top_k: experts per token.
    """

    load: list[float]
    entropy: float
    dropped: float
    tokens: int
    top_k: int

    def busiest(self) -> float:
        """The share of slots that the ``top_k`` busiest experts take."""
        return sum(sorted(self.load)[-self.top_k :])


class RoutingObservation:
    """Adds up what every router decides. One pass over all layers of one shape at a time.

    Args:
        base: the bound base model that is looked at, for its compiled forwards; None without.
    """

    def __init__(self, base: nn.Module | None = None) -> None:
        self.traced = None if base is None else TracedSums(base)
        self._totals: dict[tuple[Any, ...], Tensor] = {}
        self._aux_loss: Tensor | None = None
        self._forwards = 0

    def observe(self, entries: list[TapeEntry], aux_loss: Tensor | None) -> None:
        """Add a training forward's decisions; called once per forward, not in recomputations."""
        groups: dict[tuple[Any, ...], list[TapeEntry]] = {}
        for entry in entries:
            if entry.routing is not None:
                groups.setdefault(_kind(entry, entry.routing), []).append(entry)
        with torch.no_grad():
            for (device, shape, top_k, _), group in groups.items():
                names = tuple(entry.layer_name for entry in group)
                self._add((names, device, shape[-1], top_k), _sums(group))
            if aux_loss is not None:
                aux_loss = aux_loss.detach()
                previous = self._aux_loss
                self._aux_loss = aux_loss.clone() if previous is None else previous + aux_loss
                self._forwards += 1

    def _add(self, key: tuple[Any, ...], sums: Tensor) -> None:
        if key in self._totals:
            self._totals[key] += sums
        else:
            self._totals[key] = sums

    def take(self) -> tuple[dict[str, RouterSummary], float | None]:
        """Return each router's summary and the mean auxiliary loss, over all processes; start anew.

        Every process has to call it, since the sums are added up.
        """
        totals, self._totals = self._totals, {}
        aux_loss, self._aux_loss = self._aux_loss, None
        forwards, self._forwards = self._forwards, 0
        rows, total, count = self._take_traced()
        for (names, _, _, top_k), sums in totals.items():
            for name, row in zip(names, _over_processes(sums).tolist(), strict=True):
                known = rows.get(name)
                if known is not None and len(known[0]) == len(row):
                    row = [a + b for a, b in zip(known[0], row, strict=True)]
                rows[name] = (row, top_k)
        summaries = {
            name: _summary(row, top_k) for name, (row, top_k) in sorted(rows.items()) if row[-1] > 0
        }
        if aux_loss is not None:
            sums = torch.stack([aux_loss.float(), aux_loss.new_tensor(float(forwards)).float()])
            eager_total, eager_count = _over_processes(sums).tolist()
            total, count = total + eager_total, count + eager_count
        return summaries, total / count if count else None

    def _take_traced(self) -> tuple[dict[str, tuple[list[float], int]], float, float]:
        """The sums of compiled forwards by router, their auxiliary losses and how many."""
        if self.traced is None:
            return {}, 0.0, 0.0
        sums, aux_loss = map(_over_processes, self.traced.take())
        total, count = aux_loss.tolist()
        return self.traced.rows_of(sums), total, count


def _kind(entry: TapeEntry, routing: Routing) -> tuple[Any, ...]:
    """What decisions must have in common to be added up together."""
    mask = None if entry.token_mask is None else entry.token_mask.data_ptr()
    probs = routing.router_probs
    return probs.device, tuple(probs.shape), routing.selected_experts.shape[-1], mask


def _sums(group: list[TapeEntry]) -> Tensor:
    """Per router: slots of each expert, lost slots, entropy, tokens; ``(routers, experts + 3)``."""
    first = group[0].routing
    numbers = 1 if first is None else max(1, first.router_probs.numel())
    step = max(1, _STACKED // numbers)
    pieces = [_sums_at_once(group[i : i + step]) for i in range(0, len(group), step)]
    return torch.cat(pieces)


def _sums_at_once(group: list[TapeEntry]) -> Tensor:
    routings = [entry.routing.detach() for entry in group if entry.routing is not None]
    probs = torch.stack([routing.router_probs for routing in routings])
    selected = torch.stack([routing.selected_experts for routing in routings])
    weights = torch.stack([routing.routing_weights for routing in routings])
    mask = group[0].token_mask
    real = torch.ones_like(probs[0, :, 0]) if mask is None else mask.to(probs.dtype)
    per_slot = real[:, None].expand(selected.shape)
    slots = torch.zeros_like(probs).scatter(-1, selected, per_slot).sum(dim=1)
    lost = (weights.gather(-1, selected) == 0) * per_slot
    entropy = torch.special.entr(probs).sum(dim=-1) * real
    tokens = real.sum().expand(len(routings))
    ends = [lost.sum(dim=(1, 2)), entropy.sum(dim=1), tokens]
    return torch.cat([slots, torch.stack(ends, dim=1)], dim=1).float()


def _summary(row: list[float], top_k: int) -> RouterSummary:
    *slots, lost, entropy, tokens = row
    return RouterSummary(
        load=[count / (tokens * top_k) for count in slots],
        entropy=entropy / tokens,
        dropped=lost / (tokens * top_k),
        tokens=round(tokens),
        top_k=top_k,
    )


def _over_processes(sums: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums
