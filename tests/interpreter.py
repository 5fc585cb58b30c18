"""Triton's interpreter, which runs kernels where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version


def needs_interpreter() -> None:
    """Skip the calling test where Triton is missing, or interprets no kernels."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        # what comes with torch up to 2.11 turns arrays of one number into numbers
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4")


def run_interpreted(module: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this repository as a script of a process that interprets kernels.

    Skips the calling test where that is not possible.
    """
    needs_interpreter()
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
