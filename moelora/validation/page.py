"""The report as one HTML page that needs nothing else."""

import html

from moelora.validation import charts, wording
from moelora.validation.results import BINS, Report

_STYLE = """
:root{color-scheme:light}
body{margin:0;font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#fff}
main{max-width:1080px;margin:0 auto;padding:24px}
h1{margin:0 0 8px}h2{margin:32px 0 8px}
.verdict{padding:12px 16px;border-left:6px solid #009E73;background:#f1f8f5}
.verdict.bad{border-color:#D55E00;background:#fdf1e9}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;border-bottom:1px solid #dde3e9;text-align:right;vertical-align:top}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal}
thead th{border-bottom:2px solid #9aa5b1;font-weight:600}
tr.failed td{background:#fdf1e9;font-weight:600}
.charts{display:grid;margin-top:24px;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:24px}
figure{margin:0}figcaption{font-size:13px;color:#52606d}
svg{width:100%;height:auto;font-family:inherit}
.facts td:last-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
.verdict ul{margin:6px 0 0;padding-left:20px}
"""


def to_html(report: Report) -> str:
    """The report as HTML with inline SVG, every foreign text escaped.

    Args:
        report: of a validation.
    """
    mood = "" if report.agrees else " bad"
    first, *gains = wording.verdict(report)
    items = "".join(f"<li>{_escape(line)}</li>" for line in gains)
    sections = [
        f"<h1>Validation</h1><div class='verdict{mood}'><b>{_escape(first)}</b>"
        f"<ul>{items}</ul></div>",
        f"<div class=charts>{_charts(report)}</div>",
        f"<h2>Agreement</h2><p>{_escape(wording.MEANING)}</p>{_comparisons(report)}",
    ]
    sections += [
        f"<h2>Speed and memory, {speed.experts} experts</h2>{_table(wording.speed_table(speed))}"
        for speed in report.speed
    ]
    if report.speed:
        method = report.memory_method or "not measured"
        sections.append(
            "<h2>Memory beside one LoRA</h2><p>Parameters and peak together. Measured: "
            f"{_escape(method)}.</p>{_table(wording.ratio_table(report.speed))}"
        )
    sections.append(f"<h2>How it was measured</h2><p>{_escape(wording.MEASURES)}</p>")
    pairs = [list(pair) for pair in wording.facts(report)]
    sections.append(_table((["what", "value"], pairs), kind="facts"))
    if report.notes:
        notes = "".join(f"<li>{_escape(note)}</li>" for note in report.notes)
        sections.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>moelora validate</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}\n</main></body></html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _comparisons(report: Report) -> str:
    heads, rows = wording.comparison_table(report.comparisons)
    failed = [one.demanded and not one.agrees for one in report.comparisons]
    whys = [one.why for one in report.comparisons]
    body = "".join(
        f"<tr{' class=failed' if bad else ''} title='{_escape(why)}'>"
        + "".join(f"<td>{_escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row, bad, why in zip(rows, failed, whys, strict=True)
    )
    return _framed(heads, body)


def _table(table: wording.Table, *, kind: str = "") -> str:
    heads, rows = table
    body = "".join(
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return _framed(heads, body, kind=kind)


def _framed(heads: list[str], body: str, *, kind: str = "") -> str:
    head = "".join(f"<th scope=col>{_escape(text)}</th>" for text in heads)
    return (
        f"<div class=scroll><table class='{kind}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _charts(report: Report) -> str:
    figures = [*_speed_chart(report), *_routing_charts(report)]
    return "".join(
        f"<figure>{drawing}<figcaption>{_escape(caption)}</figcaption></figure>"
        for drawing, caption in figures
    )


def _speed_chart(report: Report) -> list[tuple[str, str]]:
    wanted = {
        "N+1 passes, forward": ("n_plus_1", False),
        "N+1 passes, step": ("n_plus_1", True),
        "2 passes, forward": ("two_passes", False),
        "2 passes, step": ("two_passes", True),
    }
    series = {
        name: [speed.speed_up(way, training=training) or 0.0 for speed in report.speed]
        for name, (way, training) in wanted.items()
    }
    if not report.speed:
        return []
    drawing = charts.lines(
        series,
        ticks=[speed.experts for speed in report.speed],
        x_label="experts",
        y_label="times as fast",
        title="Speed-up of a single pass against the number of experts",
    )
    return [(drawing, "Speed-up of a single pass over the ways of several, by number of experts.")]


def _routing_charts(report: Report) -> list[tuple[str, str]]:
    usage = report.usage
    if usage is None:
        return []
    names = [f"expert {index}" for index in range(len(usage.histogram))]
    totals = [max(1, sum(counts)) for counts in usage.histogram]
    shares = {
        name: [count / total for count in counts]
        for name, counts, total in zip(names, usage.histogram, totals, strict=True)
    }
    distribution = charts.lines(
        shares,
        ticks=[f"{place / BINS:.2f}" for place in range(BINS)],
        x_label="routing weight (from)",
        y_label="share of tokens",
        title="Distribution of the routing weights of each expert",
    )
    over_time = charts.stacked(
        {
            name: [max(0.0, batch[index]) for batch in usage.over_time]
            for index, name in enumerate(names)
        },
        ticks=list(range(len(usage.over_time))),
        x_label="batch",
        y_label="mean routing weight",
        title="Use of each expert over time",
    )
    return [
        (distribution, "Distribution of the routing weights, for each expert."),
        (over_time, "Use of the experts over time: mean routing weight, batch by batch."),
    ]
