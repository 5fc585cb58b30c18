"""``torch.compile`` takes layers and models whole, and once for all lengths."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moelora.fused_layer import narrow_combine, narrows
from moelora.ops import lora_combine_reference
from tests.compile_cases import CASES, LENGTHS, ON_KERNELS
from tests.interpreter import needs_interpreter
from tests.lm import lora_layers, mixture, run_python, tiny_llama
from tests.tracing import needs_model_tracing


def cases(*left_out: str) -> list[Any]:
    """The cases, those of whole models where these can be traced."""
    return [
        pytest.param(name, marks=() if name == "one_layer" else needs_model_tracing)
        for name in CASES
        if name not in left_out
    ]


def results_of(code: str) -> dict[str, Any]:
    """What the cases gave, in a process without the shape checks of this one."""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line for line in finished.stdout.splitlines() if line.startswith("CASE ")]
    results = [json.loads(line.removeprefix("CASE ")) for line in lines]
    return {each["case"]: each for each in results}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All cases; the shape checks of this process cannot be traced."""
    return results_of("from tests.compile_cases import main; main()")


@pytest.fixture(scope="module")
def on_kernels() -> dict[str, Any]:
    """The cases of Triton's kernels, in its interpreter."""
    needs_interpreter()
    interpreted = 'import os; os.environ["TRITON_INTERPRET"] = "1"; '
    return results_of(interpreted + "from tests.compile_cases import *; main(ON_KERNELS)")


@pytest.mark.parametrize("case", cases())
def test_it_compiles_without_a_graph_break_and_computes_the_same(
    case: str, found: dict[str, Any]
) -> None:
    assert "failed" not in found[case], found[case]["failed"]
    assert found[case]["breaks"] == {}
    # an error relative to the norm; of wide parameters, one relative to that without compilation
    assert found[case]["error"] < (2.0 if case == "wide_parameters" else 1e-5)


@pytest.mark.parametrize("case", cases("wide_parameters", "generation"))
def test_a_second_length_makes_the_last_graph(case: str, found: dict[str, Any]) -> None:
    assert found[case]["graphs"] == [1, *[2] * (len(LENGTHS) - 1)]


@needs_model_tracing
@pytest.mark.parametrize("case", ON_KERNELS)
def test_the_kernels_are_operators_of_one_graph_and_compute_the_same(
    case: str, on_kernels: dict[str, Any]
) -> None:
    assert "failed" not in on_kernels[case], on_kernels[case]["failed"]
    assert on_kernels[case]["breaks"] == {}
    # of seven layers in a block; a query whose input changes, and key and value after it
    assert set(on_kernels[case]["operators"]) == {4 if case == "together" else 2}
    assert on_kernels[case]["error"] < 1e-5
    assert on_kernels[case]["graphs"] in ([1], [1, 2, 2])


@needs_model_tracing
def test_wide_parameters_were_computed_with_in_the_inputs_dtype(found: dict[str, Any]) -> None:
    assert found["wide_parameters"]["seen"]


@needs_model_tracing
def test_decoding_with_a_static_cache_was_compiled(found: dict[str, Any]) -> None:
    # whole prompt and single tokens; transformers compiles the second only
    assert found["generation"]["graphs"] == [1]


def test_only_a_compiled_bfloat16_layer_on_a_gpu_narrows_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = next(iter(lora_layers(mixture(tiny_llama(dtype=torch.bfloat16)).eval()).values()))
    same = next(iter(lora_layers(mixture(tiny_llama(dtype=torch.float64)).eval()).values()))
    for parameters in (same.lora_A, same.lora_B):
        parameters["default"].to(torch.bfloat16)
    with FakeTensorMode():
        x = torch.empty(2, 16, dtype=torch.bfloat16, device="cuda")
        assert not narrows(wide, "default", x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert narrows(wide, "default", x)
        assert not narrows(wide, "default", x.float())
        assert not narrows(wide, "default", x.cpu())
        wide.lora_dropout["default"] = torch.nn.Dropout(0.5).train()
        assert not narrows(wide, "default", x)
        wide.lora_dropout["default"].eval()
        assert narrows(wide, "default", x)
        wide.lora_A["default"].register_forward_hook(lambda *_: None)
        assert not narrows(wide, "default", x)
        assert not narrows(same, "default", x)


def test_a_narrowed_update_is_as_exact_as_its_dtype() -> None:
    x, a, b = torch.randn(9, 16), torch.randn(6, 16), torch.randn(7, 6)
    weights = torch.rand(9, 3)
    expected = lora_combine_reference(
        x.bfloat16().double(), a.double(), b.double(), weights.double()
    )
    found = narrow_combine(x.bfloat16(), a, b, weights)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()


@needs_model_tracing
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_on_a_gpu_has_the_gradients_of_a_plain_one(mode: str) -> None:
    finished = run_python(f"from tests.compile_cases import on_gpu; on_gpu({mode!r})")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout.splitlines()[-1])["error"] < 1e-4
