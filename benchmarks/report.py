"""Tables from the JSON of runs, and the documents they stand in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bar import AIMS, Aim, Value, number, value_of, values_of
from benchmarks.baselines import Variant
from benchmarks.cases import (
    BASE,
    CPU_TRAIN,
    DECODE_GRAPH,
    LORA,
    MIXTURE,
    PREFILL,
    TRAIN_EAGER,
    TRAIN_GRAPH,
    XLORA,
    Conditions,
    UnknownNameError,
)
from benchmarks.devices import Run, by_device, device_of, in_order, is_cpu, said
from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
_MARKED = re.compile(
    r"(<!-- benchmarks:begin(?: (?P<name>[a-z-]+))? -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL
)
_HOST_METRICS = ("us_per_linear", "added_us_per_linear", "added_launches_per_linear")
_NOT_MEASURED = "not measured"
#: Results of one group with the run they are from, by group and device.
Groups = dict[tuple[str, str], tuple[list[dict[str, Any]], Run]]


@dataclass(frozen=True)
class Headline:
    """One row of the README.

    Attributes:
        what: is measured.
        over: what it is compared with.
        aim: the figure, one of ``AIMS``.
        is_below: whether moelora is below the line of the aim's quotient.
    """

    what: str
    over: str
    aim: Aim
    is_below: bool = False


def _aim(conditions: Conditions, variant: Variant, over: Variant, metric: str = "wall_ms") -> Aim:
    wanted = (conditions, variant, over, metric)
    (aim,) = [a for a in AIMS if (a.conditions, a.variant, a.over, a.metric) == wanted]
    return aim


_LORA_NAME, _BASE_NAME = "one LoRA, r = 16", "frozen model"
HEADLINES = (
    Headline("training step, CUDA graph", _LORA_NAME, _aim(TRAIN_GRAPH, MIXTURE, LORA)),
    Headline("training step, CUDA graph", _BASE_NAME, _aim(TRAIN_GRAPH, MIXTURE, BASE)),
    Headline("training step, eager", _LORA_NAME, _aim(TRAIN_EAGER, MIXTURE, LORA)),
    Headline(
        "training memory above weights", _LORA_NAME, _aim(TRAIN_EAGER, MIXTURE, LORA, "peak_mib")
    ),
    Headline(
        "training step, eager",
        "X-LoRA, 8 experts (its time / ours)",
        _aim(TRAIN_EAGER, XLORA, MIXTURE),
        is_below=True,
    ),
    Headline("prefill of 4096 tokens, eager", _BASE_NAME, _aim(PREFILL, MIXTURE, BASE)),
    Headline("decoding one token, CUDA graph", _BASE_NAME, _aim(DECODE_GRAPH[0], MIXTURE, BASE)),
    Headline(
        "training step, SmolLM2-135M, two CPU cores", _LORA_NAME, _aim(CPU_TRAIN, MIXTURE, LORA)
    ),
)


def load(folder: Path, paths: Sequence[Path] | None = None) -> list[Run]:
    """All runs of a folder, newest first.

    Raises:
        UnknownNameError: for a file that is not a run's.
    """
    found = []
    for path in sorted(folder.glob("*.json")) if paths is None else paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run.get("format") != 1:
            raise UnknownNameError(f"{path} has format {run.get('format')!r}; 1 is known.")
        found.append({**run, "file": path.name})
    return sorted(found, key=lambda run: (run["time"], run["file"]), reverse=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers.

    Example:
        >>> print(markdown(["a", "b"], [["x", "1"]]))
        | a | b |
        | --- | ---: |
        | x | 1 |
    """
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


def shown(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, or nothing.

    Example:
        >>> shown(1234.5), shown(0.98765)
        ('1234', '0.988')
    """
    if value is None:
        return ""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


def bar_table(runs: Sequence[Run]) -> str:
    """Every aim of each device: to reach, measured, reached or not; what earlier runs gave.

    An aim that no device has a value for stands in the first table, and in that one only.
    """
    nowhere = [aim for aim in AIMS if value_of(aim, runs) is None]
    tables = []
    for device, own in in_order(by_device(runs)).items():
        aims = [aim for aim in AIMS if aim in nowhere or value_of(aim, own) is not None]
        if aims:
            tables.append(f"**{device}**\n\n{_table_of_aims(aims, own)}")
            nowhere = []
    return "\n\n".join(tables) if tables else _table_of_aims(AIMS, [])


def _table_of_aims(aims: Sequence[Aim], runs: Sequence[Run]) -> str:
    """Aims with their values in the runs of one device."""
    rows = []
    for aim in aims:
        values = values_of(aim, runs)
        if not values:
            rows.append([aim.figure, _bound(aim), _NOT_MEASURED, "", "", ""])
            continue
        found, *earlier = values
        verdict = "yes" if aim.reached(found.quotient) else "**no**"
        medians = f"{shown(found.above)} / {shown(found.below)} {_unit(aim.metric)}"
        before = ", ".join(f"{value.quotient:.2f}" for value in earlier)
        rows.append([aim.figure, _bound(aim), f"{found.quotient:.2f}", verdict, medians, before])
    return markdown(["figure", "to reach", "measured", "reached", "medians", "earlier runs"], rows)


def _bound(aim: Aim) -> str:
    return f"{'≥' if aim.at_least else '≤'} {aim.bound:g}"


def headline_table(runs: Sequence[Run]) -> str:
    """The few figures of the README, each moelora's over another's, and where they come from.

    They are those of one GPU and one CPU; what only another device has a value for is left out.
    """
    newest = _newest(runs)
    rows, used = [], []
    for headline in HEADLINES:
        aim = headline.aim
        found = value_of(aim, newest)
        if found is not None:
            used.append(found.run)
            rows.append(_headline_row(headline, found))
        elif value_of(aim, runs) is None:
            rows.append([headline.what, headline.over, _NOT_MEASURED, "", "", _bound(aim)])
    header = ["", "compared with", "moelora", "the other", "quotient", "aim"]
    table = markdown(header, rows)
    return f"{table}\n\n{_summary(newest)}{_machines(used)}"


def _headline_row(headline: Headline, found: Value) -> list[str]:
    aim = headline.aim
    bound = _bound(aim)
    reached = bound if aim.reached(found.quotient) else f"{bound}, **missed**"
    values = [found.below, found.above] if headline.is_below else [found.above, found.below]
    times = [f"{shown(value)} {_unit(aim.metric)}" for value in values]
    return [headline.what, headline.over, *times, f"{found.quotient:.2f}", reached]


def _newest(runs: Sequence[Run]) -> list[Run]:
    """The runs of the newest GPU and of the newest CPU that have a value for the README."""
    kept: dict[bool, str] = {}
    for run in runs:
        if any(value_of(headline.aim, [run]) for headline in HEADLINES):
            kept.setdefault(is_cpu(run), device_of(run))
    return [run for run in runs if kept.get(is_cpu(run)) == device_of(run)]


def _summary(runs: Sequence[Run]) -> str:
    values = [(aim, value_of(aim, runs)) for aim in AIMS]
    reached = sum(value is not None and aim.reached(value.quotient) for aim, value in values)
    measured = sum(value is not None for _, value in values)
    return f"Of {len(AIMS)} figures with an aim {measured} are measured and {reached} reached."


def _machines(runs: Sequence[Run]) -> str:
    """One sentence for each machine, with its files."""
    files: dict[str, list[str]] = {}
    for run in runs:
        about = run["environment"]
        versions = [f"{name} {about['libraries'].get(name)}" for name in ("torch", "peft")]
        machine = f"{about['device']}, {', '.join(versions)}"
        path = f"benchmarks/results/{run['file']}"
        files.setdefault(machine, []).append(f"[{_short_name(run['file'])}]({path})")
    sentences = []
    for machine, links in files.items():
        sentences.append(f" {machine}: data {', '.join(dict.fromkeys(links))}.")
    return "".join(sentences)


def _short_name(file: str) -> str:
    """What tells a run's file from the others, short."""
    return file.removesuffix(".json").split("-cuda-")[0].split("-cpu-")[0]


def _unit(metric: str) -> str:
    if metric.endswith("_mib"):
        return "MiB"
    return "us" if "_us" in metric else "ms"


def groups(runs: Sequence[Run]) -> Groups:
    """The results of each group on each device, devices in their order.

    They are from the newest run of the device with at least two of them that worked.
    """
    return {
        (name, device): group
        for device, own in in_order(by_device(runs)).items()
        for name, group in _groups_of_one_device(own).items()
    }


def _groups_of_one_device(runs: Sequence[Run]) -> dict[str, tuple[list[dict[str, Any]], Run]]:
    found: dict[str, tuple[list[dict[str, Any]], Run]] = {}
    for least in (2, 1, 0):
        for run in runs:
            for name in dict.fromkeys(result["group"] for result in run["results"]):
                members = [result for result in run["results"] if result["group"] == name]
                worked = sum(result["status"] == "ok" for result in members)
                if name not in found and worked >= least:
                    found[name] = (members, run)
    return found


def _quantiles(metrics: dict[str, Any], name: str) -> str:
    value = metrics.get(name)
    if not isinstance(value, dict):
        return ""
    return f"{shown(value['p50'])} ({shown(value['p20'])}-{shown(value['p80'])})"


def _ratio(metrics: dict[str, Any], other: dict[str, Any] | None, name: str = "wall_ms") -> str:
    above, below = number(metrics, name), number(other or {}, name)
    return "" if above is None or not below else f"{above / below:.2f}"


def model_table(members: Sequence[dict[str, Any]]) -> str:
    """The variants of one group: times with their 20 and 80 %, memory, ratios to the baselines."""
    by_variant = {r["variant"]: r["metrics"] for r in members if r["status"] == "ok"}
    base, lora = by_variant.get("base"), by_variant.get("lora-r16")
    header = ["variant", "wall ms (20-80 %)", "host ms", "GPU kernels ms", "launches"]
    header += ["peak MiB above weights", "/ base", "/ one LoRA"]
    rows = []
    for variant, metrics in by_variant.items():
        rows.append(
            [
                variant,
                _quantiles(metrics, "wall_ms"),
                shown(number(metrics, "host_ms")),
                shown(number(metrics, "kernels_ms")),
                shown(number(metrics, "launches")),
                shown(number(metrics, "peak_mib"), 4),
                _ratio(metrics, base),
                _ratio(metrics, lora),
            ]
        )
    return markdown(*_without_empty_columns(header, rows))


def _without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def host_table(members: Sequence[dict[str, Any]]) -> str:
    """Host microseconds and kernel launches per adapted linear."""
    rows = []
    for result in members:
        if result["status"] != "ok" or result["variant"] == "base":
            continue
        names = [f"{way}_{name}" for way in ("forward", "training") for name in _HOST_METRICS]
        values = [shown(number(result["metrics"], name)) for name in names]
        rows.append([result["variant"], *values])
    header = ["variant"]
    for way in ("forward", "training"):
        header += [f"{way}: host us per linear", "of which added", "launches added"]
    return markdown(*_without_empty_columns(header, rows))


def op_table(members: Sequence[dict[str, Any]]) -> str:
    """An op's times beside the floor that FLOPs and bytes set."""
    rows = []
    for result in members:
        if result["status"] != "ok":
            continue
        row = [result["variant"]]
        for way in ("forward", "training"):
            metrics = result["metrics"]
            row.append(_quantiles(metrics, f"{way}_ms"))
            row.append(shown(number(metrics, f"{way}_floor_ms")))
            row.append(shown(number(metrics, f"{way}_over_floor")))
        rows.append(row)
    header = ["variant", "forward ms (20-80 %)", "floor ms", "/ floor"]
    header += ["forward and backward ms (20-80 %)", "floor ms", "/ floor"]
    return markdown(header, rows)


def leak_table(members: Sequence[dict[str, Any]]) -> str:
    """Bytes and tensors alive early and late in many steps."""
    rows = []
    for result in members:
        if result["status"] != "ok":
            continue
        metrics = result["metrics"]
        grown = metrics["late_bytes"] - metrics["early_bytes"]
        tensors = metrics["late_tensors"] - metrics["early_tensors"]
        rows.append([result["variant"], str(metrics["steps"]), str(grown), str(tensors)])
    return markdown(["variant", "steps", "bytes grown", "tensors grown"], rows)


def profiles(runs: Sequence[Run]) -> str:
    """Where the time of each profiled step of a default mixture goes."""
    tables = []
    for (_, device), (members, _) in groups(runs).items():
        for result in members:
            if result["variant"] != MIXTURE.name or not result.get("kernels"):
                continue
            rows = [
                [f"`{row['kernel'][:80]}`", str(row["calls"]), shown(row["ms"])]
                for row in result["kernels"]
            ]
            table = markdown(["kernel", "calls", "ms"], rows)
            tables.append((result["case"], device, table))
    return _under_headings(tables, _devices(runs, on_cpu=False))


def _devices(runs: Sequence[Run], *, on_cpu: bool) -> set[str]:
    """The GPUs, or the CPUs, that there are tables of."""
    return {device for (_, device), (_, run) in groups(runs).items() if is_cpu(run) == on_cpu}


def _under_headings(tables: Sequence[tuple[str, str, str]], devices: Collection[str]) -> str:
    """Tables, each under what it is of; with its device where there are several."""
    parts = [f"{said(f'`{name}`', device, devices)}\n\n{table}" for name, device, table in tables]
    return "\n\n".join(parts) if parts else _NOT_MEASURED.capitalize() + "."


def failures_table(runs: Sequence[Run]) -> str:
    """What did not run, or ran and was wrong, in the runs that the tables come from."""
    devices = {device for _, device in groups(runs)}
    rows = [
        [
            said(result["case"], device, devices),
            result["status"],
            _in_a_cell(result["reason"]),
            _worked_since(result["case"], run, by_device(runs)[device]),
        ]
        for (_, device), (members, run) in groups(runs).items()
        for result in members
        if result["status"] not in {"ok", "skipped"}
    ]
    return markdown(["case", "outcome", "reason", "worked since"], rows) if rows else "None."


def _worked_since(case: str, failed: Run, runs: Sequence[Run]) -> str:
    """The newest run of a device that did what one before it did not; empty if none did."""
    for run in runs:
        if run["time"] <= failed["time"]:
            break
        if any(r["case"] == case and r["status"] == "ok" for r in run["results"]):
            return f"`{run['file']}`"
    return ""


def _in_a_cell(text: str) -> str:
    return text.replace("|", "/")


def environments_table(runs: Sequence[Run]) -> str:
    """The machines and versions of the runs that the tables come from."""
    used = {run["file"]: run for _, run in groups(runs).values()}
    rows = []
    for name, run in sorted(used.items()):
        about = run["environment"]
        libraries = ", ".join(f"{k} {v}" for k, v in about["libraries"].items() if v)
        driver = f", driver {about['driver']}" if about["driver"] else f", {about['cores']} cores"
        commit = about["commit"][:12] + (" with changes" if about["dirty"] else "")
        threads = f", {about['threads']} threads" if not about["driver"] else ""
        machine = f"{about['device']}{driver}{threads}"
        rows.append([f"`{name}`", machine, f"Python {about['python']}, {libraries}", commit])
    return markdown(["run", "machine", "versions", "commit"], rows) if rows else _NOT_MEASURED


_TABLE_OF_KIND = {"host": host_table, "op": op_table, "leak": leak_table}
_SECTIONS = {
    "training": ("train",),
    "inference": ("prefill", "decode", "generate"),
    "host": ("host",),
    "ops": ("op",),
    "leaks": ("leak",),
}


def section(runs: Sequence[Run], kinds: Sequence[str], *, on_cpu: bool) -> str:
    """The tables of all groups of some kinds, with their conditions as headings."""
    tables = []
    by_name = sorted(groups(runs).items(), key=lambda item: item[0][0])
    for (name, device), (members, run) in by_name:
        kind = name.split("/", 1)[0]
        worked = any(result["status"] == "ok" for result in members)
        if kind in kinds and is_cpu(run) == on_cpu and worked:
            table = _TABLE_OF_KIND.get(kind, model_table)(members)
            tables.append((name, device, table))
    return _under_headings(tables, _devices(runs, on_cpu=on_cpu))


def pictures() -> str:
    """The pictures that were drawn."""
    titles = {
        "experts": "Training against the number of experts",
        "top-k": "Training against the experts per token",
        "rank": "Training against the rank",
        "tokens": "Training against the tokens per step",
        "roofline": "The ops under the measured ceilings",
    }
    lines = [
        f"![{title}](images/benchmark-{name}.svg)"
        for name, title in titles.items()
        if (IMAGES / f"benchmark-{name}.svg").is_file()
    ]
    return "\n\n".join(lines) if lines else "Not drawn."


def tables_of(runs: Sequence[Run]) -> dict[str, str]:
    """Every generated text by its marker's name."""
    every_kind = [kind for kinds in _SECTIONS.values() for kind in kinds]
    return {
        "bar": bar_table(runs),
        "headlines": headline_table(runs),
        **{name: section(runs, kinds, on_cpu=False) for name, kinds in _SECTIONS.items()},
        "cpu": section(runs, every_kind, on_cpu=True),
        "profiles": profiles(runs),
        "pictures": pictures(),
        "failures": failures_table(runs),
        "environments": environments_table(runs),
    }


def updated(text: str, runs: Sequence[Run]) -> str:
    """A document with everything between its markers made anew; a bare marker holds the aims.

    Raises:
        UnknownNameError: if a marker names no table.
    """
    tables = tables_of(runs)

    def replaced(match: re.Match[str]) -> str:
        name = match["name"] or "bar"
        if name not in tables:
            raise UnknownNameError(f"Unknown table {name!r}: choose one of {', '.join(tables)}.")
        return f"{match[1]}\n{tables[name]}\n\n{match[3]}"

    return _MARKED.sub(replaced, text)


def update_files(runs: Sequence[Run], *, write: bool) -> list[Path]:
    """The documents whose tables are not those of ``runs``; rewritten if asked."""
    changed = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = updated(text, runs)
        if new != text:
            changed.append(path)
            if write:
                path.write_text(new, encoding="utf-8")
    return changed
