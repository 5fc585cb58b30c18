"""Experts that come one at a time: adapters of one expert each, routed together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moelora import ConfigError, MoELoraConfig, mark_mature, record_routing
from tests.lm import (
    captured_inputs,
    lora_config,
    lora_layers,
    mixture_config,
    perturb,
    tiny_llama,
    token_ids,
    trainable,
)
from tests.test_generation import generated
from tests.tolerances import assert_close, assert_equal

SCOPES = ["module", "layer", "model"]
TEMPERATURE = 2.0


def expert_config(**fields: Any) -> MoELoraConfig:
    return mixture_config(**{"num_experts": 1, "top_k_experts": 2, "joins_mixture": True, **fields})


def experts(number: int, **fields: Any) -> PeftModel:
    """Adapters ``e0`` ..., of unequal rank, all active and mature."""
    model = get_peft_model(tiny_llama(), expert_config(r=2, **fields), adapter_name="e0")
    for index in range(1, number):
        model.add_adapter(f"e{index}", expert_config(r=2 + index, **fields))
    model.base_model.set_adapter([f"e{index}" for index in range(number)])
    perturb(model)
    return model.eval()


def by_hand(layer: Any, x: Tensor, names: list[str], *, top_k: int | None) -> Tensor:
    """The layer's output in plain torch; None for dense routing."""
    rows = torch.cat([layer.lora_router[name].weight for name in names])
    logits = x @ rows.T / TEMPERATURE
    if top_k is not None:
        threshold = logits.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        logits = torch.where(logits >= threshold, logits, float("-inf"))
    weights = logits.softmax(-1)
    result = layer.base_layer(x)
    for index, name in enumerate(names):
        delta = x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
        result = result + weights[..., index, None] * layer.scaling[name] * delta
    return result


@pytest.mark.parametrize("top_k", [2, 3])
def test_single_experts_are_routed_together_in_every_layer(top_k: int) -> None:
    model = experts(3, top_k_experts=top_k)
    for layer in lora_layers(model).values():
        x = torch.randn(2, 5, layer.base_layer.in_features, dtype=torch.float64)
        expected = by_hand(layer, x, ["e0", "e1", "e2"], top_k=top_k)
        assert_close(layer(x), expected, dtype=torch.float32)


def test_top_k_is_at_most_the_number_of_active_experts() -> None:
    model = experts(2, top_k_experts=5)
    layer = next(iter(lora_layers(model).values()))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_close(layer(x), by_hand(layer, x, ["e0", "e1"], top_k=2), dtype=torch.float32)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_expert_alone_equals_the_plain_lora_to_the_bit(scope: str) -> None:
    model = experts(2, router_scope=scope, expert_capacity_factor=0.25)
    plain = get_peft_model(tiny_llama(), lora_config(r=3), adapter_name="e1")
    own = {name: t for name, t in model.state_dict().items() if ".e1." in name}
    plain.load_state_dict({k: t for k, t in own.items() if ".lora_router." not in k}, strict=False)
    model.set_adapter("e1")
    ids = token_ids()
    for mode in (True, False):
        model.train(mode)
        plain.train(mode)
        mine, its = model(ids, labels=ids), plain(ids, labels=ids)
        assert_equal(mine.logits, its.logits)
        assert_equal(mine.loss, its.loss)
        assert "aux_loss" not in mine


@pytest.mark.parametrize("scope", SCOPES)
def test_a_new_expert_leaves_every_older_tensor_as_it_was(scope: str) -> None:
    model = experts(2, router_scope=scope)
    before = {name: (t, t.clone()) for name, t in model.named_parameters()}
    model.add_adapter("e2", expert_config(r=5, router_scope=scope))
    after = dict(model.named_parameters())
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert_equal(tensor, value)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_later_expert_makes_routing_dense_until_it_is_mature(scope: str) -> None:
    fields = {"router_scope": scope, "router_type": "learned_with_maturity", "top_k_experts": 1}
    model = get_peft_model(tiny_llama(), expert_config(**fields), adapter_name="e0")
    model.add_adapter("e1", expert_config(**fields))
    model.base_model.set_adapter(["e0", "e1"])
    perturb(model)
    model.eval()

    def active_share() -> float:
        with record_routing(model) as record:
            model(token_ids())
        weights = [routing.routing_weights for routing in record.routing.values()]
        return float((torch.cat(weights) > 0).float().mean())

    assert active_share() == 1.0
    mark_mature(model, "e1")
    assert active_share() == 0.5


def test_the_first_expert_starts_mature() -> None:
    config = expert_config(router_type="learned_with_maturity")
    model = get_peft_model(tiny_llama(), config, adapter_name="e0")
    model.add_adapter("e1", config)
    router = next(iter(lora_layers(model).values())).lora_router
    assert (bool(router["e0"].mature), bool(router["e1"].mature)) == (True, False)


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_experts_and_their_router_rows_do_not_move(scope: str) -> None:
    model = experts(3, router_scope=scope).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".e2." in name)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    ids = token_ids()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == set(trainable(model))


@pytest.mark.parametrize("scope", SCOPES)
def test_generation_with_a_cache_equals_generation_without(scope: str) -> None:
    model = experts(3, router_scope=scope)
    with_cache, without = (generated(model, token_ids(), use_cache=use) for use in (True, False))
    assert_equal(with_cache, without)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(scope: str, use_reentrant: bool) -> None:
    ids = token_ids()
    gradients = []
    for checkpointing in (False, True):
        model = experts(2, router_scope=scope).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in trainable(model).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain, dtype=torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_expert_alone_can_be_recomputed_in_backward(use_reentrant: bool) -> None:
    model = experts(2, router_scope="layer").train()
    model.set_adapter("e0")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    moved = {name for name, p in trainable(model).items() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in trainable(model) if ".lora_router." not in name}


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_experts_load_with_their_router_rows_and_maturity(scope: str, tmp_path: Path) -> None:
    model = experts(3, router_scope=scope, router_type="learned_with_maturity")
    mark_mature(model, "e1")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "e0"), adapter_name="e0")
    for name in ("e1", "e2"):
        loaded.load_adapter(str(tmp_path / name), adapter_name=name)
    loaded.base_model.set_adapter(["e0", "e1", "e2"])
    state = model.state_dict()
    assert {k for k, t in loaded.state_dict().items() if not torch.equal(t, state[k])} == set()
    assert loaded.peft_config["e2"].joins_mixture
    assert_equal(loaded.eval()(token_ids()).logits, model(token_ids()).logits)


def test_an_expert_in_fewer_layers_is_routed_where_it_is() -> None:
    model = get_peft_model(tiny_llama(), expert_config(), adapter_name="e0")
    model.add_adapter("e1", expert_config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["e0", "e1"])
    perturb(model)
    with captured_inputs(model) as inputs, record_routing(model) as record:
        model.eval()(token_ids())
    assert {name.rpartition(".")[2] for name in record.routing} == {"q_proj"}
    name, layer = next((n, m) for n, m in lora_layers(model).items() if n.endswith("v_proj"))
    x = inputs[name]
    delta = x @ layer.lora_A["e0"].weight.T @ layer.lora_B["e0"].weight.T * layer.scaling["e0"]
    assert_close(layer(x), layer.base_layer(x) + delta, dtype=torch.float64)


def test_a_block_weighs_an_expert_that_a_layer_lacks() -> None:
    model = get_peft_model(tiny_llama(), expert_config(router_scope="layer"), adapter_name="e0")
    only_q = expert_config(router_scope="layer", target_modules=["q_proj"])
    model.add_adapter("e1", only_q)
    model.base_model.set_adapter(["e0", "e1"])
    perturb(model)
    with record_routing(model) as record, captured_inputs(model) as inputs:
        model.eval()(token_ids())
    name, layer = next((n, m) for n, m in lora_layers(model).items() if n.endswith("v_proj"))
    weights = next(iter(record.routing.values())).routing_weights[:, :1].reshape(2, 7, 1)
    x = inputs[name]
    delta = x @ layer.lora_A["e0"].weight.T @ layer.lora_B["e0"].weight.T * layer.scaling["e0"]
    outputs: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _m, _a, output: outputs.__setitem__("v", output))
    model(token_ids())
    assert_close(outputs["v"], layer.base_layer(x) + weights * delta, dtype=torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 1}, r"num_experts must be an integer in \[2, .* got 1"),
        ({"num_experts": 0, "joins_mixture": True}, r"num_experts must be .*\[1, .* got 0"),
        ({"joins_mixture": "yes"}, r"joins_mixture must be True or False, got 'yes'"),
        (
            {"joins_mixture": True, "router_type": "fixed"},
            r"joins_mixture=True needs a learned router, got router_type='fixed'",
        ),
        ({"joins_mixture": True, "top_k_experts": 0}, r"top_k_experts must be .* got 0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoELoraConfig(**fields)
