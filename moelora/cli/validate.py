"""``moelora validate``: is one pass right, and what does it bring."""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelora.validation.options import ValidationOptions
    from moelora.validation.results import Report

DEFAULT_OUT = Path("moelora-validation")
DISAGREEMENT = 1
DESCRIPTION = """\
Load a checkpoint (a mixture, adapters with a router, or one that DyLoRA-MoE's own code saved), run
its experts in one pass and in the old ways of several, compare the outputs, measure time and
memory, and write a report as Markdown, JSON and a page. Exit code 1 if outputs differ that must
agree. The largest difference that counts as agreement, as a share of the largest value, is 1e-9 in
float64, 1e-4 in float32, 2e-2 in float16 and 1e-1 in bfloat16."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora validate``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "validate",
        help="compare one pass with the ways of several, and measure both",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint's folder")
    parser.add_argument("--base", help="base model (default: what the checkpoint says)")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help=f"folder to write, an earlier report's is replaced (default: {DEFAULT_OUT})",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--experts",
        default="2,4,8",
        metavar="N,N",
        help="numbers of experts to measure at, '' for none (default: 2,4,8)",
    )
    parser.add_argument("--dtype", default="float32", help="of the base model (default: float32)")
    parser.add_argument("--text", type=Path, help="text to run (default: random tokens)")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="relative difference that counts as agreement"
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="A", help="of old expert_<i>.pt files without a config"
    )
    numbers = {
        "batch": (2, "rows of a batch"),
        "seq": (64, "tokens of a row"),
        "repeats": (5, "timed calls of each way"),
        "warmup": (1, "calls of each way before them"),
        "batches": (8, "batches whose routing is looked at"),
        "seed": (0, "of random tokens and weights"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument("--json", action="store_true", help="print the report as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Validate, write the report and say what it found.

    Args:
        arguments: as the parser returned them.

    Returns:
        0, or 1 if outputs differ that must agree.
    """
    from moelora.validation.options import ValidationOptions, numbers

    given = {k: v for k, v in vars(arguments).items() if k in ValidationOptions.__annotations__}
    options = ValidationOptions(**{**given, "experts": numbers(arguments.experts)})
    report = _validate(arguments.checkpoint, options)
    _print(report, options, as_json=arguments.json)
    return 0 if report.agrees else DISAGREEMENT


def _validate(checkpoint: Path, options: "ValidationOptions") -> "Report":
    # the profiler that measures memory would write a line for each start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from transformers.utils import logging

    from moelora.validation.job import validate

    # one bar is enough, and what transformers will rename is no concern of this program's user
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return validate(checkpoint, options, show_progress=True)


def _print(report: "Report", options: "ValidationOptions", *, as_json: bool) -> None:
    from moelora.validation.results import to_json
    from moelora.validation.wording import verdict

    if as_json:
        print(to_json(report), end="")
        return
    print("\n".join(verdict(report)))
    for one in report.comparisons:
        state = ("agrees" if one.agrees else "DIFFERS") if one.demanded else "reported"
        print(f"{state:8}  {one.relative_difference:.2e}  {one.name}")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"Open {options.out / 'report.html'}")
