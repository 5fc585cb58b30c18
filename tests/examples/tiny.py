"""What the examples run on in tests: a tiny base with its tokenizer, and a few lines of text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.generation.words import word_tokenizer
from tests.lm import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def save_base(folder: Path, **sizes: Any) -> Path:
    """A base of 64 features, as quantisation asks for, with a tokenizer beside it."""
    base = tiny_llama(
        dtype=torch.float32,
        initializer_range=0.05,
        **{"hidden_size": 64, "intermediate_size": 128, **sizes},
    )
    base.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: int = 16) -> Path:
    """Lines of eight words that are easy to learn: each word follows from the one before."""
    text = [" ".join(f"w{(start + step) % 60 + 1}" for step in range(8)) for start in range(lines)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


_IN_TURN = """
import json, runpy, sys
for run in json.loads(sys.argv[1]):
    sys.argv[:] = run
    sys.path[0] = run[0].rpartition("/")[0]
    runpy.run_path(run[0], run_name="__main__")
    print("NEXT EXAMPLE", flush=True)
"""


def run_in_turn(*runs: tuple[object, ...]) -> list[str]:
    """What several examples print, run in one new Python, since starting it costs the most."""
    done = run_example("-c", _IN_TURN, json.dumps([list(map(str, run)) for run in runs]))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("NEXT EXAMPLE\n")[:-1]


def run_example(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example as a person would, in a new Python."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
