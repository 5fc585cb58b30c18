"""Explicit routing weights through every way to call a model, with their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from tests.lm import (
    explicit_weights,
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.tolerances import assert_close, assert_equal

SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])


@pytest.mark.parametrize("shape", [(2, 7, 2), (2, 1, 2), (2, 2), (2,), (2, 7, 2, 2)])
def test_every_form_equals_the_weights_handed_to_each_layer(shape: tuple[int, ...]) -> None:
    model = two_loras().eval()
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_layer = copy.deepcopy(model)
    for name, layer in lora_layers(by_layer).items():
        block = int(name.split("layers.")[1].split(".")[0])
        own = weights[:, :, block] if weights.ndim == 4 else weights
        if own.ndim == 2:
            own = own[:, None]
        per_token = own.expand(2, 7, 2)
        _use_per_token_sum(layer, per_token)
    expected = by_layer(token_ids()).logits
    assert_close(model(token_ids(), routing_weights=weights).logits, expected)


def _use_per_token_sum(layer: Any, weights: Tensor) -> None:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = layer.base_layer(x)
        for index, name in enumerate(("first", "second")):
            delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
            result = result + weights[..., index : index + 1] * delta
        return result

    layer.forward = forward


def test_weights_reach_the_layers_as_a_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = two_loras(), []
    forward = lora.Linear.forward

    def traced(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("routing_weights"))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", traced)
    weights = explicit_weights()
    model(token_ids(), routing_weights=weights)
    assert len(seen) == len(lora_layers(model))
    assert_equal(seen, [weights] * len(seen))


def test_without_weights_the_layers_get_no_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = two_loras(), []
    forward = lora.Linear.forward

    def traced(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append("routing_weights" in kwargs)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", traced)
    model(token_ids(), routing_weights=explicit_weights())
    seen.clear()
    model(token_ids())
    assert seen == [False] * len(lora_layers(model))


def test_a_layer_called_directly_obeys_the_keyword() -> None:
    model = two_loras()
    layer = next(iter(lora_layers(model).values()))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = layer.base_layer(x)
    for weight, name in zip(weights, ("first", "second"), strict=True):
        delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        expected = expected + weight * delta
    assert_close(layer(x, routing_weights=weights), expected)


@pytest.mark.parametrize("route", ["peft", "tuner", "base"])
def test_every_way_to_call_the_model_takes_the_argument(route: str) -> None:
    model = two_loras().eval()
    callee = {"peft": model, "tuner": model.base_model, "base": model.get_base_model()}[route]
    weights = explicit_weights()
    expected = model(token_ids(), routing_weights=weights).logits
    output = callee(input_ids=token_ids(), routing_weights=weights)
    assert_equal(output.logits, expected)


def test_an_injected_model_takes_the_argument() -> None:
    model = two_loras().eval()
    base = tiny_llama()
    inject_adapter_in_model(lora_config(), base, adapter_name="first")
    inject_adapter_in_model(lora_config(r=3), base, adapter_name="second")
    for layer in lora_layers(base).values():
        layer.set_adapter(["first", "second"])
    base.load_state_dict(model.get_base_model().state_dict())
    weights = explicit_weights()
    found = base.eval()(input_ids=token_ids(), routing_weights=weights).logits
    assert_equal(found, model(token_ids(), routing_weights=weights).logits)


@SCOPES
def test_an_injected_mixture_routes_by_itself(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    base = tiny_llama()
    inject_adapter_in_model(mixture_config(router_scope=scope), base)
    base.load_state_dict(model.get_base_model().state_dict())
    assert_equal(base.eval()(token_ids()).logits, model(token_ids()).logits)


def test_a_bare_tuner_takes_the_argument() -> None:
    model = two_loras().eval()
    tuner = LoraModel(tiny_llama(), {"first": lora_config()}, "first")
    tuner.inject_adapter(tuner.model, "first")
    perturb(tuner)
    weights = torch.tensor([0.5], dtype=torch.float64)
    found = tuner.eval()(input_ids=token_ids(), routing_weights=weights).logits
    model.base_model.set_adapter(["first"])
    model.get_base_model().load_state_dict(tuner.model.state_dict(), strict=False)
    assert_equal(found, model(token_ids(), routing_weights=weights).logits)


def test_none_is_pefts_behaviour() -> None:
    model = two_loras().eval()
    assert_equal(model(token_ids(), routing_weights=None).logits, model(token_ids()).logits)


def test_no_argument_is_written_to() -> None:
    model, ids, weights = two_loras(), token_ids(), explicit_weights()
    before = weights.clone()
    kwargs = {"input_ids": ids, "labels": ids.clone(), "routing_weights": weights}
    model(**kwargs)
    assert kwargs.keys() == {"input_ids", "labels", "routing_weights"}
    assert_equal([weights, ids], [before, token_ids()])


def test_embeddings_instead_of_tokens_take_weights_too() -> None:
    model, weights = two_loras().eval(), explicit_weights()
    embeds = model.get_input_embeddings()(token_ids())
    assert_equal(
        model(inputs_embeds=embeds, routing_weights=weights).logits,
        model(token_ids(), routing_weights=weights).logits,
    )


def test_disabled_adapters_with_weights_give_the_base() -> None:
    model = two_loras().eval()
    with model.disable_adapter():
        found = model(token_ids(), routing_weights=explicit_weights()).logits
    assert_equal(found, tiny_llama().eval()(token_ids()).logits)


class TwoLinears(nn.Module):
    """A model that computes in float64 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).tanh())
        return hidden


@pytest.mark.parametrize("factor", [1.0, 0.0])
@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 1, 2), (2, 2), (2,)])
def test_gradients_of_input_and_weights_equal_finite_differences_at_zero_too(
    shape: tuple[int, ...], factor: float
) -> None:
    torch.manual_seed(0)
    config = lora_config(target_modules=["first", "second"], task_type=None)
    model = get_peft_model(TwoLinears(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    perturb(model)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = (factor * torch.randn(*shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: model(x, routing_weights=w), (x, weights))
