"""Triton's interpreter, which runs kernels where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from packaging.version import Version


def needs_interpreter() -> None:
    """Skip the calling test where Triton is missing, or interprets no kernels."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        # what comes with torch up to 2.11 turns arrays of one number into numbers
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4")
