"""Pictures of the sweeps and of the roofline, as SVG; needs matplotlib (the extra ``plots``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.bar import number
from benchmarks.cases import SWEEP, SWEEP_LONG, SWEEP_TOKENS
from benchmarks.devices import Run, by_device, device_of
from benchmarks.report import Groups, groups

_COLOURS = {"moelora": "#1f77b4", "moelora-wide": "#17becf", "lora": "#d62728", "base": "#555555"}
_METRICS = (("wall_ms", "ms per training step"), ("peak_mib", "peak MiB above weights"))
# the same bytes for the same numbers
_STYLE: Any = {"svg.hashsalt": "moelora", "svg.fonttype": "none", "font.size": 9}


@dataclass(frozen=True)
class Sweep:
    """One size that moves while the others stay.

    Attributes:
        name: of the file.
        label: of the horizontal axis.
        size: what a result is drawn at.
        fits: whether a moelora result belongs to the line.
    """

    name: str
    label: str
    size: Callable[[dict[str, Any]], float]
    fits: Callable[[dict[str, Any]], bool]


SWEEPS = (
    Sweep(
        "experts",
        "experts E (k = 2, r = 16)",
        lambda result: result["sizes"]["experts"],
        lambda result: (result["sizes"]["top_k"], result["sizes"]["r"]) == (2, 16),
    ),
    Sweep(
        "top-k",
        "experts per token k (E = 8, r = 16)",
        lambda result: result["sizes"]["top_k"],
        lambda result: (result["sizes"]["experts"], result["sizes"]["r"]) == (8, 16),
    ),
    Sweep(
        "rank",
        "rank r of each expert (E = 8, k = 2)",
        lambda result: result["sizes"]["r"],
        lambda result: (result["sizes"]["experts"], result["sizes"]["top_k"]) == (8, 2),
    ),
)


def _is_plain_mixture(result: dict[str, Any]) -> bool:
    sizes = result["sizes"]
    return sizes["kind"] == "moelora" and not (sizes["detail"] or sizes["adapter_dtype"])


def _points(
    members: Sequence[dict[str, Any]], sweep: Sweep, metric: str
) -> list[tuple[float, float]]:
    found = []
    for result in members:
        if result["status"] != "ok" or not _is_plain_mixture(result) or not sweep.fits(result):
            continue
        value = number(result["metrics"], metric)
        if value is not None:
            found.append((sweep.size(result), value))
    return sorted(found)


def _level(members: Sequence[dict[str, Any]], variant: str, metric: str) -> float | None:
    for result in members:
        if result["variant"] == variant and result["status"] == "ok":
            return number(result["metrics"], metric)
    return None


def draw_sweep(found: Groups, device: str, sweep: Sweep, path: Path) -> bool:
    """Time and memory against one size, with the base and one LoRA as lines; False without data."""
    members, _ = found.get((SWEEP.name, device), ([], {}))
    if len(_points(members, sweep, "wall_ms")) < 2:
        return False
    figure, panels = _panels(device)
    for panel, (metric, label) in zip(panels, _METRICS, strict=True):
        points = _points(members, sweep, metric)
        panel.plot(*zip(*points, strict=True), "o-", color=_COLOURS["moelora"], label="moelora")
        for variant, name in (("base", "frozen base"), ("lora-r16", "one PEFT LoRA, r = 16")):
            level = _level(members, variant, metric)
            if level is not None:
                colour = _COLOURS[variant.split("-")[0]]
                panel.axhline(level, linestyle="--", color=colour, label=name)
        _finish(panel, sweep.label, label, [x for x, _ in points])
    _save(figure, path)
    return True


def draw_tokens(found: Groups, device: str, path: Path) -> bool:
    """Time and memory against the tokens of a step."""
    lines = {
        "moelora-e8-k2-r16": ("moelora", "moelora, E = 8"),
        "moelora-e64-k2-r16": ("moelora-wide", "moelora, E = 64"),
        "lora-r16": ("lora", "one PEFT LoRA"),
        "base": ("base", "frozen base"),
    }
    sizes = [*SWEEP_TOKENS, SWEEP, SWEEP_LONG]
    present = [size for size in sizes if (size.name, device) in found]
    if len(present) < 2:
        return False
    figure, panels = _panels(device)
    for panel, (metric, label) in zip(panels, _METRICS, strict=True):
        for variant, (colour, name) in lines.items():
            points = [
                (size.batch * size.tokens, _level(found[size.name, device][0], variant, metric))
                for size in present
            ]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=_COLOURS[colour], label=name)
        _finish(panel, "tokens per step", label, [s.batch * s.tokens for s in present])
    _save(figure, path)
    return True


def draw_roofline(runs: Sequence[Run], path: Path) -> bool:
    """Achieved FLOP/s of every op against its FLOPs per byte, under the measured ceilings."""
    for run in runs:
        ceilings = run.get("ceilings", {}).get("bf16")
        ops = [
            result
            for result in run["results"]
            if result["status"] == "ok"
            and result["conditions"]["kind"] == "op"
            and result["conditions"]["dtype"] == "bf16"
        ]
        if ceilings and ops:
            _roofline(ops, ceilings, device_of(run), path)
            return True
    return False


def _roofline(
    ops: Sequence[dict[str, Any]], ceilings: dict[str, float], device: str, path: Path
) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.suptitle(device)
    panel = figure.add_subplot()
    marks = {"linear": "s", "fused": "o", "routed": "^", "combine": "v", "loop": "x"}
    for kind, mark in marks.items():
        points = []
        for result in ops:
            metrics = result["metrics"]
            if result["sizes"]["kind"] != kind:
                continue
            for way in ("forward", "training"):
                flops, seconds = metrics[f"{way}_flops"], metrics[f"{way}_ms"]["p50"] / 1e3
                points.append((flops / metrics[f"{way}_bytes"], flops / seconds / 1e12))
        if points:
            panel.plot(*zip(*points, strict=True), mark, markersize=4, label=kind)
    intensities = [10 ** (step / 20) for step in range(-10, 80)]
    roof = [min(ceilings["flops"], x * ceilings["bandwidth"]) / 1e12 for x in intensities]
    panel.plot(intensities, roof, color="black", label="measured ceilings")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("FLOPs per byte that has to move")
    panel.set_ylabel("TFLOP/s")
    panel.legend()
    _save(figure, path)


def _panels(device: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(device)
    return figure, figure.subplots(1, len(_METRICS))


def _finish(panel: Any, x_label: str, y_label: str, ticks: Sequence[float]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_ylim(bottom=0)
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.legend()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def draw_all(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw every picture that ``runs`` have numbers for, each of the newest device that has them.

    Returns:
        The files that were written.
    """
    found, devices = groups(runs), by_device(runs)
    drawn = []
    with mpl.rc_context(_STYLE):
        for sweep in SWEEPS:
            path = folder / f"benchmark-{sweep.name}.svg"
            if any(draw_sweep(found, device, sweep, path) for device in devices):
                drawn.append(path)
        path = folder / "benchmark-tokens.svg"
        if any(draw_tokens(found, device, path) for device in devices):
            drawn.append(path)
        path = folder / "benchmark-roofline.svg"
        if draw_roofline(runs, path):
            drawn.append(path)
    return drawn
