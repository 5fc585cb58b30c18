"""Charts as inline SVG whose colours follow the page's theme."""

from collections.abc import Sequence

from moelora.report.markup import escape
from moelora.report.palette import expert_variable
from moelora.report.results import Information

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 52, 12, 12, 40


def information_chart(layers: Sequence[str], information: Sequence[Information]) -> str:
    """Return what domains say about experts, layer by layer, beside what chance gives.

    Args:
        layers: their names.
        information: of each.
    """
    top = _nice(max(max(each.observed, each.shuffled_max) for each in information))
    frame = _Frame(len(layers), top, height=240)
    marks = []
    for index, each in enumerate(information):
        x = frame.x(index)
        marks.append(
            f"<g><title>{escape(layers[index])}: {each.observed:.3f} bits, shuffled "
            f"{each.shuffled_mean:.3f}, at most {each.shuffled_max:.3f}</title>"
            f"<line class=range x1={x:.1f} x2={x:.1f} y1={frame.y(0.0):.1f} "
            f"y2={frame.y(each.shuffled_max):.1f} />"
            f"<circle class=mean cx={x:.1f} cy={frame.y(each.shuffled_mean):.1f} r=3.5 />"
            f"<circle class=seen cx={x:.1f} cy={frame.y(each.observed):.1f} r=5.5 /></g>"
        )
    return frame.svg(
        "".join(marks),
        label="Information of domains about experts, in bits, by layer",
        ticks=layers,
        axis="layer",
    )


def entropy_chart(
    layers: Sequence[str], token: Sequence[float], load: Sequence[float], *, largest: float
) -> str:
    """Return the entropy of tokens and of loads, layer by layer.

    Args:
        layers: their names.
        token: mean entropy of a token's shares.
        load: entropy of the load.
        largest: what even shares have.
    """
    frame = _Frame(len(layers), largest, height=220, levels=_bits(largest))
    marks = ""
    for kind, values in (("line", token), ("line second", load)):
        points = " ".join(f"{frame.x(i):.1f},{frame.y(v):.1f}" for i, v in enumerate(values))
        marks += f"<polyline class='{kind}' points='{points}' />"
        dot = "seen" if kind == "line" else "mean"
        marks += "".join(
            f"<circle class={dot} cx={frame.x(i):.1f} cy={frame.y(v):.1f} r=3>"
            f"<title>{escape(layers[i])}: {v:.2f} bits</title></circle>"
            for i, v in enumerate(values)
        )
    return frame.svg(marks, label="Entropy by layer, in bits", ticks=layers, axis="layer")


def stacked_bars(
    bins: Sequence[Sequence[float | None] | None],
    ticks: Sequence[str],
    *,
    label: str,
    axis: str,
    key: str = "",
    edges: Sequence[int] = (),
) -> str:
    """Return loads as one stacked bar for each bin.

    Args:
        bins: of each the shares of all experts, or None.
        ticks: their names.
        label: what the chart shows, for readers who do not see it.
        axis: what the bins are.
        key: what the page's script fills the chart with when another router is picked.
        edges: bins before which a gap is drawn.
    """
    frame = _Frame(len(bins), 1.0, height=200, percent=True)
    experts = max((len(shares) for shares in bins if shares), default=0)
    bars = []
    for index, shares in enumerate(bins):
        end = 0.0
        for expert in range(experts):
            share = (shares[expert] or 0.0) if shares else 0.0
            bars.append(
                f"<rect data-expert={expert} data-bin={index} "
                f"x={frame.x(index) - frame.step * 0.46:.2f} width={frame.step * 0.92:.2f} "
                f"y={frame.y(end + share):.2f} height={frame.inner * share:.2f} "
                f"style='fill:{expert_variable(expert)}' />"
            )
            end += share
    lines = "".join(
        f"<line class=edge x1={frame.x(edge) - frame.step / 2:.1f} "
        f"x2={frame.x(edge) - frame.step / 2:.1f} y1={TOP} y2={TOP + frame.inner} />"
        for edge in edges
    )
    data = f" data-stack={key} data-height={frame.inner} data-top={TOP}" if key else ""
    return frame.svg("".join(bars) + lines, label=label, ticks=ticks, axis=axis, data=data)


class _Frame:
    """Axes: equally wide steps from left to right, values from 0 upwards."""

    def __init__(
        self,
        steps: int,
        top: float,
        *,
        height: int,
        percent: bool = False,
        levels: Sequence[float] | None = None,
    ) -> None:
        self.steps, self.top, self.height, self.percent = steps, top, height, percent
        quarters = [top * quarter / 4 for quarter in range(5)]
        self.levels = quarters if levels is None else levels
        self.inner = height - TOP - BOTTOM
        self.step = (WIDTH - LEFT - RIGHT) / max(1, steps)

    def x(self, index: int) -> float:
        return LEFT + (index + 0.5) * self.step

    def y(self, value: float) -> float:
        return TOP + self.inner * (1 - value / self.top)

    def svg(
        self, marks: str, *, label: str, ticks: Sequence[str], axis: str, data: str = ""
    ) -> str:
        grid = ""
        for value in self.levels:
            text = f"{100 * value:.0f} %" if self.percent else f"{value:.3g}"
            grid += (
                f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={self.y(value):.1f} "
                f"y2={self.y(value):.1f} /><text x={LEFT - 6} y={self.y(value) + 4:.1f} "
                f"text-anchor=end>{text}</text>"
            )
        widest = max(map(len, ticks), default=1)
        # about seven units a letter
        every = max(1, -(-min(widest, 16) * 8 // max(1, int(self.step))))
        for index in range(0, len(ticks), every):
            tick = ticks[index] if len(ticks[index]) <= 16 else f"{ticks[index][:15]}…"
            grid += (
                f"<text x={self.x(index):.1f} y={TOP + self.inner + 16} text-anchor=middle>"
                f"{escape(tick)}</text>"
            )
        grid += (
            f"<text x={(LEFT + WIDTH) / 2:.0f} y={self.height - 6} text-anchor=middle>"
            f"{escape(axis)}</text>"
        )
        return (
            f"<div class=scroll><svg class=chart viewBox='0 0 {WIDTH} {self.height}' role=img "
            f"aria-label='{escape(label)}'{data}>{grid}{marks}</svg></div>"
        )


def _nice(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 0.01
    size = 10.0
    while size > value:
        size /= 10
    return next(size * step for step in (1, 2, 4, 8, 10, 20, 40, 100) if size * step >= value)


def _bits(top: float) -> list[float]:
    """Round numbers of bits up to ``top``."""
    step = 0.5 if top < 2 else 1.0 if top <= 5 else 2.0
    return [step * number for number in range(int(top / step + 1e-9) + 1)]
