"""Experts that bring router rows of their own, in every scope; and experts under Accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM

from moelora import ExpertManager, record_routing, update_optimizer
from tests.experts import output, routing_config, tensors_of, train
from tests.models import llama_config, randomise, token_ids
from tests.tolerances import assert_close, assert_equal

SCOPES = ["module", "layer", "model"]


def routed(scope: str, number: int = 2, **fields: Any) -> ExpertManager:
    torch.manual_seed(0)
    config = routing_config(router_scope=scope, **fields)
    experts = ExpertManager(LlamaForCausalLM(llama_config()), r=2, routing=config)
    for _ in range(number):
        experts.create_expert()
    randomise(experts.model)
    experts.model.eval()
    return experts


def logits_of(experts: ExpertManager, ids: Tensor) -> dict[str, Tensor]:
    """The router logits of each place."""
    with record_routing(experts.model) as record:
        output(experts, ids)
    return {name: routing.router_logits for name, routing in record.routing.items()}


@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize("scope", SCOPES)
def test_rows_of_a_new_expert_leave_the_logits_of_the_others(
    scope: str, hidden: int | None
) -> None:
    experts = routed(scope, router_hidden_size=hidden)
    ids = token_ids()
    before = logits_of(experts, ids)
    first = next(iter(before))
    experts.create_expert()
    after = logits_of(experts, ids)
    assert after.keys() == before.keys()
    # what later routers read depends on how the first ones weigh the experts
    assert_equal(after[first][:, :2], before[first])
    assert after[first].shape[-1] == 3


@pytest.mark.parametrize("scope", SCOPES)
def test_experts_come_and_go_and_change_names_in_every_scope(scope: str) -> None:
    experts = routed(scope, 3)
    ids = token_ids()
    experts.mark_mature()
    expected = output(experts, ids)
    experts.rename_expert(0, "first")
    assert_equal(output(experts, ids), expected)
    experts.remove_expert(experts.create_expert("short-lived"))
    assert_equal(output(experts, ids), expected)
    experts.remove_expert("first")
    assert experts.get_all_adapter_names() == ["expert_1", "expert_2"]
    output(experts, ids)
    experts.remove_expert(0)
    alone = output(experts, ids)
    experts.set_active_expert(0)
    assert_equal(output(experts, ids), alone)
    experts.create_expert("first")
    experts.activate_all_experts()
    output(experts, ids)


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_rows_stay_in_every_scope(scope: str) -> None:
    experts = routed(scope)
    optimizer = torch.optim.AdamW(experts.model.parameters(), lr=0.05, weight_decay=0.5)
    ids = token_ids()
    train(experts, optimizer, ids, labels=ids, loss=lambda result: result.loss)
    experts.freeze()
    experts.create_expert()
    update_optimizer(optimizer, experts.model)
    before = {name: tensors_of(experts, name) for name in experts.get_all_adapter_names()}
    train(experts, optimizer, ids, steps=10, labels=ids, loss=lambda result: result.loss)
    for name in ("expert_0", "expert_1"):
        assert_equal(list(tensors_of(experts, name).values()), list(before[name].values()))
    young = tensors_of(experts, "expert_2")
    routers = [key for key in young if key.endswith("lora_router.expert_2.weight")]
    assert routers
    assert any(not torch.equal(young[key], before["expert_2"][key]) for key in routers)


@pytest.mark.parametrize("scope", SCOPES)
def test_sets_come_back_in_every_scope(scope: str, tmp_path: Any) -> None:
    experts = routed(scope, 3)
    experts.mark_mature([0, 2])
    experts.save(tmp_path)
    torch.manual_seed(0)
    loaded = ExpertManager.load(LlamaForCausalLM(llama_config()), tmp_path)
    ids = token_ids()
    assert_equal(output(loaded, ids), output(experts, ids))
    assert [loaded.is_mature(e) for e in range(3)] == [True, False, True]
    assert loaded.routing is not None
    assert loaded.routing["router_scope"] == scope


def test_an_accelerated_optimiser_follows() -> None:
    experts = routed("module")
    accelerator = Accelerator(cpu=True)
    trained = [p for p in experts.model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(experts.model, torch.optim.AdamW(trained, lr=1e-2))
    ids = token_ids()

    def step() -> None:
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    step()
    before = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    experts.create_expert()
    joined = update_optimizer(optimizer, model)
    assert joined
    assert all(torch.equal(optimizer.state[p]["exp_avg"], before[id(p)]) for p in trained)
    step()
    assert all(p in optimizer.state for p in joined)


def test_weights_over_routed_experts_can_still_be_given() -> None:
    experts = routed("module")
    ids = token_ids()
    given = output(experts, ids, routing_weights=torch.tensor([0.0, 1.0]))
    experts.set_active_expert(1)
    assert_close(given, output(experts, ids))
