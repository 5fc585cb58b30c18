"""The operators that stand for the routed op in a trace: their values, gradients and shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.interpreter import needs_interpreter

ROOT = Path(__file__).resolve().parents[2]


def test_the_operators_equal_the_reference_and_keep_what_compilers_rely_on() -> None:
    needs_interpreter()
    finished = subprocess.run(
        [sys.executable, "-m", "tests.ops.traced_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
