"""Pictures of a routing report, drawn by matplotlib from its data alone."""

import io
import math
import warnings
from collections.abc import Callable, Sequence

from moelora.errors import ReportError
from moelora.report.palette import (
    HEAT_MAP,
    INK,
    MUTED,
    SIMILARITY_MAP,
    expert_colour,
)
from moelora.report.results import RoutingReport

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from moelora.report.token_picture import tokens
except ImportError as error:
    raise ReportError(
        "Pictures need matplotlib, which is not installed: pip install 'moelora[plots]'."
    ) from error

DOTS_PER_INCH = 110
ACCENT = "#0072B2"
TEXT_TURNS_WHITE = 0.55
MOST_NUMBERS = 200
#: Letters that fit below a map.
WIDE = 24
#: Layers whose loads can be read in the small map of the overview.
ROWS_WITH_NUMBERS = 14
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    # a name may hold a dollar sign
    "text.parse_math": False,
}


def render_pictures(report: RoutingReport) -> dict[str, bytes]:
    """Return every plot of a report as a PNG file, by file name.

    Args:
        report: what to draw.
    """
    drawers: dict[str, tuple[Callable[[RoutingReport], Figure], bool]] = {
        "overview.png": (overview, True),
        "domains.png": (_domains, True),
        "information.png": (_information, report.information is not None),
        "layers.png": (_layers, True),
        "entropy.png": (_entropy, True),
        "coactivation.png": (_coactivation, True),
        "similarity.png": (_similarity, report.similarity is not None),
        "position.png": (_position, True),
        "tokens.png": (tokens, bool(report.token_views)),
        "training.png": (_training, report.training is not None),
    }
    pictures = {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        # a letter that the font lacks shows as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for name, (draw, wanted) in drawers.items():
            if wanted:
                file = io.BytesIO()
                draw(report).savefig(file, dpi=DOTS_PER_INCH, format="png")
                pictures[name] = file.getvalue()
    return pictures


def overview(report: RoutingReport) -> Figure:
    """Return the four plots that say most: domains, shuffled domains, layers, information.

    Args:
        report: what to draw.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(12, 7), layout="constrained")
        figure.suptitle(
            f"Routing of {_short(report.model, 60)}", x=0.01, ha="left", fontweight="bold"
        )
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))[:, 0]
        left, middle, right = top.subplots(1, 3)
        names = [_short(domain.name) for domain in report.domains]
        clearest = report.routers[report.shown[report.clearest]]
        experts = [report.experts[e] for e in clearest.experts]
        shuffled = clearest.shuffled_load or []
        _heat(left, clearest.domain_load, names, experts, beside=shuffled)
        left.set_title(f"Domains x experts\n{_short(clearest.label, 34)}")
        if clearest.shuffled_load is None:
            _heat(middle, clearest.coactivation, experts, experts)
            middle.set_title("Co-activation")
        else:
            empty = [""] * len(names)
            _heat(middle, shuffled, empty, experts, beside=clearest.domain_load)
            middle.set_title("The same router,\ndomains shuffled")
        _layer_heat(right, report, numbers=len(report.layers) <= ROWS_WITH_NUMBERS)
        if report.information is None:
            _draw_entropy(bottom.subplots(), report)
        else:
            _draw_information(bottom.subplots(), report)
    return figure


def _domains(report: RoutingReport) -> Figure:
    names = [_short(domain.name) for domain in report.domains]
    shuffled = report.shuffled_load or []
    maps = [(report.domain_load, shuffled, "Domains x experts, mean over routers")]
    if report.shuffled_load is not None:
        maps.append((shuffled, report.domain_load, "Domains shuffled"))
    figure = _figure(5.0 * len(maps), 1.6 + 0.4 * len(names))
    for axes, (loads, beside, title) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True
    ):
        image = _heat(axes, loads, names, report.experts, beside=beside)
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="% of a row", shrink=0.8)
    return figure


def _information(report: RoutingReport) -> Figure:
    figure = _figure(9.0, 3.4)
    _draw_information(figure.subplots(), report)
    return figure


def _draw_information(axes: Axes, report: RoutingReport) -> None:
    known = [layer.information for layer in report.layers if layer.information is not None]
    x = range(len(known))
    axes.vlines(x, 0, [k.shuffled_max for k in known], color=MUTED, linewidth=5, alpha=0.6)
    axes.scatter(
        x,
        [k.shuffled_mean for k in known],
        s=16,
        color=MUTED,
        label="domains shuffled: mean, reach",
    )
    axes.scatter(x, [k.observed for k in known], s=40, color=ACCENT, label="domains as they are")
    axes.set_ylim(bottom=0)
    _layer_ticks(axes, report)
    axes.set_ylabel("bits")
    axes.set_title("What the domain says about the expert")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _layers(report: RoutingReport) -> Figure:
    figure = _figure(5.0, min(12.0, 1.6 + 0.26 * len(report.layers)))
    axes = figure.subplots()
    image = _layer_heat(axes, report)
    figure.colorbar(image, ax=axes, label="% of a row", shrink=0.8)
    return figure


def _layer_heat(axes: Axes, report: RoutingReport, *, numbers: bool = True) -> AxesImage:
    names = [_short(layer.name) for layer in report.layers]
    loads = [layer.load for layer in report.layers]
    image = _heat(axes, loads, names, report.experts, numbers=numbers)
    every = max(1, len(names) // 10)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.set_ylabel("layer")
    axes.set_title("Layers x experts")
    return image


def _entropy(report: RoutingReport) -> Figure:
    figure = _figure(9.0, 3.4)
    _draw_entropy(figure.subplots(), report)
    return figure


def _draw_entropy(axes: Axes, report: RoutingReport) -> None:
    x = range(len(report.layers))
    axes.plot(x, [o.token_entropy for o in report.layers], "o-", color=ACCENT, label="of a token")
    axes.plot(x, [o.load_entropy for o in report.layers], "s--", color=MUTED, label="of the load")
    most = max(len(router.experts) for router in report.routers)
    axes.set_ylim(0, 1.05 * max(1.0, math.log2(max(2, most))))
    _layer_ticks(axes, report)
    axes.set_ylabel("bits")
    axes.set_title("Entropy")
    axes.legend(frameon=False, loc="lower right", ncols=2)


def _coactivation(report: RoutingReport) -> Figure:
    router = report.routers[report.shown[report.clearest]]
    names = [report.experts[e] for e in router.experts]
    figure = _square(names)
    axes = figure.subplots()
    image = _heat(axes, router.coactivation, names, names)
    axes.set_title(f"Co-activation, {_short(router.label, 30)}")
    figure.colorbar(image, ax=axes, label="% of all tokens", shrink=0.8)
    return figure


def _similarity(report: RoutingReport) -> Figure:
    figure = _square(report.experts)
    axes = figure.subplots()
    values = report.similarity or []
    image = _heat(axes, values, report.experts, report.experts, signed=True)
    axes.set_title("Similarity of the experts' updates")
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return figure


def _position(report: RoutingReport) -> Figure:
    router = report.routers[report.shown[report.clearest]]
    figure = _figure(9.0, 3.4)
    axes = figure.subplots()
    names = [report.experts[e] for e in router.experts]
    rows = [row or [0.0] * len(names) for row in router.by_position]
    _stack(axes, rows, names, router.experts)
    axes.set_xticks(range(len(rows)), report.positions, rotation=45, ha="right", fontsize=8)
    axes.set_xlabel("position in the passage, in tokens")
    axes.set_title(f"Load over the passage, {_short(router.label, 40)}")
    return figure


def _training(report: RoutingReport) -> Figure:
    figure = _figure(9.0, 3.4)
    axes = figure.subplots()
    if report.training is not None:
        loads = report.training.loads
        _stack(axes, loads, report.experts, range(len(report.experts)))
        every = max(1, len(loads) // 12)
        steps = [str(step) for step in report.training.steps]
        axes.set_xticks(range(0, len(loads), every), steps[::every])
    axes.set_xlabel("training step")
    axes.set_title("Load over the training")
    return figure


def _stack(
    axes: Axes, rows: Sequence[Sequence[float]], names: Sequence[str], experts: Sequence[int]
) -> None:
    ends = [0.0] * len(rows)
    for column, (name, expert) in enumerate(zip(names, experts, strict=True)):
        heights = [100 * row[column] for row in rows]
        axes.bar(
            range(len(rows)),
            heights,
            bottom=ends,
            width=0.92,
            color=expert_colour(expert),
            # the same colour again beyond the eighth
            hatch="//" if expert > 7 else None,
            label=_short(name),
        )
        ends = [end + height for end, height in zip(ends, heights, strict=True)]
    axes.set_ylabel("% of the load")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _heat(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    signed: bool = False,
    numbers: bool = True,
    beside: Sequence[Sequence[float | None]] = (),
) -> AxesImage:
    factor = 1 if signed else 100
    table = [[math.nan if v is None else factor * v for v in row] for row in values]
    flat = [factor * v for row in (*values, *beside) for v in row if v is not None]
    top = 1 if signed else max(10.0, 10 * math.ceil(max(flat, default=0.0) / 10 - 1e-9))
    image = axes.imshow(
        table,
        cmap=SIMILARITY_MAP if signed else HEAT_MAP,
        vmin=-1 if signed else 0,
        vmax=top,
        aspect="auto",
    )
    long = max(map(len, columns)) * len(columns) > WIDE
    axes.set_xticks(
        range(len(columns)),
        [_short(name) for name in columns],
        rotation=45 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbers and len(table) * len(table[0]) <= MOST_NUMBERS:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    white = abs(value) / top > TEXT_TURNS_WHITE
                    text = f"{value:.2f}" if signed else f"{value:.0f}"
                    colour = "white" if white else INK
                    axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    return image


def _layer_ticks(axes: Axes, report: RoutingReport) -> None:
    names = [_short(layer.name) for layer in report.layers]
    every = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlabel("layer")


def _figure(width: float, height: float) -> Figure:
    # a Figure of its own, without pyplot: no global state and no display
    return Figure(figsize=(width, height), layout="constrained")


def _square(names: Sequence[str]) -> Figure:
    size = 2.5 + 0.45 * len(names)
    return _figure(min(14.0, size + 1.5), min(13.0, size))


def _short(name: str, length: int = 24) -> str:
    # a control character has no glyph
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
