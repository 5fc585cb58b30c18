"""Explicit weights in half precision, under autocast, and over quantised layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import (
    LAYER_KINDS,
    Block,
    adapter_parameters,
    gradients,
    lora_config,
    lora_model,
    one_layer,
    randomise,
)
from tests.reference import experts_of, mixture_reference
from tests.tolerances import assert_close, assert_equal

ROWS, TOKENS = 2, 3

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("weight_dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["float32 adapters", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
def test_output_and_gradients_have_their_own_dtypes_and_are_close_to_float64(
    kind: str, dtype: torch.dtype, autocast_adapter_dtype: bool, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    chosen = LAYER_KINDS[kind]
    model = lora_model(
        Block(chosen.make()).to(dtype),
        [lora_config(), lora_config(r=4)],
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    randomise(model, std=0.3)
    x = chosen.draw(ROWS, TOKENS)
    x = x.to(dtype) if x.is_floating_point() else x
    weights = torch.rand((ROWS, TOKENS, 2) if chosen.per_token else (ROWS, 2)).to(weight_dtype)
    weights.requires_grad_()
    output = model(x, routing_weights=weights)
    assert output.dtype == dtype
    parameters = adapter_parameters(model)
    grads = gradients(output, [weights, *parameters])
    assert [g.dtype for g in grads if g is not None] == [weight_dtype] + [
        torch.float32 if autocast_adapter_dtype else dtype
    ] * len(parameters)

    exact = copy.deepcopy(model).double()
    layer = one_layer(exact)
    expected = mixture_reference(
        layer.base_layer,
        experts_of(layer, ["e0", "e1"], [1, 1]),
        x.double() if x.is_floating_point() else x,
        weights.double(),
    )
    # weights are exact numbers whatever their dtype: only the model's own may cost accuracy
    assert_close(output.double(), expected, dtype=dtype)


def test_a_model_in_autocast_keeps_the_base_layers_dtype() -> None:
    model = lora_model(Block(nn.Linear(6, 5)), [lora_config(), lora_config()])
    x, weights = torch.randn(2, 3, 6), torch.rand(2, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = one_layer(model).base_layer(x)
        output = model(x, routing_weights=weights)
    assert output.dtype == base.dtype
    assert_close(output, model(x, routing_weights=weights), dtype=torch.bfloat16, check_dtype=False)


# Quantised layers ------------------------------------------------------------------------------


def _quantised(bits: int) -> nn.Module:
    """A layer of bitsandbytes in a base that says so, as transformers leaves it."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer: Any = (
        bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    base = Block(layer.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = lora_model(base, [lora_config(), lora_config(r=3)])
    # small, so that sums over 64 features have terms below 1 as the table of tolerances asks
    randomise(model, std=0.1)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_equals_the_formula_over_its_own_output(bits: int) -> None:
    model = _quantised(bits)
    layer = one_layer(model)
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    x = torch.randn(ROWS, TOKENS, 64)
    weights = torch.randn(ROWS, TOKENS, 2, requires_grad=True)
    experts = experts_of(layer, ["e0", "e1"], [1, 1])
    expected = mixture_reference(layer.base_layer, experts, x, weights)
    output = model(x, routing_weights=weights)
    assert_close(output, expected)
    inputs = [weights, *adapter_parameters(model)]
    assert_close(gradients(output, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_with_zero_weights_is_the_base(bits: int) -> None:
    model = _quantised(bits)
    x = torch.randn(ROWS, TOKENS, 64)
    base = one_layer(model).base_layer(x)
    assert_equal(model(x, routing_weights=torch.zeros(2)), base)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_in_bfloat16_keeps_the_output_dtype(bits: int) -> None:
    model = _quantised(bits)
    x = torch.randn(ROWS, TOKENS, 64, dtype=torch.bfloat16)
    base = one_layer(model).base_layer(x)
    output = model(x, routing_weights=torch.rand(ROWS, TOKENS, 2, dtype=torch.float64))
    assert output.dtype == base.dtype == torch.bfloat16
