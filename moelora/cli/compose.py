"""``moelora compose``: LoRA adapters become the experts of one mixture."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelora import Composition

DESCRIPTION = """\
Make LoRA adapters the experts of one mixture. Each keeps its function; ranks, alphas and targets
may differ. The base model is not needed. Load the result with
PeftModel.from_pretrained(base, OUT) after `import moelora`."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora compose``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "compose",
        help="make LoRA adapters the experts of one mixture",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="folder or hub id (owner/name) of a LoRA adapter or mixture, at least two experts",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--router",
        choices=("arrow", "zeros", "train"),
        default="arrow",
        help="arrow: by the input direction each expert answers most, without training; zeros: "
        "the mean of all experts; train: small random rows, to be trained (default: arrow)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="experts per token (default: 2; with zeros all)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="divides the router logits (default: 1 with arrow, else 2)",
    )
    parser.add_argument(
        "--names", metavar="A,B,...", help="names of the experts (default: those of the folders)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --router train (default: 0)"
    )
    parser.add_argument(
        "--allow-different-bases",
        action="store_true",
        help="compose adapters whose configs name different base models",
    )
    parser.add_argument("--force", action="store_true", help="replace an adapter that is in OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Compose.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.
    """
    from moelora import compose
    from moelora.cli.printing import to_json

    made = compose(
        arguments.adapters,
        arguments.out,
        router=arguments.router,
        top_k=arguments.top_k,
        temperature=arguments.temperature,
        names=None if arguments.names is None else arguments.names.split(","),
        seed=arguments.seed,
        allow_different_bases=arguments.allow_different_bases,
        force=arguments.force,
        show_progress=True,
    )
    print(to_json(made) if arguments.json else _told(made))
    return 0


def _told(made: "Composition") -> str:
    from moelora.cli.printing import count, table

    rows = [("expert", "name", "rank", "layers", "from")]
    experts = [
        (index, expert.name, expert.rank, expert.layers, expert.source)
        for index, expert in enumerate(made.experts)
    ]
    lines = [
        f"{made.folder}: {len(made.experts)} experts in {count(made.layers, 'layer')}, router "
        f"{made.router}, top {made.top_k}, temperature {made.temperature:g}, {made.dtype}",
        table([*rows, *experts]),
    ]
    if made.rounding:
        lines.append(f"Unequal scalings were folded into B, rounding it by {made.rounding:.1g}.")
    return "\n".join([*lines, *made.notes])
