"""``moelora convert``: an old DyLoRA-MoE checkpoint becomes moelora's files."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Turn a checkpoint that DyLoRA-MoE's own code saved into moelora's: each expert a plain PEFT adapter,
the router beside them, copied to the bit; the old folder is not changed, and nothing in
it is run. The new folder appears whole or not at all."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora convert``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "convert",
        help="turn an old DyLoRA-MoE checkpoint into moelora's files",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("old", type=Path, help="the old checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="the new folder to make")
    parser.add_argument("--base", help="base model to record in the adapters")
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="of expert_<i>.pt files, where no config.json says it",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and tell what was written.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.
    """
    from moelora.validation.convert import convert_checkpoint

    conversion = convert_checkpoint(
        arguments.old,
        arguments.out,
        lora_alpha=arguments.lora_alpha,
        base_model=arguments.base,
    )
    if arguments.json:
        print(json.dumps(asdict(conversion)))
        return 0
    skills = "none" if conversion.skills is None else str(conversion.skills)
    print(
        f"{conversion.out}: {len(conversion.experts)} experts, router {conversion.router}, "
        f"skills {skills}, base model {conversion.base_model or 'not told'}."
    )
    for note in conversion.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
