"""The picture of a demo run, drawn from its results alone."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from moelora.demo.palette import CONTENDER_COLOURS, CONTENDER_MARKERS, HEAT_MAP, INK, MUTED
from moelora.demo.results import DemoResults
from moelora.report.names import short_name

SIZE_INCHES = (14, 9)
DOTS_PER_INCH = 130
PANELS = 4
TEXT_TURNS_WHITE = 0.55
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
}


def draw_figure(results: DemoResults, path: Path) -> None:
    """Draw losses, expert load and specialisation into one PNG file.

    Args:
        results: of a run.
        path: of the file to write.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        # a Figure of its own, without pyplot: no global state and no display
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        figure.suptitle(
            f"A mixture of {results.settings['experts']} LoRA experts, "
            f"{results.settings['top_k']} active per token, "
            f"after {results.settings['steps']} steps",
            x=0.01,
            ha="left",
            fontsize=16,
            fontweight="bold",
        )
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1))[:, 0]
        losses, skills, layers = top.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _draw_losses(losses, results)
        _draw_skills(skills, results)
        image = _draw_layers(layers, results)
        top.colorbar(image, ax=[skills, layers], label="share of the routing weight, %", shrink=0.8)
        _draw_clearest(bottom, results)
        figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_losses(axes: Axes, results: DemoResults) -> None:
    names = [*(skill.name for skill in results.skills), "mean"]
    rows = range(len(names))
    for contender in results.contenders:
        values = [*contender.losses.values(), contender.mean_loss]
        axes.scatter(
            values,
            rows,
            s=80,
            marker=CONTENDER_MARKERS[contender.key],
            color=CONTENDER_COLOURS[contender.key],
            edgecolor="white",
            linewidth=0.8,
            label=contender.label,
            zorder=3,
        )
    axes.axhline(len(names) - 1.5, color=MUTED, linewidth=0.8)
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * max(max(each.losses.values()) for each in results.contenders))
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("validation loss of the completion, nats per token (less is better)")
    axes.set_title("What each adapter learned")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _draw_skills(axes: Axes, results: DemoResults) -> None:
    names = [skill.name for skill in results.skills]
    _heat_map(axes, results.usage.skills, names, numbers=True)
    axes.set_title("Load by skill, all routers")


def _draw_layers(axes: Axes, results: DemoResults) -> AxesImage:
    layers = results.usage.layers
    image = _heat_map(axes, layers, [str(layer) for layer in range(len(layers))], numbers=False)
    every = max(1, len(layers) // 6)
    axes.set_yticks(range(0, len(layers), every))
    axes.set_ylabel("layer")
    axes.set_title("Load by layer")
    return image


def _draw_clearest(figure: SubFigure, results: DemoResults) -> None:
    usage = results.usage
    order = sorted(range(len(usage.shown)), key=lambda i: -usage.separations[i])[:PANELS]
    figure.suptitle(
        f"The routers that tell the skills apart best     separation of all routers: "
        f"{usage.mean_separation:.3f}, of shuffled texts: {usage.shuffled_separation:.3f}",
        x=0.01,
        ha="left",
        fontsize=11.5,
        fontweight="bold",
    )
    panels = figure.subplots(1, len(order), squeeze=False)[0]
    for axes, router in zip(panels, order, strict=True):
        names = [skill.name for skill in results.skills] if axes is panels[0] else []
        _heat_map(axes, usage.shown_skills[router], names, numbers=True)
        axes.set_title(
            f"{short_name(usage.shown[router])}\nseparation {usage.separations[router]:.2f}",
            fontsize=9.5,
            fontweight="normal",
        )


def _heat_map(
    axes: Axes, shares: list[list[float]], rows: list[str], *, numbers: bool
) -> AxesImage:
    image = axes.imshow(
        [[100 * share for share in row] for row in shares],
        cmap=HEAT_MAP,
        vmin=0,
        vmax=100,
        aspect="auto",
    )
    axes.set_xticks(range(len(shares[0])))
    axes.set_xlabel("expert")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbers:
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                colour = "white" if share > TEXT_TURNS_WHITE else INK
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    return image
