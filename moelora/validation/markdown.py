"""The report as Markdown."""

from moelora.validation import wording
from moelora.validation.results import Report


def to_markdown(report: Report) -> str:
    """The report as Markdown, with tables instead of plots.

    Args:
        report: of a validation.
    """
    parts = [
        "# Validation",
        "\n".join(f"- {_escape(line)}" for line in wording.verdict(report)),
        "## Agreement",
        wording.MEANING,
        _table(wording.comparison_table(report.comparisons)),
    ]
    for speed in report.speed:
        parts += [
            f"## Speed and memory, {speed.experts} experts",
            _table(wording.speed_table(speed)),
        ]
    if report.speed:
        parts += [
            "## Memory beside one LoRA",
            f"Parameters and peak together. Measured: {report.memory_method or 'not measured'}.",
            _table(wording.ratio_table(report.speed)),
        ]
    parts += ["## Routing", _routing(report), "## How it was measured", wording.MEASURES]
    parts.append(_table((["what", "value"], [list(pair) for pair in wording.facts(report)])))
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _routing(report: Report) -> str:
    usage = report.usage
    if usage is None:
        return "The checkpoint has no router: there are no routing weights of its own to show."
    experts = [f"expert {index}" for index in range(len(usage.histogram))]
    rows = [
        [str(place), *(f"{share:.3f}" for share in shares)]
        for place, shares in enumerate(usage.over_time)
    ]
    table = _table((["batch", *experts], rows))
    return (
        "Mean routing weight of each expert, batch by batch. The mean entropy of a token's "
        f"weights is {usage.entropy:.3f} of that of even ones.\n\n{table}"
    )


def _table(table: wording.Table) -> str:
    heads, rows = table
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: str) -> str:
    for character in "\\|<>`*_[]":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")
