"""``moelora inspect``: what is in an adapter folder."""

import argparse
from typing import TYPE_CHECKING, Any

from moelora.cli.reading import add_reading_arguments, check_reading, run_text
from moelora.errors import ConfigError

if TYPE_CHECKING:
    from moelora import DescribedExpert, DescribedRouter, Description, RoutingReport

DESCRIPTION = """\
Tell what a folder holds: experts, ranks, targets, router, sizes, maturity, digests. Serves
mixtures, several adapters with or without an attached router, and plain LoRAs; nothing but the
adapter's own files is needed. How much each expert is used depends on the text: --data measures it
on text of yours, with the base model."""
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
    add_reading_arguments(parser, required=False, max_tokens=4000)
    parser.add_argument("--json", action="store_true", help="print the description as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Inspect.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.

    Raises:
        ConfigError: if options about text come without text.
    """
    from moelora import describe
    from moelora.cli.printing import to_json

    report = None
    if arguments.data is not None:
        report = _measured(arguments)
    elif arguments.base is not None or arguments.field is not None:
        raise ConfigError("--base and --field are for measuring loads and need --data.")
    told = describe(arguments.mixture, report=report)
    print(to_json(told) if arguments.json else _told(told))
    return 0


def _measured(arguments: argparse.Namespace) -> "RoutingReport":
    from moelora.expert_folders import find_experts

    names = find_experts(arguments.mixture).names
    check_reading(arguments)
    # names may repeat where several mixtures lie in one folder
    distinct = names if len(set(names)) == len(names) else None
    return run_text(arguments, [arguments.mixture], expert_names=distinct, permutations=1)


def _told(told: "Description") -> str:
    from moelora.cli.printing import count, table

    targets = ", ".join(f"{name} x {number}" for name, number in told.targets.items())
    lines = [
        f"{told.source}: {_KINDS[told.kind]} of {count(len(told.experts), 'expert')}",
        f"base model   {told.base_model or 'not named'}",
        f"task         {told.task_type or 'not named'}",
        f"targets      {targets or 'none'}",
        f"rank, alpha  r={told.r}, lora_alpha={told.lora_alpha:g} (of one expert, in the config)",
        f"size         {told.parameters:,} parameters with padding, {told.bytes:,} bytes, "
        f"{', '.join(told.dtypes)}",
        f"router       {_router(told.router)}",
    ]
    if told.router is not None and told.router.digest is not None:
        lines.append(f"digest       {told.router.digest}")
    lines += ["", table([_HEADINGS, *map(_row, told.experts)])]
    if told.measured is not None:
        lines += ["", *_loads(told, told.measured)]
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


def _loads(told: "Description", measured: "dict[str, int]") -> list[str]:
    """Who served how much of the text, in percent."""
    from moelora.cli.printing import table

    tokens = sum(measured.values())
    rows: list[tuple[object, ...]] = [("expert", "name", "load", "lowest", "highest", *measured)]
    for expert in told.experts:
        if expert.load is not None:
            shares = (expert.load.mean, expert.load.lowest, expert.load.highest)
            each = (*shares, *expert.load.domains.values())
            rows.append((expert.index, expert.name, *(_Percent(share) for share in each)))
    return [
        f"Load in % of the routing weight, measured on {tokens:,} tokens: the mean over routers,",
        "the lowest and the highest of a single router, and the mean in each domain",
        "",
        table(rows),
    ]


class _Percent(float):
    """A share that is written in percent."""

    def __str__(self) -> str:
        return f"{100 * self:.1f}"


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
