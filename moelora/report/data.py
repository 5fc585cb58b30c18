"""Collecting: forwards over passages, and the running sums that a report is made of.

Memory does not grow with the text: of each forward's routing only sums stay, and the percentages of
the first tokens of each domain.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moelora.asking import ask_router
from moelora.binding import base_of
from moelora.first_pass import first_pass
from moelora.places import is_encoder_decoder
from moelora.record import RoutingRecord, record_routing
from moelora.report.passages import Passage, pad
from moelora.report.routers import DECODER, ENCODER, TOKENS, RoutedModel, RouterPlace
from moelora.report.statistics import coactivation_sums, entropy, token_shares
from moelora.scope import scope_of

POSITION_BINS = 16
#: Bins of the order of the data, over all domains.
ORDER_BINS = 24
#: Tokens of each domain that are kept one by one.
SHOWN_TOKENS = 160


@dataclass
class Sums:
    """Running sums of one router, float64.

    Attributes:
        labelled: sets of labels x domains x experts; the first set are the true labels.
        by_position: bins x experts.
        by_order: bins x experts.
        together: experts x experts, tokens that both serve.
        entropy: of the shares of its tokens.
        shown: by domain, the percentages of its first tokens.
    """

    labelled: Tensor
    by_position: Tensor
    by_order: Tensor
    together: Tensor
    entropy: float = 0.0
    shown: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How tokens are sorted: fixed before the first forward.

    Attributes:
        labels: sets x passages, the domain of each passage.
        offset: by domain, the number of passages of the domains before it.
        max_length: of a passage.
        order_bin: of each passage.
        order: the domain of each bin.
    """

    labels: Tensor
    offset: list[int]
    max_length: int
    order_bin: list[int]
    order: list[int]

    @property
    def position_bins(self) -> int:
        """The number of bins of the position in a passage."""
        return min(POSITION_BINS, self.max_length)


def order_bins(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sort passages into bins by their order, each bin within one domain.

    Args:
        sizes: passages of each domain.

    Returns:
        The bin of each passage, and the domain of each bin.

    Example:
        >>> order_bins([3, 1])
        ([0, 1, 2, 3], [0, 0, 0, 1])
    """
    most = max(1, ORDER_BINS // len(sizes))
    bins: list[int] = []
    order: list[int] = []
    for domain, size in enumerate(sizes):
        number = min(size, most)
        bins += [len(order) + index * number // size for index in range(size)]
        order += [domain] * number
    return bins, order


class Collector:
    """Adds up what the routers of a model decide.

    Args:
        places: the routers to watch; their sums are of their own columns.
        plan: how tokens are sorted.
    """

    def __init__(self, places: Sequence[RouterPlace], plan: Plan) -> None:
        self.plan = plan
        self.places = {place.name: place for place in places}
        self.left_out: set[str] = set()
        sets, domains = plan.labels.shape[0], len(plan.offset)
        self.sums: dict[str, Sums] = {}
        for place in places:
            experts = len(place.columns)

            def zeros(*sizes: int, experts: int = experts) -> Tensor:
                return torch.zeros(*sizes, experts, dtype=torch.float64)

            self.sums[place.name] = Sums(
                labelled=zeros(sets, domains),
                by_position=zeros(plan.position_bins),
                by_order=zeros(len(plan.order)),
                together=zeros(experts),
            )

    def add(self, weights: dict[str, Tensor], mask: Tensor, batch: Sequence[Passage]) -> None:
        """Add one forward.

        Args:
            weights: ``(batch * seq, experts)`` or ``(batch, experts)``, by router.
            mask: ``(batch, seq)`` 1 for real tokens; of every stack alike.
            batch: its passages.
        """
        real = mask.cpu().bool()
        tokens = _Tokens.of(real, batch, self.plan)
        for names, stacked in self._stacks(weights, real):
            self._add_stack(names, stacked, tokens)

    def _stacks(
        self, weights: dict[str, Tensor], real: Tensor
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Routers with equally many experts together: ``(routers, tokens, experts)``."""
        groups: dict[int, dict[str, Tensor]] = {}
        for name, value in weights.items():
            if name not in self.sums:
                continue
            experts = len(self.places[name].columns)
            if value.shape[-1] != experts or value.numel() != real.numel() * experts:
                self.left_out.add(name)
                continue
            flat = value.detach().reshape(-1, experts).float().cpu()
            groups.setdefault(experts, {})[name] = flat[real.flatten()]
        for group in groups.values():
            yield list(group), torch.stack(list(group.values()))

    def _add_stack(self, names: list[str], weights: Tensor, tokens: "_Tokens") -> None:
        shares = token_shares(weights)
        passages = _grouped(shares, tokens.row, len(tokens.labels[0]))
        positions = _grouped(shares, tokens.position, self.plan.position_bins)
        orders = _grouped(shares, tokens.order, len(self.plan.order))
        domains = len(self.plan.offset)
        labelled = torch.stack([_grouped(passages, row, domains) for row in tokens.labels], dim=1)
        together = coactivation_sums(weights)
        entropies = entropy(shares).sum(dim=-1).tolist()
        for index, name in enumerate(names):
            sums = self.sums[name]
            sums.labelled += labelled[index]
            sums.by_position += positions[index]
            sums.by_order += orders[index]
            sums.together += together[index]
            sums.entropy += entropies[index]
            if tokens.first_of is not None:
                kept = shares[index, : tokens.first_length]
                sums.shown[tokens.first_of] = (100 * kept).round().to(torch.uint8)


@dataclass(frozen=True)
class _Tokens:
    """Where the real tokens of a batch belong, row by row."""

    row: Tensor
    position: Tensor
    order: Tensor
    labels: Tensor
    first_of: int | None
    first_length: int

    @classmethod
    def of(cls, real: Tensor, batch: Sequence[Passage], plan: Plan) -> "_Tokens":
        rows, seq = real.shape
        numbers = [plan.offset[p.domain] + p.index for p in batch]
        row = torch.arange(rows).unsqueeze(1).expand(rows, seq)[real]
        position = torch.arange(seq).expand(rows, seq)[real] * plan.position_bins // plan.max_length
        order = torch.tensor([plan.order_bin[number] for number in numbers])[row]
        first = batch[0]
        return cls(
            row=row,
            position=position,
            order=order,
            labels=plan.labels[:, numbers],
            first_of=first.domain if first.index == 0 else None,
            first_length=min(len(first.ids), SHOWN_TOKENS),
        )


def _grouped(values: Tensor, groups: Tensor, number: int) -> Tensor:
    """Sum ``(routers, n, experts)`` over the members of each group."""
    sums = values.new_zeros(values.shape[0], number, values.shape[-1])
    return sums.index_add(1, groups, values)


# Forwards ------------------------------------------------------------------------------------


def observe(
    model: nn.Module,
    routed: RoutedModel,
    collector: Collector,
    batch: Sequence[Passage],
    *,
    pad_token_id: int,
    device: torch.device,
) -> None:
    """Run one batch through the model and add what its routers decide.

    Args:
        model: in evaluation mode.
        routed: as `look_at` found it.
        collector: takes the routing.
        batch: passages of one domain.
        pad_token_id: fills the batch; padding counts nowhere.
        device: of the model's input.
    """
    ids, mask = pad([passage.ids for passage in batch], pad_token_id=pad_token_id)
    inputs = _inputs(routed.base, ids, mask)
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    if routed.scope == "fixed":
        constant = torch.tensor([w for weights in routed.constants.values() for w in weights])
        name = routed.places[0].name
        collector.add({name: constant.expand(mask.numel(), -1)}, mask, batch)
        return
    with torch.no_grad():
        weights = _ask(routed, inputs) if routed.asked else _record(model, routed, inputs)
    rows, seq = mask.shape
    collector.add({name: _per_token(w, rows, seq) for name, w in weights.items()}, mask, batch)


def _record(model: nn.Module, routed: RoutedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    if routed.attached is not None:
        caught: dict[str, Tensor] = {}
        name = routed.places[0].name
        hook = routed.attached.register_forward_hook(
            lambda _module, _args, output: caught.__setitem__(name, output)
        )
        try:
            model(**inputs)
        finally:
            hook.remove()
        return caught
    with record_routing(model) as record:
        model(**inputs)
    return _weights(record)


def _weights(record: RoutingRecord) -> dict[str, Tensor]:
    return {name: routing.routing_weights for name, routing in record.routing.items()}


def _ask(routed: RoutedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a router that does not route by itself says to the base model's hidden states."""
    scope = scope_of(routed.base)
    if scope is None or routed.attached is None:
        return {}
    hidden_states, _ = first_pass(routed.base, scope, (), inputs)
    return {routed.places[0].name: ask_router(routed.attached, hidden_states)}


def _per_token(weights: Tensor, rows: int, seq: int) -> Tensor:
    """One weight vector per row serves all tokens of the row."""
    if weights.ndim == 2 and weights.shape[0] == rows and seq > 1:
        return weights.unsqueeze(1).expand(rows, seq, -1)
    return weights


def _inputs(base: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if is_encoder_decoder(base):
        inputs["decoder_input_ids"] = shifted(ids, start=start_token(base))
        inputs["decoder_attention_mask"] = mask
    accepted = inspect.signature(base.forward).parameters
    # neither a cache nor logits are looked at, and both are large
    spared = {"use_cache": False, "logits_to_keep": 1}
    return inputs | {name: value for name, value in spared.items() if name in accepted}


def start_token(base: nn.Module) -> int:
    """What an encoder-decoder model's decoder starts with."""
    config: Any = base.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 0


def shifted(ids: Tensor, *, start: int) -> Tensor:
    """Shift ids to the right by one, as a decoder that writes them sees them."""
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode, without dropout or capacity; every mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def streams(base: nn.Module) -> tuple[str, ...]:
    """What routers of this model read."""
    return (ENCODER, DECODER) if is_encoder_decoder(base_of(base)) else (TOKENS,)
