"""``python -m benchmarks``: list, run, table, plot."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import SUITES, Case, UnknownNameError, cases_of, select
from benchmarks.environment import ROOT, environment
from benchmarks.report import IMAGES, RESULTS, load, tables_of, update_files
from benchmarks.runner import Runner, run_and_write, tell
from benchmarks.timing import Effort


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show suites and case names")
    _add_selection(listing)
    run = commands.add_parser("run", help="check and measure cases, write JSON")
    _add_selection(run)
    run.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    run.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    run.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    run.add_argument("--minutes", type=float, default=9.0, help="start no case after so long")
    run.add_argument("--seconds", type=float, default=3.0, help="time each case for so long")
    run.add_argument("--least", type=int, default=7, help="timed runs at least")
    run.add_argument("--leak-steps", type=int, default=200, help="steps of a leak case")
    run.add_argument("--profile", type=int, default=0, metavar="N", help="list N top kernels")
    run.add_argument("--commit", default=None, help="the commit, if there is no repository here")
    run.add_argument("--label", default="", help="added to the file's name")
    table = commands.add_parser("table", help="show the tables, or write them into the documents")
    table.add_argument("--results", type=Path, default=RESULTS)
    table.add_argument("--write", action="store_true", help="update README and docs")
    table.add_argument("--check", action="store_true", help="fail if a document is out of date")
    plot = commands.add_parser("plot", help="draw the sweeps and the roofline (needs matplotlib)")
    plot.add_argument("--results", type=Path, default=RESULTS)
    plot.add_argument("--out", type=Path, default=IMAGES)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filters", nargs="*", help="parts of case names, or patterns with *")
    parser.add_argument("--suite", default=None, help=f"one of {', '.join(SUITES)}")


def _selected(arguments: argparse.Namespace) -> list[Case]:
    if arguments.suite is not None:
        return select(cases_of(arguments.suite), arguments.filters)
    every = dict.fromkeys(case for suite in SUITES for case in cases_of(suite))
    return select(list(every), arguments.filters)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.suite is None and not arguments.filters:
        for name, (_, about) in SUITES.items():
            print(f"{name:7} {len(cases_of(name)):4} cases  {about}")
        return 0
    for case in _selected(arguments):
        print(case.name)
    return 0


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in {"cuda", "cpu"}:
        raise UnknownNameError(f"Unknown device {name!r}: choose cuda or cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnknownNameError("No CUDA device here: choose --device cpu.")
    return torch.device(name)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.suite is None and not arguments.filters:
        raise UnknownNameError(f"Name cases, or a suite: --suite {{{','.join(SUITES)}}}.")
    cases = _selected(arguments)
    device = _device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    warmup = 3 if device.type == "cuda" else 1
    effort = replace(Effort(), warmup=warmup, seconds=arguments.seconds, least=arguments.least)
    if arguments.suite in {"tiny", "smoke"}:
        effort = Effort(warmup=1, least=2, most=3, seconds=0.1)
    runner = Runner(
        device,
        effort=effort,
        seconds=arguments.minutes * 60,
        leak_steps=arguments.leak_steps,
        profile=arguments.profile,
    )
    about: dict[str, Any] = {
        "suite": arguments.suite or "selected",
        "environment": environment(device, commit=arguments.commit),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path = arguments.out / _file_name(arguments, device)
    tell(f"{len(cases)} cases on {about['environment']['device']}, results in {path}")
    results = run_and_write(runner, cases, path, about=about)
    for table in tables_of(load(arguments.out, [path])).values():
        print(table)
    wrong = [result["case"] for result in results if result["status"] == "wrong"]
    if wrong:
        tell(f"wrong results: {', '.join(wrong)}")
    return 1 if wrong else 0


def _file_name(arguments: argparse.Namespace, device: torch.device) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    label = f"-{arguments.label}" if arguments.label else ""
    if not all(letter.isalnum() or letter in "-_." for letter in label):
        raise UnknownNameError(f"--label takes letters, digits and -_., got {arguments.label!r}.")
    return f"{arguments.suite or 'selected'}{label}-{device.type}-{stamp}.json"


def _table(arguments: argparse.Namespace) -> int:
    runs = load(arguments.results)
    if arguments.write or arguments.check:
        changed = update_files(runs, write=arguments.write)
        for path in changed:
            print(f"{'wrote' if arguments.write else 'out of date'}: {path.relative_to(ROOT)}")
        return 1 if changed and not arguments.write else 0
    for name, table in tables_of(runs).items():
        print(f"## {name}\n\n{table}\n")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from benchmarks.plots import draw_all

    for path in draw_all(load(arguments.results), arguments.out):
        print(path)
    return 0


_COMMANDS = {"list": _list, "run": _run, "table": _table, "plot": _plot}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; unknown names are one line on stderr and exit code 2."""
    parsed = _parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except UnknownNameError as error:
        tell(f"benchmarks: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
