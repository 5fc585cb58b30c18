"""Charts as inline SVG: pure functions from numbers to markup, every text escaped."""

import html
from collections.abc import Mapping, Sequence

from moelora.report.palette import EXPERT_COLOURS

INK, MUTED = "#1f2933", "#9aa5b1"
WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 16, 44
MOST_TICKS = 8


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    ticks: Sequence[object],
    x_label: str,
    y_label: str,
    title: str,
    floor: float = 0.0,
) -> str:
    """A chart of one line for each series, with its points marked.

    Args:
        series: values by name, each as many as there are ticks.
        ticks: what stands below the points.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        title: for those who cannot see it.
        floor: the lowest value shown.

    Example:
        >>> lines({"a": [1.0]}, ticks=[2], x_label="x", y_label="y", title="t").startswith("<svg")
        True
    """
    top = _nice(max([floor, *(value for values in series.values() for value in values)]))
    parts = [_axes(ticks, top, x_label=x_label, y_label=y_label, floor=floor)]
    for index, (name, values) in enumerate(series.items()):
        colour = EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
        points = [
            (_x(place, len(ticks)), _y(value, top, floor)) for place, value in enumerate(values)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in points]
        parts.append(_key(index, name, colour))
    return _svg(parts, title)


def stacked(
    series: Mapping[str, Sequence[float]],
    *,
    ticks: Sequence[object],
    x_label: str,
    y_label: str,
    title: str,
) -> str:
    """A chart of bars, one for each tick, split among the series.

    Args:
        series: values by name, none negative, each as many as there are ticks.
        ticks: what stands below the bars.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        title: for those who cannot see it.
    """
    columns = list(zip(*series.values(), strict=True))
    top = _nice(max([0.0, *(sum(column) for column in columns)]))
    parts = [_axes(ticks, top, x_label=x_label, y_label=y_label, floor=0.0)]
    wide = 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(columns))
    for place, column in enumerate(columns):
        below = 0.0
        for index, value in enumerate(column):
            low, high = _y(below, top, 0.0), _y(below + value, top, 0.0)
            colour = EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
            parts.append(
                f"<rect x='{_x(place, len(columns)) - wide / 2:.1f}' y='{high:.1f}' "
                f"width='{wide:.1f}' height='{low - high:.1f}' fill='{colour}'/>"
            )
            below += value
    parts += [
        _key(index, name, EXPERT_COLOURS[index % len(EXPERT_COLOURS)])
        for index, name in enumerate(series)
    ]
    return _svg(parts, title)


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' xmlns='http://www.w3.org/2000/svg'>"
        f"<title>{_escape(title)}</title>{''.join(parts)}</svg>"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _x(place: int, number: int) -> float:
    return LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / max(1, number)


def _y(value: float, top: float, floor: float) -> float:
    share = (value - floor) / (top - floor) if top > floor else 0.0
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _nice(value: float) -> float:
    """A round number of at least ``value``."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(
        step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * power >= value
    )


def _axes(ticks: Sequence[object], top: float, *, x_label: str, y_label: str, floor: float) -> str:
    parts = []
    for quarter in range(5):
        value = floor + (top - floor) * quarter / 4
        y = _y(value, top, floor)
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='{MUTED}' "
            f"stroke-width='{1 if quarter == 0 else 0.4}'/>"
            f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{value:.4g}</text>"
        )
    step = -(-len(ticks) // MOST_TICKS) or 1
    for place, tick in enumerate(ticks):
        if place % step == 0:
            parts.append(
                f"<text x='{_x(place, len(ticks)):.1f}' y='{HEIGHT - BOTTOM + 16}' "
                f"text-anchor='middle'>{_escape(tick)}</text>"
            )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f"<text x='{middle_x}' y='{HEIGHT - 8}' text-anchor='middle'>{_escape(x_label)}</text>"
        f"<text x='14' y='{middle_y}' text-anchor='middle' "
        f"transform='rotate(-90 14 {middle_y})'>{_escape(y_label)}</text>"
    )
    return f"<g fill='{INK}' font-size='11'>{''.join(parts)}</g>"


def _key(index: int, name: str, colour: str) -> str:
    x, y = WIDTH - RIGHT + 12, TOP + 12 + index * 16
    if y > HEIGHT - 12:
        return ""
    shown = name if len(name) <= 22 else name[:21] + "…"
    return (
        f"<rect x='{x}' y='{y - 9}' width='10' height='10' fill='{colour}'/>"
        f"<text x='{x + 15}' y='{y}' font-size='11' fill='{INK}'>{_escape(shown)}</text>"
    )
