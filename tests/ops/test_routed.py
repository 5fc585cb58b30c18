"""The routed op, both implementations, against its definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moelora.errors import BackendError
from moelora.ops import Choice, explain
from tests.ops.routed_cases import CASES, LOSSES, errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_eager_op_equals_the_reference_with_all_gradients(case: tuple, loss_type: str) -> None:
    assert max(errors(case, loss_type, "eager", torch.float64)) < 1e-7


def test_the_kernels_equal_the_reference_with_all_gradients() -> None:
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.ops.routed_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def _explained(**changes: object) -> Choice:
    sizes = {"device": "cpu", "dtype": torch.float32, "num_experts": 8, "top_k": 2, "rank": 16}
    return explain(**{**sizes, **changes})  # type: ignore[arg-type]


def test_a_processor_runs_pytorchs_operations() -> None:
    assert _explained().backend == "eager"
    assert "needs a CUDA device" in _explained().reason


def test_a_gpu_runs_the_kernels_and_leaves_out_many_unchosen_experts() -> None:
    pytest.importorskip("triton")
    assert _explained(device="cuda", dtype=torch.bfloat16).backend == "triton"
    assert not _explained(device="cuda").is_sparse
    assert _explained(device="cuda", num_experts=64).is_sparse
    assert _explained(device="cuda", dtype=torch.float16).backend == "eager"


def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error() -> None:
    with pytest.raises(BackendError, match="backend='triton' cannot run: .*torch.float16"):
        _explained(device="cuda", dtype=torch.float16, backend="triton")
    with pytest.raises(BackendError, match="cannot run: The kernels take up to 256 experts"):
        _explained(device="cuda", num_experts=512, backend="triton")
    with pytest.raises(BackendError, match="backend must be one of .*'eager'.*, got 'fast'"):
        _explained(backend="fast")
