"""The tables and sentences of a report, shared by its Markdown and its page."""

from collections.abc import Sequence

from moelora.validation.agreement import Comparison
from moelora.validation.results import Report, Speed
from moelora.validation.speed import Measured, Seconds

Table = tuple[list[str], list[list[str]]]
MIB = 2**20


def verdict(report: Report) -> list[str]:
    """Do the ways agree; and what does a single pass bring, for each number of experts.

    Args:
        report: of a validation.
    """
    demanded = [one for one in report.comparisons if one.demanded]
    failed = [one for one in demanded if not one.agrees]
    tolerance = report.settings["tolerance"]
    if failed:
        text = (
            f"DISAGREEMENT: {len(failed)} of {len(demanded)} comparisons that must agree do not "
            f"(tolerance {tolerance:g})."
        )
    else:
        text = (
            f"All {len(demanded)} comparisons that must agree do, within {tolerance:g} of the "
            "largest value."
        )
    return [text, *(_gain(speed) for speed in report.speed)]


def _gain(speed: Speed) -> str:
    old, later = speed.speed_up("n_plus_1"), speed.speed_up("two_passes")
    parts = []
    if old is not None:
        parts.append(f"{old:.2f} times as fast as N+1 passes")
    if later is not None:
        parts.append(f"{later:.2f} times as fast as two passes")
    memory = speed.memory_ratio()
    if memory is not None:
        parts.append(f"{memory:.3f} times the peak memory of one LoRA")
    return f"{speed.experts} experts, forward, {speed.new.label}: {', '.join(parts)}."


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Every comparison with its figures.

    Args:
        comparisons: of a report.
    """
    heads = ["compared", "must agree", "agrees", "max diff", "mean diff", "relative", "cosine"]
    rows = [
        [
            one.name,
            "yes" if one.demanded else "no",
            ("yes" if one.agrees else "NO") if one.demanded else "-",
            f"{one.max_difference:.3g}",
            f"{one.mean_difference:.3g}",
            f"{one.relative_difference:.3g}",
            f"{one.cosine:.6f}",
            "-" if one.top_1 is None else f"{one.top_1:.1%}",
            "-" if one.kl is None else f"{one.kl:.3g}",
        ]
        for one in comparisons
    ]
    return [*heads, "top-1", "KL (nats)"], rows


def speed_table(speed: Speed) -> Table:
    """Times and memory of every way at one number of experts.

    Args:
        speed: of a report.
    """
    heads = ["way", "passes", "forward ms (20-80 %)", "single pass is", "step ms (20-80 %)"]
    heads += ["single pass is", "forward peak MiB", "step peak MiB", "parameters MiB"]
    return heads, [_speed_row(speed, way) for way in speed.ways]


def _speed_row(speed: Speed, way: Measured) -> list[str]:
    return [
        way.label,
        str(way.passes),
        _milliseconds(way.forward),
        _times(speed.speed_up(way.way)),
        _milliseconds(way.step),
        _times(speed.speed_up(way.way, training=True)),
        _mebibytes(way.forward_peak),
        _mebibytes(way.step_peak),
        _mebibytes(way.resident),
    ]


def ratio_table(speed: Sequence[Speed]) -> Table:
    """Peak memory of the single pass beside one LoRA, parameters included.

    Args:
        speed: of a report.
    """
    heads = ["experts", "forward: memory / one LoRA", "training step: memory / one LoRA"]
    rows = [
        [
            str(one.experts),
            _ratio(one.memory_ratio()),
            _ratio(one.memory_ratio(training=True)),
        ]
        for one in speed
    ]
    return heads, rows


def _milliseconds(seconds: Seconds | None) -> str:
    if seconds is None:
        return "-"
    low, high = 1e3 * seconds.low, 1e3 * seconds.high
    return f"{1e3 * seconds.median:.1f} ({low:.1f}-{high:.1f})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _ratio(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.3f}"


def _mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / MIB:.1f}"


MEANING = (
    "One pass mixes what the experts add inside each layer. N+1 passes mix the logits of whole "
    "models with one expert each. Between the layers lie nonlinear functions, so these are two "
    "different functions of the same experts and weights, and their distance is a figure, not a "
    "fault. Agreement is demanded where mathematics gives it: with the same sum computed slowly in "
    "each layer, with one expert's own pass if it has all the weight, and with N passes mixed at "
    "the output of the first adapted layer."
)
MEASURES = (
    "Differences are absolute; relative is the largest one divided by the reference's largest "
    "value, and is what the tolerance applies to. Times are medians of interleaved repeats after "
    "warm-up, with their 20 % and 80 % quantiles; a training step is forward, backward and AdamW."
)


def facts(report: Report) -> list[tuple[str, str]]:
    """Checkpoint, settings and versions as pairs of words.

    Args:
        report: of a validation.
    """
    pairs = {**report.checkpoint, **report.settings, **report.versions}
    return [(name, _plain(value)) for name, value in pairs.items()]


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
