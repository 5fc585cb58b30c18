"""ExpertManager: records, and what is refused without changing anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from moelora import (
    CheckpointError,
    ConfigError,
    ExpertManager,
    MoELoraConfig,
    RoutingWeightsError,
    UnsupportedLayerError,
)
from tests.experts import Plain, manager, output, routing_config
from tests.models import llama_config, token_ids, unchecked_types

# Records ---------------------------------------------------------------------------------------


def test_records_count_steps_and_tokens() -> None:
    experts = manager(1)
    experts.update_record(0, skill="sql", add_steps=3, add_tokens=100)
    record = experts.update_record(0, add_steps=2, extra={"data": ["a", 1]})
    assert (record.skill, record.steps, record.tokens_seen) == ("sql", 5, 100)
    assert record.extra == {"data": ["a", 1]}
    experts.freeze(0)
    experts.mark_mature(0)
    assert (experts.record(0).frozen, experts.record(0).mature) == (True, True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mature": True}, "mature is set by mark_mature"),
        ({"frozen": True}, "frozen is set by"),
        ({"colour": "red"}, "A record has the fields skill, steps, .* got 'colour'"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"tokens_seen": 1.5}, "tokens_seen must be an integer of at least 0, got 1.5"),
        ({"add_steps": 0.5}, "add_steps must be an integer, got 0.5"),
        ({"add_tokens": -1}, "tokens_seen must be an integer of at least 0, got -1"),
        ({"skill": 3}, "skill must be a string or None, got 3"),
        ({"created": "yesterday"}, "created must be a date in ISO 8601, got 'yesterday'"),
        ({"extra": {"x": object()}}, "extra must be a dict that JSON can hold"),
        ({"extra": {"x": float("nan")}}, "extra must be a dict that JSON can hold"),
    ],
)
def test_wrong_records_are_refused(changes: dict[str, Any], match: str) -> None:
    experts = manager(1)
    before = experts.record(0)
    with unchecked_types(), pytest.raises(ConfigError, match=match):
        experts.update_record(0, **changes)
    assert experts.record(0) == before


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.create_expert("expert_0"), ConfigError, "There is an expert 'expert_0' alre"),
        (lambda m: m.create_expert("a/b"), CheckpointError, "must be a plain folder name"),
        (lambda m: m.create_expert(".."), CheckpointError, "must be a plain folder name"),
        (lambda m: m.create_expert(""), CheckpointError, "must be a plain folder name"),
        (lambda m: m.create_expert("a.b"), ConfigError, "must hold no '.', not start with 'lora_'"),
        (lambda m: m.create_expert("lora_x"), ConfigError, "must hold no '.', not start with"),
        (lambda m: m.create_expert("keys"), ConfigError, "be no attribute of nn.ModuleDict"),
        (lambda m: m.create_expert("q_proj"), ConfigError, "modules of the model are named so"),
        (lambda m: m.create_expert("0"), ConfigError, "modules of the model are named so"),
        (lambda m: m.create_expert("weight"), ConfigError, "modules of the model are named so"),
        (lambda m: m.create_expert(3), ConfigError, "name must be a string, got 3"),
        (lambda m: m.create_expert(r=0), ConfigError, "r must be an integer of at least 1, got 0"),
        (lambda m: m.create_expert(r=2.5), ConfigError, "r must be an integer of at least 1"),
        (lambda m: m.create_expert(lora_alpha="x"), ConfigError, "lora_alpha must be a finite"),
        (lambda m: m.create_expert(lora_dropout=1.0), ConfigError, r"must be a number in \[0, 1\)"),
        (lambda m: m.create_expert(rank=3), ConfigError, "LoraConfig has no field 'rank'"),
        (lambda m: m.create_expert(bias="all"), ConfigError, "must have bias='none', got 'all'"),
        (
            lambda m: m.create_expert(modules_to_save=["lm_head"]),
            ConfigError,
            r"cannot have modules_to_save=\['lm_head'\]",
        ),
        (
            lambda m: m.create_expert(init_lora_weights="pissa"),
            ConfigError,
            "must have init_lora_weights True, False or one of gaussian, eva, orthogonal, got",
        ),
        (
            lambda m: m.create_expert(layer_replication=[(0, 2)]),
            ConfigError,
            "cannot have layer_replication=",
        ),
        (lambda m: m.create_expert(layers_pattern="x"), ConfigError, "config is wrong: When"),
        (lambda m: m.create_expert(target_modules=["nowhere"]), ValueError, "nowhere"),
        (lambda m: m.set_active_expert(2), ConfigError, r"id in \[0, 2\), got 2"),
        (lambda m: m.set_active_expert(-1), ConfigError, r"id in \[0, 2\), got -1"),
        (lambda m: m.set_active_expert(True), ConfigError, "got True"),
        (lambda m: m.set_active_expert("x"), ConfigError, "one of .* got 'x'"),
        (lambda m: m.freeze([0, 5]), ConfigError, "got 5"),
        (lambda m: m.unfreeze("x"), ConfigError, "got 'x'"),
        (lambda m: m.mark_mature([1, "x"]), ConfigError, "got 'x'"),
        (lambda m: m.rename_expert(0, "expert_1"), ConfigError, "There is an expert 'expert_1'"),
        (lambda m: m.rename_expert(0, "layers"), ConfigError, "modules of the model are named so"),
        (lambda m: m.remove_expert("x"), ConfigError, "got 'x'"),
        (lambda m: m.record(9), ConfigError, "got 9"),
        (lambda m: m.columns_of(9), ConfigError, "got 9"),
        (lambda m: m.add_router(top_k=0), ConfigError, "top_k must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_changes_nothing(call: Any, error: type[Exception], match: str) -> None:
    experts = manager(2)
    before, active = experts.model.state_dict(), experts.active_experts
    flags = [p.requires_grad for p in experts.model.parameters()]
    with unchecked_types(), pytest.raises(error, match=match):
        call(experts)
    after = experts.model.state_dict()
    assert list(after) == list(before)
    assert experts.active_experts == active
    assert [p.requires_grad for p in experts.model.parameters()] == flags
    assert experts.get_all_adapter_names() == ["expert_0", "expert_1"]
    output(experts, token_ids(), routing_weights=torch.ones(2))


def test_a_first_expert_that_cannot_be_made_leaves_the_base_as_it_was() -> None:
    base = LlamaForCausalLM(llama_config())
    names = [name for name, _ in base.named_modules()]
    experts = ExpertManager(base, target_modules=["nowhere"])
    with pytest.raises(ValueError, match="nowhere"):
        experts.create_expert()
    assert [name for name, _ in base.named_modules()] == names
    assert experts.model is base
    experts.create_expert(target_modules=["q_proj"])
    assert experts.active_experts == ["expert_0"]


def test_the_last_expert_stays() -> None:
    experts = manager(1)
    with pytest.raises(ConfigError, match="'expert_0' is the only expert and cannot be removed"):
        experts.remove_expert(0)


@pytest.mark.parametrize("call", ["activate_all_experts", "add_router"])
def test_without_experts_there_is_nothing_to_do(call: str) -> None:
    experts = ExpertManager(Plain(), target_modules=["first"])
    assert (experts.active_experts, experts.current_expert_id) == ([], None)
    with pytest.raises(ConfigError, match="There are no experts yet"):
        getattr(experts, call)()


def test_an_automatic_router_over_routed_experts_is_refused() -> None:
    experts = manager(2, routed=True)
    with pytest.raises(UnsupportedLayerError, match="bring router rows of their own"):
        experts.add_router(moe_config=MoELoraConfig(num_experts=2))


def test_weights_of_another_number_of_experts_are_refused() -> None:
    experts = manager(2)
    with pytest.raises(RoutingWeightsError, match="must have E=2 experts"):
        experts.model(token_ids(), routing_weights=torch.ones(3))


def prompt_model() -> nn.Module:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(LlamaForCausalLM(llama_config()), config)


def injected_model() -> nn.Module:
    base = LlamaForCausalLM(llama_config())
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return base


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: "model", TypeError, "model must be a torch.nn.Module, got str"),
        (prompt_model, UnsupportedLayerError, "needs LoRA adapters"),
        (
            lambda: PeftMixedModel(LlamaForCausalLM(llama_config()), LoraConfig(r=2)),
            UnsupportedLayerError,
            "needs a base model or a PeftModel, got PeftMixedModel",
        ),
        (lambda: manager(1).model.base_model, UnsupportedLayerError, "got LoraModel"),
        (injected_model, UnsupportedLayerError, "has adapters injected into it"),
        (
            lambda: get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig(bias="all")),
            ConfigError,
            "Adapter 'default' must have bias='none', got 'all'",
        ),
    ],
)
def test_models_that_cannot_be_managed_are_refused(model: Any, error: Any, match: str) -> None:
    made = model()
    with unchecked_types(), pytest.raises(error, match=match):
        ExpertManager(made)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"r": 0}, ConfigError, "r must be an integer"),
        ({"bias": "lora_only"}, ConfigError, "must have bias='none'"),
        ({"rank": 4}, ConfigError, "LoraConfig has no field 'rank'"),
        ({"routing": LoraConfig()}, TypeError, "routing must be a MoELoraConfig or None"),
        (
            {"routing": MoELoraConfig(router_type="fixed")},
            ConfigError,
            "routing needs a learned router",
        ),
        ({"routing": routing_config(), "use_dora": True}, ConfigError, "use_dora is not supported"),
    ],
)
def test_wrong_defaults_are_told_at_once(fields: Any, error: Any, match: str) -> None:
    with unchecked_types(), pytest.raises(error, match=match):
        ExpertManager(Plain(), target_modules=["first"], **fields)
