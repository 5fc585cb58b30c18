"""``moelora merge``: one plain LoRA for fixed weights, and its distance from the routing."""

import argparse
from typing import TYPE_CHECKING, Any

from moelora.cli.reading import quieten
from moelora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moelora import MergedExperts

DESCRIPTION = """\
Write one plain LoRA that mixes the experts with the same weights for every token. A routed mixture
does not, so the two differ; --data measures by how much, on text of yours. Without it --yes must
say that this may stay unknown (fixed routing merged with its own weights needs neither)."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora merge``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "merge",
        help="write one plain LoRA for fixed weights",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("mixture", help="folder or hub id of a mixture, or a folder of adapters")
    parser.add_argument(
        "--weights",
        metavar="W,W,...",
        help="one number per expert, as --weights=0.5,0.5 (default: those of fixed routing)",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="truncate to this rank (default: exact)"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text to measure the distance on: .txt, .jsonl or .json files, or folders of such",
    )
    parser.add_argument(
        "--field",
        action="append",
        metavar="NAME",
        help="field of a record that holds the text; repeat it to join several (default: text)",
    )
    parser.add_argument("--base", help="base model (default: the one that the mixture names)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4000,
        metavar="N",
        help="most tokens of each file to measure on (default: 4000)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=256,
        metavar="N",
        help="most tokens that the model reads at once (default: 256)",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--yes", action="store_true", help="merge although the distance stays unknown"
    )
    parser.add_argument("--force", action="store_true", help="replace an adapter that is in OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Merge.

    Args:
        arguments: as the parser returned them.

    Returns:
        0.

    Raises:
        ConfigError: if a number of the arguments is none, or the base model has no use.
    """
    weights = None if arguments.weights is None else _numbers(arguments.weights)
    for name in ("max_tokens", "max_length"):
        if getattr(arguments, name) < 2:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least 2, got {getattr(arguments, name)}."
            )
    if arguments.base is not None and arguments.data is None:
        raise ConfigError("--base is for measuring the distance and needs --data.")
    from moelora import merge_experts
    from moelora.cli.printing import to_json
    from moelora.new_folder import check_new_folder

    # before a base model is loaded, which takes its time
    check_new_folder(arguments.out, force=arguments.force, sources=[arguments.mixture])
    base_model, inputs = (None, []) if arguments.data is None else _measured_on(arguments)
    merged = merge_experts(
        arguments.mixture,
        arguments.out,
        weights=weights,
        rank=arguments.rank,
        base_model=base_model,
        inputs=inputs,
        unmeasured=arguments.yes,
        force=arguments.force,
        show_progress=True,
    )
    print(to_json(merged) if arguments.json else _told(merged))
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights must be numbers with commas, got {text!r}.") from None


def _measured_on(arguments: argparse.Namespace) -> "tuple[nn.Module, list[Tensor]]":
    """The base model, and the texts as token ids."""
    from moelora.report.passages import cut_passages, read_domains

    domains, _ = read_domains(arguments.data, fields=arguments.field or ("text",))
    quieten()
    import torch

    from moelora.report.loading import load_mixture

    loaded: Any = load_mixture([arguments.mixture], base=arguments.base, device=arguments.device)
    passages, _ = cut_passages(
        domains,
        loaded.tokenizer,
        max_tokens=arguments.max_tokens,
        max_length=arguments.max_length,
    )
    inputs = [torch.tensor([passage.ids]) for passage in passages if len(passage.ids) > 1]
    return loaded.model.unload(), inputs


def _told(merged: "MergedExperts") -> str:
    weights = ", ".join(f"{name} {weight:g}" for name, weight in merged.weights.items())
    lines = [f"{merged.folder}: a plain LoRA of rank {merged.r} with the weights {weights}"]
    if merged.truncation_error:
        lines.append(
            f"Truncating lost {merged.truncation_error:.2%} of the update (Frobenius), in the "
            f"worst layer {merged.worst_layer_error:.2%}."
        )
    distance = merged.distance
    if distance is not None:
        lines.append(
            f"Distance from the routed model on {distance.tokens} tokens: KL "
            f"{distance.mean_kl:.4g} nats per token (at most {distance.largest_kl:.4g}), loss "
            f"{distance.merged_loss:.4f} instead of {distance.routed_loss:.4f}, the same most "
            f"likely token for {distance.agreement:.1%}."
        )
    elif merged.exact:
        lines.append("It is the mixture: every token has these weights there too.")
    else:
        lines.append("Its distance from the routed model is unknown: it was not measured.")
    return "\n".join(lines)
