"""``moelora report``: run text through a mixture and show who serves what."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora.cli.reading import add_number, add_reading_arguments, check_reading, run_text
from moelora.errors import ReportError

if TYPE_CHECKING:
    from moelora.report.results import RoutingReport

DEFAULT_OUT = Path("routing-report")
DESCRIPTION = """\
Run text of one or more domains through a saved mixture, without training, and write a page that
shows which expert serves what: domains x experts beside a shuffled baseline, layers x experts, load
over the passage and over the data, entropy, co-activation, similarity, and the tokens coloured."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora report``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "report",
        help="show which expert of a mixture serves what",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "mixture",
        nargs="+",
        help="folder or hub id of a mixture; several are active together; a folder of adapters "
        "with an attached router stands for all of them",
    )
    add_reading_arguments(parser, required=True, max_tokens=20_000)
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help=f"folder for report.html and report.json, or one file *.html (default: {DEFAULT_OUT})",
    )
    parser.add_argument(
        "--png", action="store_true", help="also write every plot as a PNG file (needs matplotlib)"
    )
    add_number(parser, "permutations", 20, "of the shuffled baseline")
    add_number(parser, "seed", 0, "of the permutations")
    parser.add_argument(
        "--layers", metavar="0,4,8-11", help="only these transformer blocks (default: all)"
    )
    parser.add_argument(
        "--training-log",
        type=Path,
        metavar="FILE",
        help="loads over the training, of a trainer's log: JSON lines or trainer_state.json",
    )
    parser.add_argument("--json", action="store_true", help="print a summary as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Write the report.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.

    Raises:
        ReportError: if an option is out of range, or something cannot be read or written.
    """
    layers = None if arguments.layers is None else parse_numbers(arguments.layers)
    # every cheap check first: torch and transformers take seconds
    from moelora.report.writing import check_target, write_report

    check_target(arguments.out, pictures=arguments.png)
    for name, least in (("permutations", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise ReportError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    check_reading(arguments)
    report = run_text(
        arguments,
        arguments.mixture,
        layers=layers,
        permutations=arguments.permutations,
        seed=arguments.seed,
        training_log=arguments.training_log,
    )
    files = write_report(report, arguments.out, pictures=arguments.png)
    _print(report, files, as_json=arguments.json)
    return 0


def parse_numbers(text: str) -> list[int]:
    """Read numbers and ranges.

    Args:
        text: as ``0,4,8-11``.

    Raises:
        ReportError: if it is anything else.

    Example:
        >>> parse_numbers("0,4,8-11")
        [0, 4, 8, 9, 10, 11]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ReportError(f"--layers must be numbers and ranges as 0,4,8-11, got {text!r}.")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def _print(report: "RoutingReport", files: list[Path], *, as_json: bool) -> None:
    if as_json:
        summary = {**report.summary(), "files": [str(path) for path in files]}
        print(json.dumps(summary))
        return
    from moelora.report.page import verdict

    width = max(map(len, (*(domain.name for domain in report.domains), "all domains")))
    heads = [name if len(name) <= 12 else f"{name[:11]}…" for name in report.experts]
    rows = [("all domains", report.load)]
    rows += [(d.name, load) for d, load in zip(report.domains, report.domain_load, strict=True)]
    print(f"{'load in %':<{width}}  {'  '.join(f'{head:>6}' for head in heads)}")
    for name, load in rows:
        cells = (f"{100 * v:>{max(6, len(h))}.1f}" for v, h in zip(load, heads, strict=True))
        print(f"{name:<{width}}  {'  '.join(cells)}")
    print(f"\n{verdict(report)}")
    for note in report.notes:
        print(f"Note: {note}")
    print(f"\nOpen {files[0]}")
