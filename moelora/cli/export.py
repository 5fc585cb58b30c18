"""``moelora export``: one expert leaves as a plain LoRA adapter."""

import argparse
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moelora import ExportedExpert

DESCRIPTION = """\
Write one expert of a mixture as a plain LoRA adapter, which PEFT, and what reads PEFT's adapters,
loads without moelora. The base model is not needed."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora export``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "export",
        help="write one expert as a plain LoRA adapter",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "mixture",
        help="folder or hub id of a mixture; or a folder of adapters with an attached router",
    )
    parser.add_argument(
        "--expert",
        required=True,
        metavar="E",
        help="name or index, see moelora inspect; a name comes first",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--rank",
        type=rank,
        metavar="R",
        help="pad with zeros to this rank, or 'vllm' for the next that vLLM has kernels for",
    )
    parser.add_argument("--force", action="store_true", help="replace an adapter that is in OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")


def rank(text: str) -> int | Literal["vllm"]:
    """Read ``--rank``.

    Args:
        text: an integer or ``vllm``.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    if text == "vllm":
        return "vllm"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or 'vllm', got {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Export.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.
    """
    from moelora import export_expert
    from moelora.cli.printing import to_json

    made = export_expert(
        arguments.mixture,
        arguments.out,
        expert=arguments.expert,
        rank=arguments.rank,
        force=arguments.force,
    )
    print(to_json(made) if arguments.json else _told(made))
    return 0


def _told(made: "ExportedExpert") -> str:
    from moelora.cli.printing import count

    lines = [
        f"{made.folder}: expert {made.index} ({made.name}) as a plain LoRA, r={made.r}, "
        f"lora_alpha={made.lora_alpha:g}, {count(made.layers, 'layer')}"
    ]
    if made.dropped_layers:
        dropped = count(made.dropped_layers, "layer")
        lines.append(f"Left out {dropped} of the mixture in which this expert is zero.")
    if made.rounding:
        lines.append(f"Unequal scalings were folded into B, rounding it by {made.rounding:.1g}.")
    return "\n".join(lines)
