"""The page of a routing report: one HTML file that needs nothing else."""

import math
import re
from collections.abc import Sequence
from typing import Any

from moelora.report import charts, markup
from moelora.report.results import RouterReport, RoutingReport

SCOPES = {
    "module": "one in every adapted layer",
    "layer": "one per transformer block",
    "model": "one for the whole model",
    "attached": "attached to the model",
    "fixed": "constant weights",
}
OWN_NUMBERS = (
    "Each router numbers its experts by itself, so expert 0 of one router has nothing to do with "
    "expert 0 of another: means over routers show balance, single routers show specialisation."
)
SAME_NAMES = (
    "An expert has the same name in every layer, but each router chooses by itself: a single "
    "router may tell domains apart more sharply than this mean."
)


def render_page(report: RoutingReport) -> str:
    """Return a routing report as HTML, every foreign text escaped.

    Args:
        report: what to show.
    """
    parts = (_head, _notes, _domains, _layers, _one_router, _tokens, _training, _method, _setup)
    sections = "".join(part(report) for part in parts)
    return markup.document(f"Routing of {report.model}", sections + _data(report))


def verdict(report: RoutingReport) -> str:
    """Say in one or two sentences what the figures come to.

    Args:
        report: whose figures.
    """
    load_entropy = _mean([router.load_entropy for router in report.routers])
    effective = 2**load_entropy
    text = (
        f"The load is spread as if {effective:.1f} of {len(report.experts)} experts shared it "
        "evenly."
    )
    seen = report.information
    if seen is None:
        return text
    names = f"{_bits(seen.observed)} bits"
    if seen.observed <= seen.shuffled_max:
        return (
            f"{text} Domains are not told apart: what a domain says about the expert ({names}) is "
            f"within what shuffled domains give (up to {_bits(seen.shuffled_max)})."
        )
    return (
        f"{text} Domains are told apart: a token's domain says {names} about its expert, shuffled "
        f"domains {_bits(seen.shuffled_mean)} (at most {_bits(seen.shuffled_max)})."
    )


def _bits(value: float) -> str:
    """Three places, or the first digit where these would all be 0."""
    return f"{value:.3f}" if value >= 0.0005 or value <= 0 else f"{value:.0e}"


def _head(report: RoutingReport) -> str:
    tokens = sum(domain.tokens for domain in report.domains)
    seen = report.information
    figures = [
        (str(len(report.experts)), "experts"),
        (str(len(report.routers)), f"routers, {SCOPES[report.router_scope]}"),
        (f"{tokens:,}", f"tokens of {_count(len(report.domains), 'domain')}"),
    ]
    if seen is not None:
        figures += [
            (_bits(seen.observed), "bits that the domain says about the expert"),
            (_bits(seen.shuffled_mean), "bits with shuffled domains"),
        ]
    else:
        entropy = _mean([router.token_entropy for router in report.routers])
        figures.append((f"{entropy:.2f}", "bits of entropy of a token's shares"))
    return (
        f"<h1>Routing of {markup.escape(report.model)}</h1>"
        f"<p class=lead>{markup.escape(verdict(report))}</p>{markup.cards(figures)}"
    )


def _notes(report: RoutingReport) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{markup.escape(note)}</li>" for note in report.notes)
    return f"<ul class=notes>{items}</ul>"


def _domains(report: RoutingReport) -> str:
    names = [domain.name for domain in report.domains]
    maps = markup.heat_map(
        report.domain_load,
        names,
        caption="Domains x experts",
        columns=report.experts,
        beside=report.shuffled_load or (),
    )
    if report.shuffled_load is not None:
        maps += markup.heat_map(
            report.shuffled_load,
            names,
            caption="The same passages, domains shuffled",
            columns=report.experts,
            beside=report.domain_load,
        )
    numbered = all(re.fullmatch(r"(E|.*\.)?\d+", name) for name in report.experts)
    of_names = OWN_NUMBERS if numbered else SAME_NAMES
    several = f" {of_names}" if len(report.routers) > 1 else ""
    return (
        "<h2>Who serves which domain</h2>"
        "<p>Share of each expert in the routing weight of a domain's tokens, in percent, the mean "
        f"over routers.{several}</p><div class=maps>{maps}</div>{_information(report)}"
    )


def _information(report: RoutingReport) -> str:
    known = [layer.information for layer in report.layers if layer.information is not None]
    if not known:
        return ""
    chart = charts.information_chart([layer.name for layer in report.layers], known)
    return (
        "<h2>Where domains part</h2>"
        "<p>What the domain of a token says about its expert, in bits: 0 if all domains use the "
        "experts alike. A grey bar reaches as far as the largest of "
        f"{report.settings.get('permutations')} random permutations of the passages' domains; a "
        "point within the bar is what chance gives.</p>"
        "<div class=legend><span><i class=seen></i>domains as they are</span>"
        "<span><i class=chance></i>shuffled: mean and reach</span></div>" + chart
    )


def _layers(report: RoutingReport) -> str:
    names = [layer.name for layer in report.layers]
    heat = markup.heat_map(
        [layer.load for layer in report.layers],
        names,
        caption="Layers x experts",
        columns=report.experts,
        kind="heat tall",
    )
    overall = ""
    if report.similarity is not None:
        overall = markup.heat_map(
            report.similarity,
            report.experts,
            caption="Similarity of experts, all layers together",
            columns=report.experts,
            key=markup.SIMILAR,
            fixed=True,
        )
    largest = math.log2(max(2, max(len(router.experts) for router in report.routers)))
    entropy = charts.entropy_chart(
        names,
        [layer.token_entropy for layer in report.layers],
        [layer.load_entropy for layer in report.layers],
        largest=largest,
    )
    return (
        "<h2>How the load spreads over layers</h2>"
        "<p>Load of each expert, in percent, the mean over a layer's routers; and the cosine of "
        "the experts' whole updates <code>scaling B A</code>: 1 for the same direction, 0 for "
        f"nothing in common.</p><div class=maps>{heat}{overall}</div>"
        "<h2>How sure the routers are</h2>"
        f"<p>Entropy in bits, at most {largest:.2f} for {2**largest:.0f} experts. Solid: of the "
        "shares of a single token, the mean over tokens; low where few experts serve it. Dashed: "
        "of the load; low where few experts do everything. The gap between the two is how much "
        "the token decides.</p>"
        "<div class=legend><span><i class=full></i>of a token</span>"
        f"<span><i class=dash></i>of the load</span></div>{entropy}"
    )


def _one_router(report: RoutingReport) -> str:
    router = report.routers[report.shown[report.clearest]]
    spread = spread_out(report, router)
    names = [domain.name for domain in report.domains]
    beside = {"domains": "shuffled", "shuffled": "domains"}
    keys: list[tuple[str, str, Sequence[str], str]] = [
        ("domains", "Domains x experts", names, "of the routing weight of a row"),
        ("shuffled", "Domains shuffled", names, "of the routing weight of a row"),
        (markup.TOGETHER, "Co-activation", report.experts, "of all tokens"),
        (markup.SIMILAR, "Similarity", report.experts, ""),
    ]
    maps = "".join(
        markup.heat_map(
            spread[key],
            rows,
            caption=caption,
            columns=report.experts,
            key=key,
            of=of,
            beside=spread[beside[key]] if key in beside else (),
        )
        for key, caption, rows, of in keys
        if any(value is not None for row in spread[key] for value in row)
        or (key == markup.SIMILAR and report.similarity is not None)
    )
    order = [report.domains[domain].name for domain in report.order]
    edges = [i for i in range(1, len(order)) if order[i] != order[i - 1]]
    ticks = [name if i == 0 or i in edges else "" for i, name in enumerate(order)]
    position = charts.stacked_bars(
        spread["position"],
        report.positions,
        label="Load by position in the passage",
        axis="position in the passage, in tokens",
        key="position",
    )
    in_order = charts.stacked_bars(
        spread["order"],
        ticks,
        label="Load in the order of the data",
        axis="passages in the order of the data, domain by domain",
        key="order",
        edges=edges,
    )
    return (
        "<section><h2 id=one>One router</h2>"
        "<p>Co-activation is the share of tokens that two experts serve together; on its diagonal "
        "stands the share that an expert serves at all. Similarity is the cosine of the updates in "
        "the layers that this router serves.</p>"
        f"{_picker(report)}<p class=note data-say=about>{markup.escape(spread['about'])}</p>"
        f"<div class=maps>{maps}</div><h3>Load over the passage</h3>"
        f"{markup.expert_legend(report.experts, buttons=False)}{position}"
        f"<h3>Load over the data</h3>{in_order}"
    )


def _picker(report: RoutingReport) -> str:
    options = []
    for index in report.shown:
        router = report.routers[index]
        seen = router.information
        label = router.label if router.reads == "tokens" else f"{router.label}, {router.reads}"
        options.append(label if seen is None else f"{label} ({seen.observed:.3f} bits)")
    return markup.router_picker(options, chosen=report.clearest)


def _tokens(report: RoutingReport) -> str:
    first = report.clearest
    router = report.routers[report.shown[first]]
    texts = "".join(
        markup.token_text(
            view.domain,
            view.tokens,
            _wide_tokens(view.weights[first], router.experts, len(report.experts)),
            number=number,
            reads=router.reads,
        )
        for number, view in enumerate(report.token_views)
    )
    again = (
        " From the ninth on colours start again, and their tokens are underlined."
        if len(report.experts) > 8
        else ""
    )
    return (
        "<h2>Who serves which token</h2>"
        "<p>The start of each domain's first passage, for the router picked above. A token has the "
        "tint of its strongest expert; the strip below it is split by weight. Point at a token, or "
        "go to a text and use the arrow keys, to read its weights; press an expert to see only its "
        f"tokens.{again}</p>{markup.expert_legend(report.experts)}{texts}</section>"
    )


def _training(report: RoutingReport) -> str:
    if report.training is None:
        return ""
    steps, loads = _thinned(report.training.steps, report.training.loads)
    chart = charts.stacked_bars(
        loads, [str(step) for step in steps], label="Load over the training", axis="training step"
    )
    return (
        "<h2>Load over the training</h2><p>From the trainer's log, the mean over routers.</p>"
        f"{markup.expert_legend(report.experts, buttons=False)}{chart}"
    )


def _thinned(
    steps: Sequence[int], loads: Sequence[list[float]], most: int = 120
) -> tuple[list[int], list[list[float]]]:
    """At most so many steps, evenly chosen, the last one among them."""
    if len(steps) <= most:
        return list(steps), list(loads)
    kept = sorted({round(i * (len(steps) - 1) / (most - 1)) for i in range(most)})
    return [steps[i] for i in kept], [loads[i] for i in kept]


def _method(report: RoutingReport) -> str:
    words = (
        (
            "Share",
            "|w_e| / sum |w_i| of the routing weights of a token; the shares of a token sum to 1. "
            "Tokens of padding, and tokens without any weight, count nowhere.",
        ),
        ("Load", "The mean share over tokens. Each token counts the same."),
        ("Entropy", "- sum p log2 p, of a token's shares or of the load."),
        (
            "Information",
            "sum p(d,e) log2( p(d,e) / (p(d) p(e)) ): draw a token, then an expert with the "
            "probability of its share. It lies between 0 and the smaller of the two entropies, and "
            "is never more than the gap between load and token entropy.",
        ),
        (
            "Shuffled",
            "The same figures after the domains of whole passages were permuted at random, "
            f"{report.settings.get('permutations')} times, seed {report.settings.get('seed')}. The "
            "map shows the first of them.",
        ),
        (
            "Similarity",
            "The cosine of scaling B A of two experts, as vectors, from products of rank size.",
        ),
    )
    items = "".join(f"<dt>{term}</dt><dd>{markup.escape(text)}</dd>" for term, text in words)
    return f"<h2>How it is computed</h2><dl class=method>{items}</dl>"


def _setup(report: RoutingReport) -> str:
    domains = [
        (
            domain.name,
            f"{_count(domain.tokens, 'token')} in {_count(domain.passages, 'passage')} of "
            f"{_count(domain.texts, 'text')}"
            + ("" if domain.complete else ", then cut")
            + (f"; {domain.source}" if domain.source else ""),
        )
        for domain in report.domains
    ]
    settings = [(name, "all" if v is None else v) for name, v in report.settings.items()]
    return f"<h2>Text</h2>{markup.facts(domains)}<h2>Settings</h2>{markup.facts(settings)}"


def _data(report: RoutingReport) -> str:
    routers = [spread_out(report, report.routers[index]) for index in report.shown]
    views = [
        [
            _wide_tokens(weights, report.routers[index].experts, len(report.experts))
            for weights, index in zip(view.weights, report.shown, strict=True)
        ]
        for view in report.token_views
    ]
    return markup.page_data({"views": views, "experts": report.experts, "routers": routers})


def spread_out(report: RoutingReport, router: RouterReport) -> dict[str, Any]:
    """Return a router's tables over all experts of the report; None for those it lacks.

    Args:
        report: whose experts are the columns.
        router: one of its routers.
    """
    size = len(report.experts)

    def wide(row: Sequence[float | None]) -> list[float | None]:
        values: list[float | None] = [None] * size
        for expert, value in zip(router.experts, row, strict=True):
            values[expert] = None if value is None else round(value, 4)
        return values

    def square(rows: Sequence[Sequence[float | None]] | None) -> list[list[float | None]]:
        values: list[list[float | None]] = [[None] * size for _ in range(size)]
        for expert, row in zip(router.experts, rows or [], strict=False):
            values[expert] = wide(row)
        return values

    nothing: list[list[float]] = []
    return {
        "domains": [wide(row) for row in router.domain_load],
        "shuffled": [wide(row) for row in router.shuffled_load or nothing],
        markup.TOGETHER: square(router.coactivation),
        markup.SIMILAR: square(router.similarity),
        "position": [None if row is None else wide(row) for row in router.by_position],
        "order": [None if row is None else wide(row) for row in router.by_order],
        "reads": router.reads,
        "about": _about(router),
    }


def _about(router: RouterReport) -> str:
    text = (
        f"{router.name}: entropy {router.token_entropy:.2f} bits of a token, "
        f"{router.load_entropy:.2f} of the load"
    )
    if router.information is None:
        return f"{text}."
    seen = router.information
    return (
        f"{text}; the domain says {seen.observed:.3f} bits about the expert, shuffled "
        f"{seen.shuffled_mean:.3f} (at most {seen.shuffled_max:.3f})."
    )


def _wide_tokens(
    tokens: Sequence[Sequence[int]], experts: Sequence[int], size: int
) -> list[list[int]]:
    wide = []
    for weights in tokens:
        row = [0] * size
        for expert, weight in zip(experts, weights, strict=True):
            row[expert] = weight
        wide.append(row)
    return wide


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
