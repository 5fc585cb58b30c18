"""What subcommands share that run text of the user's through a saved mixture."""

import argparse
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moelora.errors import ReportError

if TYPE_CHECKING:
    from moelora.report.results import RoutingReport

NUMBERS = {
    "max-tokens": "most tokens of each domain",
    "max-length": "most tokens of a passage, what the model reads at once",
    "batch": "passages in a forward",
}


def add_reading_arguments(
    parser: argparse.ArgumentParser, *, required: bool, max_tokens: int
) -> None:
    """Tell argparse which text is read, by which model, and how much of it at once.

    Args:
        parser: of the subcommand.
        required: whether there must be text.
        max_tokens: the default of ``--max-tokens``.
    """
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=required,
        metavar="NAME=PATH",
        help="text of a domain: a .txt, .jsonl or .json file, or a folder of such; a folder "
        "without NAME= holds one domain per file",
    )
    parser.add_argument(
        "--field",
        action="append",
        metavar="NAME",
        help="field of a record that holds the text; repeat it to join several (default: text)",
    )
    parser.add_argument("--base", help="base model (default: the one that the mixture names)")
    for name, default in zip(NUMBERS, (max_tokens, 256, 8), strict=True):
        add_number(parser, name, default, NUMBERS[name])
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the base model (default: auto, as it was saved)",
    )


def add_number(parser: argparse.ArgumentParser, name: str, default: int, meaning: str) -> None:
    """Tell argparse of a whole number.

    Args:
        parser: of the subcommand.
        name: of the option, without its dashes.
        default: if it is not given.
        meaning: for the help.
    """
    parser.add_argument(
        f"--{name}",
        type=int,
        default=default,
        metavar="N",
        help=f"{meaning} (default: {default})",
    )


def check_reading(arguments: argparse.Namespace) -> None:
    """Refuse numbers and texts that cannot be read, before torch and a model are loaded.

    Args:
        arguments: with those of `add_reading_arguments`.

    Raises:
        ReportError: if a number is below 1, or the text cannot be found.
    """
    from moelora.report.passages import read_domains

    for name in NUMBERS:
        value = getattr(arguments, name.replace("-", "_"))
        if value < 1:
            raise ReportError(f"--{name} must be at least 1, got {value}.")
    read_domains(arguments.data, fields=_fields(arguments))


def run_text(
    arguments: argparse.Namespace,
    mixtures: Sequence[str],
    *,
    expert_names: Sequence[str] | None = None,
    **options: Any,
) -> "RoutingReport":
    """Load mixtures, run the text through them with a bar on standard error, and report.

    Args:
        arguments: with those of `add_reading_arguments`.
        mixtures: folders or hub ids, active together.
        expert_names: None takes the router file's.
        options: further ones of `routing_report`.

    Raises:
        ReportError: if the text or a model cannot be read, or nothing is routed.
        CheckpointError: if an adapter is damaged.
    """
    from moelora.report.passages import read_domains

    domains, sources = read_domains(arguments.data, fields=_fields(arguments))
    quieten()
    from moelora.report.job import routing_report
    from moelora.report.loading import load_mixture

    loaded = load_mixture(
        mixtures, base=arguments.base, device=arguments.device, dtype=arguments.dtype
    )
    return routing_report(
        loaded.model,
        loaded.tokenizer,
        domains,
        max_tokens=arguments.max_tokens,
        max_length=arguments.max_length,
        batch_size=arguments.batch,
        expert_names=loaded.expert_names if expert_names is None else expert_names,
        model_name=loaded.name,
        sources=sources,
        show_progress=True,
        **options,
    )


def quieten() -> None:
    """Keep standard error for our own bar: no other bars, and no news of what will be renamed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _fields(arguments: argparse.Namespace) -> Sequence[str]:
    return arguments.field or ("text",)
