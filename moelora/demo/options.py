"""What a demo run can be told, and the checks that need no heavy import."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from moelora.demo.errors import DemoError

RESULTS_FILE = "results.json"
SHORTEST_TEXT = 16


@dataclass(frozen=True)
class DemoOptions:
    """The arguments of one demo run, checked.

    Args:
        out: folder to write; replaced if it holds an earlier demo, refused if it holds else.
        model: Hugging Face model folder or name; None is the packaged SmolLM2-135M-Instruct.
        data: folder of skills; None builds the demo's own four.
        steps: optimiser steps, the same number for every adapter.
        experts: experts in each adapted layer.
        top_k: experts that serve a token.
        rank: rank of one expert.
        max_length: longest text in tokens, prompt and completion together.
        seed: drives the choice of data, the order of batches and the initial weights.
        device: a torch device name.
        compare_total_rank: also train one plain LoRA of rank ``experts * rank``.

    Raises:
        DemoError: if a number is out of its range.
    """

    out: Path
    model: str | None = None
    data: Path | None = None
    steps: int = 90
    experts: int = 4
    top_k: int = 2
    rank: int = 8
    max_length: int = 128
    seed: int = 0
    device: str = "cpu"
    compare_total_rank: bool = False

    def __post_init__(self) -> None:
        """Check every number against its range."""
        _check_least("--steps", self.steps, 1)
        _check_least("--experts", self.experts, 2)
        _check_least("--rank", self.rank, 1)
        _check_least("--max-length", self.max_length, SHORTEST_TEXT)
        _check_least("--seed", self.seed, 0)
        if not 1 <= self.top_k <= self.experts:
            raise DemoError(
                f"--top-k must be between 1 and --experts={self.experts}, got {self.top_k}."
            )


def _check_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise DemoError(f"{flag} must be at least {least}, got {value}.")


def check_out(out: Path) -> None:
    """Refuse an output folder that cannot be written, or whose content is not a demo's.

    Args:
        out: the folder that a run will create or replace.

    Raises:
        DemoError: if ``out`` is a file, is a folder with other content, or cannot be created.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DemoError(f"--out must be a folder to create or replace, but {out} is a file.")
    if out.is_dir() and not (out / RESULTS_FILE).is_file() and any(out.iterdir()):
        raise DemoError(
            f"--out {out} holds files that no demo wrote; name a new folder or empty this one."
        )
    home = next(p for p in out.absolute().parents if p.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise DemoError(f"--out {out} cannot be written: {home} is not a writable folder.")


def check_packages(*needed: str) -> None:
    """Refuse to start a run that would miss a package at its end.

    Args:
        needed: names of modules to find.

    Raises:
        DemoError: naming the modules that are not installed and how to install them.
    """
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"The demo needs {', '.join(missing)}: run `make demo`, "
            "or `pip install 'moelora[demo]'` for its picture."
        )
