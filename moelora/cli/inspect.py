"""``moelora inspect``: what is in an adapter folder."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelora import DescribedExpert, DescribedRouter, Description

DESCRIPTION = """\
Tell what a folder holds: experts, ranks, targets, router, sizes, maturity, digests. Serves
mixtures, several adapters with or without an attached router, and plain LoRAs; nothing but the
adapter's own files is needed."""
_KINDS = {"mixture": "a mixture", "adapters": "several adapters", "lora": "a plain LoRA"}


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora inspect``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "inspect",
        help="tell what an adapter folder holds",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("mixture", help="folder or hub id")
    parser.add_argument("--json", action="store_true", help="print the description as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Inspect.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.
    """
    from moelora import describe
    from moelora.cli.printing import to_json

    told = describe(arguments.mixture)
    print(to_json(told) if arguments.json else _told(told))
    return 0


def _told(told: "Description") -> str:
    from moelora.cli.printing import count, table

    targets = ", ".join(f"{name} x {number}" for name, number in told.targets.items())
    lines = [
        f"{told.source}: {_KINDS[told.kind]} of {count(len(told.experts), 'expert')}",
        f"base model   {told.base_model or 'not named'}",
        f"task         {told.task_type or 'not named'}",
        f"targets      {targets or 'none'}",
        f"rank, alpha  r={told.r}, lora_alpha={told.lora_alpha:g} (of one expert, in the config)",
        f"size         {told.parameters:,} parameters, {told.bytes:,} bytes, "
        f"{', '.join(told.dtypes)}",
        f"router       {_router(told.router)}",
    ]
    if told.router is not None and told.router.digest is not None:
        lines.append(f"digest       {told.router.digest}")
    lines += ["", table([_HEADINGS, *map(_row, told.experts)])]
    return "\n".join([*lines, *([""] if told.notes else []), *told.notes])


_HEADINGS = ("expert", "name", "rank", "layers", "parameters", "norm", "mature")


def _row(expert: "DescribedExpert") -> tuple[object, ...]:
    norm = "?" if expert.update_norm is None else f"{expert.update_norm:.4g}"
    mature = {True: "yes", False: "no", None: "-"}[expert.mature]
    return (
        expert.index,
        expert.name,
        expert.rank,
        expert.layers,
        expert.parameters,
        norm,
        mature,
    )


def _router(router: "DescribedRouter | None") -> str:
    if router is None:
        return "none"
    where = {"module": "one per adapted layer", "layer": "one per block", "model": "one per model"}
    parts = [f"{router.router_type}, {where[router.router_scope]}"]
    if router.top_k is not None:
        parts.append(f"top {router.top_k}")
    if router.temperature is not None:
        parts.append(f"temperature {router.temperature:g}")
    if router.hidden_size is not None:
        parts.append(f"hidden layer of {router.hidden_size}")
    if router.parameters:
        parts.append(f"{router.parameters:,} parameters in {router.routers}")
    return ", ".join(parts)
