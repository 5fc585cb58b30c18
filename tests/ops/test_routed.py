"""The routed op, both implementations, against its definition."""

from __future__ import annotations

import pytest
import torch

from moelora.errors import BackendError
from moelora.ops import Choice, Member, RouterOptions, explain, routed_linears_inference
from tests.interpreter import run_interpreted
from tests.ops.routed_cases import (
    BESIDE,
    CASES,
    DROPPED,
    LOSSES,
    beside_bases,
    errors,
    with_dropout,
)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_eager_op_equals_the_reference_with_all_gradients(case: tuple, loss_type: str) -> None:
    assert all(error < 1e-7 for error in errors(case, loss_type, "eager", torch.float64))


@pytest.mark.parametrize("name", ["eager", "reference"])
@pytest.mark.parametrize(("tokens", "trains"), BESIDE)
def test_updates_alone_equal_the_reference(name: str, tokens: int, trains: bool) -> None:
    found = beside_bases(name, torch.float64, tokens=tokens, trains=trains)
    assert len(found) == (9 if trains else 2)
    assert all(error < 1e-7 for error in found)


@pytest.mark.parametrize("name", ["eager", "reference"])
@pytest.mark.parametrize(("tokens", "widths", "has_base", "wanted"), DROPPED)
def test_a_may_read_the_input_after_dropout(
    name: str, tokens: int, widths: tuple[int, ...], has_base: bool, wanted: tuple[bool, ...]
) -> None:
    found = with_dropout(
        name, torch.float64, tokens=tokens, widths=widths, has_base=has_base, wanted=wanted
    )
    assert len(found) == wanted[0] + len(widths) * (2 + sum(wanted[1:]))
    assert all(error < 1e-7 for error in found)


def test_inputs_after_dropout_are_refused_without_gradients() -> None:
    one = torch.ones(1, 1)
    member = Member(one, None, one, one, one, dropped=one)
    with pytest.raises(ValueError, match="after dropout belong to training"):
        routed_linears_inference(one, [member], options=RouterOptions(1, 1, 1.0, 1.0))


def test_the_kernels_equal_the_reference_with_all_gradients() -> None:
    finished = run_interpreted("tests.ops.routed_cases")
    assert finished.returncode == 0, finished.stderr[-3000:]


def _explained(**changes: object) -> Choice:
    sizes = {"device": "cpu", "dtype": torch.float32, "num_experts": 8, "top_k": 2, "rank": 16}
    return explain(**{**sizes, **changes})  # type: ignore[arg-type]


#: What is asked, and what comes: the backend, whether sparse, and a part of the reason.
RULE = [
    ({}, "eager", False, "needs a CUDA device, this is cpu"),
    ({"device": torch.device("cpu")}, "eager", False, "needs a CUDA device, this is cpu"),
    ({"device": "meta"}, "eager", False, "needs a CUDA device, this is meta"),
    ({"backend": "eager"}, "eager", False, "backend='eager' was asked for"),
    ({"device": "cuda", "backend": "eager"}, "eager", False, "backend='eager' was asked for"),
    ({"backend": "reference"}, "reference", False, "backend='reference' was asked for"),
    ({"device": "cuda"}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda:1"}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "backend": "triton"}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "dtype": torch.bfloat16}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "dtype": torch.float16}, "eager", False, "the input is torch.float16"),
    ({"device": "cuda", "dtype": torch.float64}, "eager", False, "the input is torch.float64"),
    # 300 ranks for each chosen expert: 600 with two
    ({"device": "cuda", "num_experts": 60, "rank": 10}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "num_experts": 61, "rank": 10}, "triton", True, "More than 300 ranks"),
    ({"device": "cuda", "num_experts": 64, "top_k": 4}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "num_experts": 64, "top_k": 1}, "triton", True, "More than 300 ranks"),
    ({"device": "cuda", "num_experts": 1, "top_k": 1}, "triton", False, "At most 300 ranks"),
    # the most that the kernels take, and one more
    ({"device": "cuda", "num_experts": 256}, "triton", True, "More than 300 ranks"),
    ({"device": "cuda", "num_experts": 257}, "eager", False, "got 257 and 2"),
    ({"device": "cuda", "num_experts": 32, "top_k": 16}, "triton", False, "At most 300 ranks"),
    ({"device": "cuda", "num_experts": 32, "top_k": 17}, "eager", False, "got 32 and 17"),
    ({"device": "cuda", "num_experts": 256, "rank": 64}, "triton", True, "More than 300 ranks"),
    ({"device": "cuda", "num_experts": 256, "rank": 65}, "eager", False, "got 32768"),
    # experts and rank are each padded to a power of two
    ({"device": "cuda", "num_experts": 129, "rank": 65}, "eager", False, "got 32768"),
]


@pytest.mark.parametrize(("asked", "backend", "is_sparse", "reason"), RULE, ids=str)
def test_the_rule_names_what_runs_and_why(
    asked: dict[str, object], backend: str, is_sparse: bool, reason: str
) -> None:
    pytest.importorskip("triton")
    choice = _explained(**asked)
    assert (choice.backend, choice.is_sparse) == (backend, is_sparse)
    assert reason in choice.reason


REFUSED = [row[0] for row in RULE if row[1] == "eager" and "backend" not in row[0]]


@pytest.mark.parametrize("asked", REFUSED, ids=str)
def test_what_auto_does_not_run_on_the_kernels_cannot_be_forced_onto_them(
    asked: dict[str, object],
) -> None:
    pytest.importorskip("triton")
    with pytest.raises(BackendError, match="backend='triton' cannot run: "):
        _explained(**asked, backend="triton")


def test_without_triton_a_gpu_runs_pytorchs_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    explain.cache_clear()
    with caplog.at_level("INFO", logger="moelora.ops.backend"):
        assert _explained(device="cuda", rank=7) == Choice("eager", "Triton is not installed.")
        assert _explained(device="cuda", rank=7).backend == "eager"
    # once, not at every layer
    assert caplog.text.count("Using PyTorch's operations instead of Triton's kernels") == 1
    with pytest.raises(BackendError, match="cannot run: Triton is not installed"):
        _explained(device="cuda", backend="triton")
    explain.cache_clear()


def test_an_interpreter_stands_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    explain.cache_clear()
    assert _explained(backend="triton").backend == "triton"
    assert _explained().backend == "eager"
    explain.cache_clear()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="backend must be one of .*'eager'.*, got 'fast'"):
        _explained(backend="fast")
