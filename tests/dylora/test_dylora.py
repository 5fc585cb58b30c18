"""DyLoRA-MoE in ``examples/dylora``; the names are those of DyLoRA's own plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from examples.dylora import DyLoRAMoE
from moelora import ConfigError, record_routing
from tests.dylora.tiny import (
    BASES,
    counting,
    llama,
    optimizer_of,
    randomise,
    token_ids,
    trainable,
)
from tests.tolerances import assert_close, assert_equal

SCOPES = ["module", "model"]


def dylora(num_experts: int = 3, *, base: str = "llama", **options: Any) -> DyLoRAMoE:
    """A model whose experts and routers are far from their initial values."""
    torch.manual_seed(0)
    defaults = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    model = DyLoRAMoE(BASES[base](), num_experts=num_experts, **{**defaults, **options})
    randomise(model)
    return model.eval()


def parameters_of(model: DyLoRAMoE, expert: str) -> dict[str, Tensor]:
    """An expert's tensors, its router rows among them."""
    return {n: p for n, p in model.named_parameters() if f".{expert}." in f"{n}."}


# The whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scope", SCOPES)
def test_training_convergence_small_dataset(base: str, scope: Any) -> None:
    """100 samples, 10 steps: the loss falls, the router learns, nothing is NaN."""
    torch.manual_seed(0)
    model = DyLoRAMoE(BASES[base](), num_experts=4, lora_r=8, lora_dropout=0.0, router_scope=scope)
    routers = {n: p.detach().clone() for n, p in trainable(model).items() if ".lora_router." in n}
    others = {n: p.detach().clone() for n, p in trainable(model).items() if n not in routers}
    data = counting(100)
    optimizer = optimizer_of(model.train(), lr=5e-2)
    losses = []
    for step in range(10):
        rows = data[step * 10 : (step + 1) * 10]
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.last_lm_loss))
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0] - 0.3
    now = dict(model.named_parameters())
    moved = {n for n, before in routers.items() if not torch.equal(now[n], before)}
    assert moved == set(routers)
    assert all(not torch.equal(now[n], before) for n, before in others.items())
    model.eval()(data[:4])
    share = model.last_routing_weights.sum(-1)
    assert_close(share, torch.ones_like(share))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("training", [False, True])
def test_single_expert_unchanged(scope: Any, training: bool) -> None:
    """One expert is PEFT's LoRA to the bit: no routing, no balancing loss, no first pass."""
    model = dylora(1, router_scope=scope)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")
    plain = get_peft_model(llama(), config, adapter_name="expert_0")
    state = {k: v for k, v in model.foundation_model.state_dict().items() if "router" not in k}
    plain.load_state_dict(state)
    ids = token_ids()
    mine = model.train(training)(ids, labels=ids)
    its = plain.train(training)(input_ids=ids, labels=ids)
    assert_equal(mine.logits, its.logits)
    assert_equal(mine.loss, its.loss)
    assert model.last_routing_weights is None
    assert model.last_balance_loss is None
    mine.loss.backward()
    its.loss.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        assert_equal(model.foundation_model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("scope", SCOPES)
def test_expert_id_training(scope: Any) -> None:
    """Given an expert, only its tensors move, and the output is that of the expert alone."""
    model = dylora(3, router_scope=scope).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = token_ids()
    for _ in range(3):
        model(ids, labels=ids, expert_id=1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in parameters_of(model, "expert_1") if ".lora_router." not in n}
    assert model.last_routing_weights is None
    assert_equal(
        model(ids, expert_id=1).logits,
        model(ids, expert_id="expert_1").logits,
    )
    model(ids, labels=ids)
    assert model.last_routing_weights.shape == (2, 12, 3)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_expert_given_by_id_equals_that_weight_alone(scope: Any) -> None:
    # float32 sums of two ways differ by processor
    model, ids = dylora(3, router_scope=scope).double(), token_ids()
    for index in range(3):
        alone = model(ids, expert_id=index).logits
        model.expert_manager.activate_all_experts()
        one_hot = torch.eye(3, dtype=torch.float64)[index]
        assert_close(model.foundation_model(ids, routing_weights=one_hot).logits, alone)


@pytest.mark.parametrize("scope", SCOPES)
def test_load_balancing_loss_computation(scope: Any) -> None:
    """``mean over routers of E * sum_e f_e P_e`` over real tokens, times its coefficient."""
    model = dylora(3, router_scope=scope, balance_coefficient=0.7).train()
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with record_routing(model.foundation_model) as record:
        outputs = model(ids, attention_mask=mask, labels=labels)
    real = mask.flatten().bool()
    losses = []
    for routing in record.routing.values():
        probs = routing.router_probs[real].double()
        share = torch.zeros(3, dtype=torch.float64)
        for experts in routing.selected_experts[real].tolist():
            for expert in experts:
                share[expert] += 1 / (2 * int(real.sum()))
        losses.append(3 * (share * probs.mean(dim=0)).sum())
    expected = torch.stack(losses).mean()
    assert_close(model.last_balance_loss.double(), expected, dtype=torch.float32)
    logits = outputs.logits[:, :-1].double()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    lm_loss = -log_probs[labels[:, 1:] != -100].mean()
    assert_close(model.last_lm_loss.double(), lm_loss, dtype=torch.float32)
    assert_close(outputs.loss.double(), lm_loss + 0.7 * expected, dtype=torch.float32)


def test_the_balancing_loss_evens_the_use_of_experts() -> None:
    data = counting(32)
    spread = {}
    for coefficient in (0.0, 2.0):
        model = dylora(4, balance_coefficient=coefficient, top_k=1).train()
        rows = [p for n, p in model.named_parameters() if ".lora_router." in n]
        optimizer = torch.optim.AdamW(rows, lr=5e-2)
        for _ in range(12):
            model(data, labels=data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with record_routing(model.eval().foundation_model) as record:
            model(data)
        chosen = [routing.selected_experts.flatten() for routing in record.routing.values()]
        usage = torch.stack([torch.bincount(each, minlength=4) / len(each) for each in chosen])
        spread[coefficient] = float(usage.std(dim=1).mean())
    assert spread[2.0] < 0.7 * spread[0.0]


def test_no_balancing_loss_is_told_where_there_is_none() -> None:
    model, ids = dylora(2, balance_coefficient=0.0), token_ids()
    outputs = model.train()(ids, labels=ids)
    assert model.last_balance_loss is None
    assert_equal(model.last_lm_loss, outputs.loss.detach())
    model = dylora(2)
    outputs = model.eval()(ids, labels=ids)
    assert model.last_balance_loss is None
    assert_equal(model.last_lm_loss, outputs.loss.detach())
    model(ids)
    assert model.last_lm_loss is None


# Routing ----------------------------------------------------------------------------------------


def test_all_experts_are_active_and_mature_at_first() -> None:
    model = dylora(3)
    assert model.expert_manager.active_experts == ["expert_0", "expert_1", "expert_2"]
    assert model.expert_manager.all_mature
    model(token_ids())
    # at most top_k=2 of the three in each layer
    with record_routing(model.foundation_model) as record:
        model(token_ids())
    for routing in record.routing.values():
        assert int((routing.routing_weights > 0).sum(-1).max()) == 2


def test_the_weights_told_are_the_mean_over_all_routers() -> None:
    model, ids = dylora(3), token_ids()
    with record_routing(model.foundation_model) as record:
        model(ids)
    expected = torch.stack([r.routing_weights for r in record.routing.values()]).mean(0)
    assert_equal(model.last_routing_weights, expected.reshape(2, 12, 3))
    assert not model.train()(ids, labels=ids).loss.isnan()
    assert not model.last_routing_weights.requires_grad


def test_one_router_reads_the_final_states_of_the_frozen_model() -> None:
    """``router_scope="model"``: the two passes of DyLoRA-MoE, written out."""
    model, ids = dylora(3, router_scope="model").double(), token_ids()
    with model.foundation_model.disable_adapter(), torch.no_grad():
        states = model.foundation_model.get_base_model().model(ids).last_hidden_state
    rows = [p for n, p in model.named_parameters() if ".lora_router." in n]
    logits = states @ torch.cat(rows).T / 2.0
    second, _ = logits.sort(dim=-1, descending=True)
    kept = torch.where(logits >= second[..., 1:2], logits, float("-inf"))
    weights = kept.softmax(-1)
    expected = model.foundation_model(ids, routing_weights=weights).logits
    assert_close(model(ids).logits, expected)
    assert_close(model.last_routing_weights, weights)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scope", SCOPES)
def test_generation_routes_every_token_with_the_cache(base: str, scope: Any) -> None:
    model = dylora(3, base=base, router_scope=scope).train()
    ids = token_ids(2, 5)
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert model.training
    step_by_step = ids
    model.eval()
    for _ in range(6):
        logits = model(step_by_step).logits[:, -1]
        step_by_step = torch.cat([step_by_step, logits.argmax(-1, keepdim=True)], dim=1)
    assert_equal(found, step_by_step)


def test_generation_with_one_expert_uses_it_alone() -> None:
    model, ids = dylora(2), token_ids(1, 5)
    found = model.generate(ids, expert_id=1, max_new_tokens=4, do_sample=False)
    model.expert_manager.set_active_expert(1)
    expected = model.foundation_model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert_equal(found, expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("expert_id", [None, 1])
def test_gradient_checkpointing_changes_no_gradient(
    scope: Any, use_reentrant: bool, expert_id: int | None
) -> None:
    ids, found = token_ids(), []
    for checkpointing in (False, True):
        model = dylora(3, router_scope=scope, balance_coefficient=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids, expert_id=expert_id).loss.backward()
        found.append({n: p.grad for n, p in trainable(model).items()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_the_model_can_be_copied_after_a_training_forward() -> None:
    model, ids = dylora(2).train(), token_ids()
    model(ids, labels=ids)
    copied = copy.deepcopy(model)
    randomise(copied, seed=5)
    assert copied.expert_manager.model is copied.foundation_model
    assert not torch.equal(copied.eval()(ids).logits, model.eval()(ids).logits)


def test_moving_the_model_moves_experts_and_routers() -> None:
    model = dylora(2).to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.device.type == "meta"


# Skills ---------------------------------------------------------------------------------------


def learner(**options: Any) -> DyLoRAMoE:
    """Without any expert yet."""
    torch.manual_seed(0)
    return DyLoRAMoE(llama(), num_experts=0, lora_r=4, lora_dropout=0.0, **options)


def test_new_data_gets_a_young_expert_and_freezes_what_was_there() -> None:
    model = learner(similarity_threshold=0.9999)
    assert model.add_new_skill("small", counting(12, first=2)) == 0
    model.mature("small")
    before = {n: p.detach().clone() for n, p in parameters_of(model, "small").items()}
    assert model.add_new_skill("thirties", counting(12, first=30), r=6) == 1
    assert model.skill_library.names == ["small", "thirties"]
    assert model.expert_manager.is_frozen("small")
    assert not model.expert_manager.is_mature("thirties")
    ids = counting(4, first=30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # young experts share the work: both have weight at every token
    assert bool((model.last_routing_weights > 0).all())
    for name, tensor in before.items():
        assert_equal(model.get_parameter(name), tensor)
    moved = {n for n, p in parameters_of(model, "thirties").items() if p.requires_grad}
    assert any(".lora_router." in name for name in moved)


def test_a_new_skill_freezes_experts_that_are_still_young() -> None:
    model = learner(similarity_threshold=0.9999)
    model.add_new_skill("small", counting(12, first=2))
    model.add_new_skill("thirties", counting(12, first=30))
    assert not model.expert_manager.is_mature("small")
    assert {n for n, p in parameters_of(model, "small").items() if p.requires_grad} == set()
    assert any(p.requires_grad for p in parameters_of(model, "thirties").values())


def test_known_data_gets_no_expert_unless_forced() -> None:
    model = learner(similarity_threshold=0.5)
    assert model.add_new_skill("a", counting(12)) == 0
    assert not model.is_novel(counting(12, seed=1))
    assert model.add_new_skill("b", counting(12, seed=1)) is None
    assert model.expert_manager.num_experts == 1
    assert model.add_new_skill("b", counting(12, seed=1), force=True) == 1


def test_without_experts_there_is_nothing_to_run() -> None:
    with pytest.raises(ConfigError, match="There are no experts yet"):
        learner()(token_ids())
