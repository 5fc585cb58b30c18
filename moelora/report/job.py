"""From a model and text to a `RoutingReport`."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from moelora.config import is_int
from moelora.errors import ReportError
from moelora.report.data import (
    SHOWN_TOKENS,
    Collector,
    Plan,
    Sums,
    evaluating,
    observe,
    order_bins,
    start_token,
    streams,
)
from moelora.report.names import short_name, spell_tokens
from moelora.report.passages import Passage, batches, cut_passages
from moelora.report.results import (
    DomainSummary,
    Information,
    LayerReport,
    RouterReport,
    RoutingReport,
    TokenView,
)
from moelora.report.routers import (
    DECODER,
    RoutedModel,
    RouterPlace,
    blocks_of,
    keep_layers,
    look_at,
    similarities,
)
from moelora.report.statistics import entropy, load_of, mutual_information, shuffled_labels
from moelora.report.training_log import read_training_loads

DIGITS = 6
#: Routers whose single tokens are kept; of more, the clearest of each layer.
MOST_SHOWN = 32
FEW_PASSAGES = 8


def routing_report(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Iterable[str]],
    *,
    max_tokens: int = 20_000,
    max_length: int = 256,
    batch_size: int = 8,
    layers: Sequence[int] | None = None,
    permutations: int = 20,
    seed: int = 0,
    training_log: "str | os.PathLike[str] | None" = None,
    expert_names: Sequence[str] | None = None,
    model_name: str | None = None,
    sources: Mapping[str, str] | None = None,
    show_progress: bool = False,
) -> RoutingReport:
    """Run text through a routed model and say which expert serves what.

    Texts are cut into passages of at most ``max_length`` tokens and run in evaluation mode, without
    gradient; the model's modes come back afterwards. Padding counts nowhere. Memory does not grow
    with the text beyond its token ids. An encoder-decoder model gets each passage in its encoder
    and, shifted right, in its decoder, as if it copied the text.

    Beside every figure about domains stands what chance gives: the same for ``permutations`` random
    permutations of the passages' domains. How each figure is computed is said in
    :mod:`moelora.report.statistics`.

    Args:
        model: a PEFT model with an active mixture of any ``router_scope`` or type, or several; or
            with an attached router, which is asked where it does not route by itself.
        tokenizer: of its base model.
        domains: texts by the name of their domain; they may be iterators, and are read only as far
            as ``max_tokens`` asks.
        max_tokens: most tokens of each domain.
        max_length: most tokens of a passage.
        batch_size: passages in a forward.
        layers: numbers of the transformer blocks to report; None for every router.
        permutations: of the baseline.
        seed: of the permutations.
        training_log: a file of loads over the training, see
            :func:`moelora.report.training_log.read_training_loads`.
        expert_names: names of the experts, in routing order; by default those of the adapters.
        model_name: shown in the title.
        sources: where each domain came from, to be shown.
        show_progress: show a bar on standard error.

    Raises:
        ReportError: if nothing of the model is routed, a domain holds no text, an option is out of
            range, or the log holds no loads.

    Example:
        >>> report = routing_report(model, tokenizer, {"sql": queries, "french": letters})
        ... # doctest: +SKIP
        >>> write_report(report, "my-report")  # doctest: +SKIP
    """
    _check_options(
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        permutations=permutations,
        seed=seed,
    )
    routed = look_at(model)
    places = keep_layers(routed, layers)
    experts = _expert_names(model, routed, expert_names)
    training = (
        None if training_log is None else read_training_loads(training_log, experts=len(experts))
    )
    max_length = min(max_length, _longest(routed.base, tokenizer))
    passages, summaries = cut_passages(
        domains, tokenizer, max_tokens=max_tokens, max_length=max_length, sources=sources
    )
    plan = _plan(passages, summaries, permutations=permutations, seed=seed)
    collector = Collector(places, plan)
    _run(model, routed, collector, passages, tokenizer, batch_size, show_progress=show_progress)
    seen = [place for place in places if bool(collector.sums[place.name].labelled.any())]
    if not seen:
        raise ReportError("None of the routers decided over the tokens of the text.")
    odd = [p.name for p in seen if not bool(collector.sums[p.name].labelled.isfinite().all())]
    if odd:
        raise ReportError(f"The routing weights of {odd[0]} hold NaN or infinity.")
    settings: dict[str, str | int | float | None] = {
        "base_model": _name_of(routed.base),
        "max_tokens": max_tokens,
        "max_length": max_length,
        "batch_size": batch_size,
        "layers": None if layers is None else ", ".join(map(str, layers)),
        "permutations": permutations,
        "seed": seed,
    }
    made = _Made(model, routed, seen, collector, passages, summaries, experts)
    name = model_name or _name_of(routed.base)
    return _assemble(made, tokenizer, name, training=training, settings=settings)


@dataclass(frozen=True)
class _Made:
    """What the parts of the report are computed from."""

    model: nn.Module
    routed: RoutedModel
    places: list[RouterPlace]
    collector: Collector
    passages: list[Passage]
    domains: list[DomainSummary]
    experts: list[str]

    @property
    def sums(self) -> list[Sums]:
        return [self.collector.sums[place.name] for place in self.places]

    @property
    def columns(self) -> list[list[int]]:
        """The positions of each router's experts."""
        experts = self.routed.experts
        return [[experts.index(column) for column in place.columns] for place in self.places]

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """The mean over routers of ``(..., own experts)``; an expert that one lacks counts 0."""
        total = torch.zeros(*values[0].shape[:-1], len(self.experts), dtype=torch.float64)
        for columns, value in zip(self.columns, values, strict=True):
            total[..., columns] += value
        return total / len(values)


def _assemble(
    made: _Made,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    training: Any,
    settings: dict[str, str | int | float | None],
) -> RoutingReport:
    shuffles = len(made.domains) > 1
    # sets x routers
    bits = torch.stack([mutual_information(sums.labelled) for sums in made.sums], dim=1)
    each_similarity, similarity, amiss = similarities(made.routed, made.places)
    labels, layer_of = blocks_of(made.places)
    routers = [
        _router_report(
            made, index, bits[:, index], layer=layer_of[index], similarity=each_similarity[index]
        )
        for index in range(len(made.places))
    ]
    shown = _shown(routers)
    return RoutingReport(
        model=name,
        experts=made.experts,
        router_scope=made.routed.scope,
        domains=made.domains,
        routers=routers,
        layers=[
            _layer_report(made, label, [i for i, at in enumerate(layer_of) if at == layer], bits)
            for layer, label in enumerate(labels)
        ],
        load=_rounded(made.mean([load_of(sums.labelled[0].sum(dim=0)) for sums in made.sums])),
        domain_load=_rounded(made.mean([load_of(sums.labelled[0]) for sums in made.sums])),
        shuffled_load=_rounded(made.mean([load_of(sums.labelled[1]) for sums in made.sums]))
        if shuffles
        else None,
        information=_information(bits.mean(dim=1)) if shuffles else None,
        positions=_position_names(made.collector.plan),
        order=made.collector.plan.order,
        similarity=similarity,
        training=training,
        shown=shown,
        token_views=_token_views(made, tokenizer, shown),
        settings=settings,
        notes=_notes(made) + amiss,
    )


def _router_report(
    made: _Made,
    index: int,
    bits: Tensor,
    *,
    layer: int,
    similarity: list[list[float | None]] | None,
) -> RouterReport:
    place, sums = made.places[index], made.sums[index]
    true = sums.labelled[0]
    tokens = true.sum()
    load = load_of(true.sum(dim=0))
    shuffles = len(made.domains) > 1
    return RouterReport(
        name=place.name,
        label=short_name(place.name),
        layer=layer,
        reads=place.reads,
        experts=made.columns[index],
        tokens=round(tokens.item()),
        load=_rounded(load),
        served=_rounded(sums.together.diagonal() / tokens),
        domain_load=_rounded(load_of(true)),
        shuffled_load=_rounded(load_of(sums.labelled[1])) if shuffles else None,
        information=_information(bits) if shuffles else None,
        token_entropy=round(sums.entropy / tokens.item(), DIGITS),
        load_entropy=round(entropy(load).item(), DIGITS),
        coactivation=_rounded(sums.together / tokens),
        similarity=similarity,
        by_position=_bins(sums.by_position),
        by_order=_bins(sums.by_order),
    )


def _layer_report(made: _Made, label: str, members: list[int], bits: Tensor) -> LayerReport:
    sums = [made.sums[index] for index in members]
    loads = [load_of(one.labelled[0].sum(dim=0)) for one in sums]
    whole = torch.zeros(len(made.experts), dtype=torch.float64)
    for index, load in zip(members, loads, strict=True):
        whole[made.columns[index]] += load / len(members)
    token = [one.entropy / one.labelled[0].sum().item() for one in sums]
    shuffles = len(made.domains) > 1
    return LayerReport(
        name=label,
        load=_rounded(whole),
        token_entropy=round(sum(token) / len(token), DIGITS),
        load_entropy=round(sum(entropy(load).item() for load in loads) / len(loads), DIGITS),
        information=_information(bits[:, members].mean(dim=1)) if shuffles else None,
    )


def _information(bits: Tensor) -> Information:
    observed, shuffled = bits[0], bits[1:]
    return Information(
        round(observed.item(), DIGITS),
        round(shuffled.mean().item(), DIGITS),
        round(shuffled.max().item(), DIGITS),
    )


def _bins(sums: Tensor) -> list[list[float] | None]:
    return [
        _rounded(load) if bool(row.any()) else None
        for row, load in zip(sums, load_of(sums), strict=True)
    ]


def _position_names(plan: Plan) -> list[str]:
    bins = plan.position_bins
    edges = [-(-plan.max_length * number // bins) for number in range(bins + 1)]
    return [
        f"{start}" if end - start <= 1 else f"{start} to {end - 1}"
        for start, end in itertools.pairwise(edges)
    ]


def _shown(routers: Sequence[RouterReport]) -> list[int]:
    """All routers if they are few, else of each layer the one that tells domains apart best."""
    if len(routers) <= MOST_SHOWN:
        return list(range(len(routers)))
    best: dict[int, int] = {}
    for index, router in enumerate(routers):
        if router.layer not in best or _clarity(router) > _clarity(routers[best[router.layer]]):
            best[router.layer] = index
    return [best[layer] for layer in sorted(best)]


def _clarity(router: RouterReport) -> float:
    if router.information is not None:
        return router.information.observed
    return router.load_entropy - router.token_entropy


def _token_views(
    made: _Made, tokenizer: PreTrainedTokenizerBase, shown: Sequence[int]
) -> list[TokenView]:
    views = []
    firsts = [passage for passage in made.passages if passage.index == 0]
    for passage, domain in zip(firsts, made.domains, strict=True):
        ids = passage.ids[:SHOWN_TOKENS]
        texts = {}
        for stream in streams(made.model):
            read = ids
            if stream == DECODER:
                read = (start_token(made.routed.base), *ids[:-1])
            texts[stream] = spell_tokens(read, tokenizer)
        weights = [made.sums[index].shown[passage.domain].tolist() for index in shown]
        views.append(TokenView(domain.name, texts, weights))
    return views


# Before the first forward --------------------------------------------------------------------


def _check_options(**options: Any) -> None:
    for name, value in options.items():
        least = 0 if name == "seed" else 1
        if not is_int(value) or value < least:
            raise ReportError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def _longest(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most positions that the base model has; some need a few of them for themselves."""
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    longest: Any = getattr(config, "max_position_embeddings", None)
    limits = [n for n in (longest, tokenizer.model_max_length) if is_int(n) and n > 0]
    return min([*limits, 2**31])


def _name_of(base: nn.Module) -> str:
    name = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    return name.rstrip("/").rsplit("/", 1)[-1] or type(base).__name__


def _expert_names(model: nn.Module, routed: RoutedModel, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        names = [str(name) for name in given]
        if len(names) != len(routed.experts) or len(set(names)) != len(names):
            raise ReportError(
                f"expert_names must be {len(routed.experts)} different names, got {names}."
            )
        return names
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    adapters = {adapter for adapter, _ in routed.experts}
    names = []
    for adapter, index in routed.experts:
        own = getattr(configs.get(adapter), "expert_names", None)
        alone = sum(name == adapter for name, _ in routed.experts) == 1
        if own:
            names.append(str(own[index]))
        elif alone:
            names.append(adapter)
        else:
            names.append(f"E{index}" if len(adapters) == 1 else f"{adapter}.{index}")
    return names


def _plan(
    passages: Sequence[Passage],
    domains: Sequence[DomainSummary],
    *,
    permutations: int,
    seed: int,
) -> Plan:
    sizes = [domain.passages for domain in domains]
    labels = torch.tensor([passage.domain for passage in passages])
    if len(domains) == 1:
        permutations = 0
    bins, order = order_bins(sizes)
    return Plan(
        labels=shuffled_labels(labels, permutations=permutations, seed=seed),
        offset=[sum(sizes[:position]) for position in range(len(sizes))],
        max_length=max(len(passage.ids) for passage in passages),
        order_bin=bins,
        order=order,
    )


def _run(
    model: nn.Module,
    routed: RoutedModel,
    collector: Collector,
    passages: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    *,
    show_progress: bool,
) -> None:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(each for each in pads if isinstance(each, int))
    device = next(routed.base.parameters()).device
    total = sum(len(passage.ids) for passage in passages)
    with (
        evaluating(model),
        tqdm(total=total, desc="routing", unit="token", disable=not show_progress) as bar,
    ):
        for batch in batches(passages, batch_size=batch_size):
            observe(model, routed, collector, batch, pad_token_id=pad_token_id, device=device)
            bar.update(sum(len(passage.ids) for passage in batch))


# What a reader has to know -------------------------------------------------------------------


def _notes(made: _Made) -> list[str]:
    routed = made.routed
    notes = []
    if routed.scope == "fixed":
        notes.append("router_type='fixed': every token of every layer gets the same weights.")
    else:
        notes += [
            f"Adapter {name} has fixed weights {[round(w, 4) for w in weights]} and is not shown."
            for name, weights in routed.constants.items()
            if routed.attached is None
        ]
    if routed.plain and routed.attached is None:
        notes.append(f"Always on, with weight 1, and not shown: {', '.join(routed.plain)}.")
    if routed.asked:
        notes.append(
            "The attached router came without a config and does not route by itself. Shown is what "
            "it answers to the final hidden states of the model without adapters."
        )
    if len(streams(made.model)) == 2:
        notes.append(
            "An encoder-decoder model: the encoder read each passage, the decoder the same passage "
            "shifted right. Layers of the decoder count its tokens; keys and values of "
            "cross-attention count the encoder's."
        )
    missing = [n for n in made.collector.places if n not in {p.name for p in made.places}]
    if missing:
        notes.append(
            f"Left out, since they decide over other things than tokens: {', '.join(missing)}."
        )
    return notes + _baseline_notes(made.domains)


def _baseline_notes(domains: Sequence[DomainSummary]) -> list[str]:
    if len(domains) == 1:
        return ["With a single domain there is nothing to shuffle, so no baseline is given."]
    few = [domain for domain in domains if domain.passages < FEW_PASSAGES]
    if not few:
        return []
    names = ", ".join(f"{domain.name} ({domain.passages})" for domain in few)
    return [
        f"Few passages: {names}. With fewer than {FEW_PASSAGES} the shuffled baseline is coarse; "
        "give more text, or a smaller max_length."
    ]


def _rounded(values: Tensor) -> Any:
    # nested lists as deep as the tensor has axes
    return (values.double() * 10**DIGITS).round().div(10**DIGITS).tolist()
