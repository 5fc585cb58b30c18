"""ExpertManager: experts that are made, activated, frozen, renamed and removed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moelora import (
    ExpertManager,
    MoELoraConfig,
    Router,
    UnsupportedLayerError,
    record_routing,
    update_optimizer,
)
from tests.experts import BASES, manager, output, tensors_of, train
from tests.models import HIDDEN, llama_config, lora_layers, token_ids
from tests.tolerances import assert_close, assert_equal

KINDS = [(base, routed) for base in BASES for routed in (False, True)]


def weights_for(experts: ExpertManager) -> dict[str, Tensor]:
    """Explicit weights where nothing else routes."""
    if experts.routing is not None:
        return {}
    return {"routing_weights": torch.linspace(0.2, 0.8, experts.num_experts)}


def trainable_names(experts: ExpertManager) -> set[str]:
    """The experts of which any tensor is trainable."""
    names = experts.get_all_adapter_names()
    parameters = [name for name, p in experts.model.named_parameters() if p.requires_grad]
    return {name for name in names if any(f".{name}" in key for key in parameters)}


# Making ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_a_new_expert_changes_no_bit_of_the_others(base: str, routed: bool) -> None:
    experts = manager(2, base=base, routed=routed)
    inputs = BASES[base][1]()
    names = experts.get_all_adapter_names()
    before = [tensors_of(experts, name) for name in names]
    outputs = []
    for name in names:
        experts.set_active_expert(name)
        outputs.append(output(experts, inputs))
    new = experts.name_of(experts.create_expert(r=5))
    for name, tensors, expected in zip(names, before, outputs, strict=True):
        after = tensors_of(experts, name)
        assert after.keys() == tensors.keys()
        assert_equal(list(after.values()), list(tensors.values()))
        experts.set_active_expert(name)
        assert_equal(output(experts, inputs), expected)
    experts.set_active_expert(new)
    with experts.model.disable_adapter():
        plain = output(experts, inputs)
    assert_equal(output(experts, inputs), plain)


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_all_experts_together_are_the_weighted_sum_of_their_updates(
    base: str, routed: bool
) -> None:
    experts = manager(3, base=base, routed=routed)
    experts.model.double()
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    layer = next(lora_layers(experts.model))
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    base_layer: Any = layer.get_base_layer()
    with torch.no_grad():
        expected = base_layer(x)
        for weight, name in zip(weights, experts.activate_all_experts(), strict=True):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            expected = expected + weight * layer.scaling[name] * (x @ a.T @ b.T)
        assert_close(layer(x, routing_weights=weights), expected)


@given(st.permutations([0, 1, 2]))
@settings(max_examples=6)
def test_the_order_of_growth_does_not_matter_to_the_experts(order: list[int]) -> None:
    inputs = token_ids()
    reference = manager(0)
    grown = manager(0)
    made: dict[str, Tensor] = {}
    for experts, numbers in ((reference, [0, 1, 2]), (grown, order)):
        for number in numbers:
            torch.manual_seed(number)
            experts.create_expert(f"skill{number}", r=number + 1, init_lora_weights=False)
        experts.model.eval()
    for number in range(3):
        reference.set_active_expert(f"skill{number}")
        made[f"skill{number}"] = output(reference, inputs)
    for name, expected in made.items():
        grown.set_active_expert(name)
        assert_equal(output(grown, inputs), expected)
    shares = torch.tensor([0.1, 0.2, 0.7])
    grown.activate_all_experts()
    reference.activate_all_experts()
    assert_close(
        output(grown, inputs, routing_weights=shares[list(order)]),
        output(reference, inputs, routing_weights=shares),
    )


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_making_and_removing_an_expert_is_the_identity(base: str, routed: bool) -> None:
    experts = manager(2, base=base, routed=routed)
    inputs = BASES[base][1]()
    before, flags = (
        experts.model.state_dict(),
        {n: p.requires_grad for n, p in experts.model.named_parameters()},
    )
    expected = output(experts, inputs, **weights_for(experts))
    experts.remove_expert(experts.create_expert())
    assert_equal(output(experts, inputs, **weights_for(experts)), expected)
    after = experts.model.state_dict()
    assert list(after) == list(before)
    assert_equal(list(after.values()), list(before.values()))
    assert {n: p.requires_grad for n, p in experts.model.named_parameters()} == flags


def test_ids_are_positions_and_names_count_on() -> None:
    experts = ExpertManager(LlamaForCausalLM(llama_config()))
    assert len(experts) == 0
    assert experts.get_all_adapter_names() == []
    assert [experts.create_expert(), experts.create_expert("sql"), experts.create_expert()] == [
        0,
        1,
        2,
    ]
    assert experts.get_all_adapter_names() == ["expert_0", "sql", "expert_2"]
    experts.remove_expert(0)
    assert experts.id_of("expert_2") == 1
    assert experts.name_of(experts.create_expert()) == "expert_3"
    assert repr(experts) == "ExpertManager(['sql', 'expert_2', 'expert_3'])"
    assert (len(experts), experts.num_experts) == (3, 3)


def test_fields_are_the_managers_unless_told_otherwise() -> None:
    experts = ExpertManager(
        LlamaForCausalLM(llama_config()), r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True
    )
    experts.create_expert()
    experts.create_expert(r=7, lora_alpha=2, lora_dropout=0.0, target_modules=["k_proj"])
    first, second = experts.model.peft_config.values()
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    assert [getattr(first, name) for name in fields] == [3, 5, 0.1, True]
    assert [getattr(second, name) for name in fields] == [7, 2, 0.0, True]
    assert second.target_modules == {"k_proj"}
    assert type(first) is LoraConfig


def test_experts_on_other_layers_keep_their_column() -> None:
    experts = manager(1)
    experts.create_expert(target_modules=["k_proj"], init_lora_weights=False)
    ids = token_ids()
    both = output(experts, ids, routing_weights=torch.tensor([1.0, 0.0]))
    experts.set_active_expert(0)
    assert_close(both, output(experts, ids))


def test_a_new_expert_joins_only_where_all_are_active() -> None:
    experts = manager(2)
    experts.create_expert()
    assert experts.active_experts == ["expert_0", "expert_1", "expert_2"]
    experts.set_active_expert(1)
    experts.create_expert()
    assert experts.active_experts == ["expert_1"]
    assert trainable_names(experts) == {"expert_1"}


def test_adapters_that_are_there_become_experts_in_their_order() -> None:
    model = get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig(r=2))
    model.add_adapter("b", LoraConfig(r=4))
    experts = ExpertManager(model)
    assert experts.get_all_adapter_names() == ["default", "b"]
    assert experts.active_experts == ["default"]
    assert experts.model is model
    assert ExpertManager(model).record("b") == experts.record("b")


def test_a_mixture_is_one_expert_with_several_columns() -> None:
    model = get_peft_model(LlamaForCausalLM(llama_config()), MoELoraConfig(num_experts=3, r=2))
    experts = ExpertManager(model, r=2)
    experts.create_expert("plain")
    assert experts.num_experts == 4
    assert [experts.columns_of(e) for e in ("default", "plain")] == [range(3), range(3, 4)]
    experts.activate_all_experts()
    output(experts, token_ids(), routing_weights=torch.ones(4))
    experts.freeze("default")
    assert trainable_names(experts) == {"plain"}
    assert experts.is_mature("default")
    experts.mark_mature("default", mature=False)
    assert not experts.is_mature("default")


# Activating ------------------------------------------------------------------------------------


def test_one_expert_alone_is_plain_lora() -> None:
    experts = manager(3)
    ids = token_ids()
    for number, name in enumerate(experts.get_all_adapter_names()):
        experts.set_active_expert(number)
        alone = get_peft_model(LlamaForCausalLM(llama_config()), experts.model.peft_config[name])
        own = {k.replace(f".{name}.", ".default."): v for k, v in tensors_of(experts, name).items()}
        base = {k: v for k, v in experts.model.state_dict().items() if "lora_" not in k}
        alone.load_state_dict({**base, **own})
        assert_equal(output(experts, ids), alone.eval()(ids).logits.detach())
        assert (experts.active_experts, experts.current_expert_id) == ([name], number)


def test_activating_all_returns_the_columns_of_the_weights() -> None:
    experts = manager(3)
    experts.set_active_expert(2)
    assert experts.activate_all_experts() == ["expert_0", "expert_1", "expert_2"]
    assert experts.current_expert_id is None
    ids = token_ids()
    one_hot = output(experts, ids, routing_weights=torch.tensor([0.0, 1.0, 0.0]))
    experts.set_active_expert(1)
    assert_close(one_hot, output(experts, ids))


@pytest.mark.parametrize("routed", [False, True])
def test_only_the_active_expert_learns(routed: bool) -> None:
    experts = manager(3, routed=routed)
    optimizer = torch.optim.AdamW(experts.model.parameters(), lr=0.1, weight_decay=0.1)
    experts.set_active_expert(1)
    before = {name: tensors_of(experts, name) for name in experts.get_all_adapter_names()}
    train(experts, optimizer, token_ids(), steps=2)
    for name, tensors in before.items():
        same = all(
            torch.equal(a, b)
            for a, b in zip(tensors_of(experts, name).values(), tensors.values(), strict=True)
        )
        assert same == (name != "expert_1")


@pytest.mark.parametrize("routed", [False, True])
def test_one_expert_needs_no_router_and_one_pass(routed: bool) -> None:
    experts = manager(2, routed=routed)
    if not routed:
        experts.add_router(moe_config=MoELoraConfig(num_experts=2))
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    experts.model.get_base_model().model.layers[0].register_forward_hook(count)
    experts.set_active_expert(0)
    output(experts, token_ids())
    assert passes == 1
    experts.activate_all_experts()
    output(experts, token_ids())
    assert passes == (2 if routed else 3)


# Frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_nothing_of_frozen_experts_moves_in_a_hundred_steps(base: str, routed: bool) -> None:
    experts = manager(2, base=base, routed=routed)
    inputs = BASES[base][1]()
    if not routed:
        config = None if base == "plain module" else MoELoraConfig(num_experts=2)
        experts.add_router(input_size=HIDDEN, moe_config=config)
    optimizer = torch.optim.AdamW(experts.model.parameters(), lr=0.05, weight_decay=0.5)
    explicit = {"routing_weights": torch.tensor([0.4, 0.6])} if base == "plain module" else {}
    kwargs: dict[str, Any] = {} if routed else explicit
    train(experts, optimizer, inputs, steps=2, **kwargs)
    experts.freeze([0, 1])
    experts.create_expert(r=3)
    update_optimizer(optimizer, experts.model)
    if kwargs:
        kwargs = {"routing_weights": torch.tensor([0.4, 0.3, 0.3])}
    before = {name: tensors_of(experts, name) for name in experts.get_all_adapter_names()}
    router = experts.model.router
    rows = None if router is None else router.stacked("weight").detach().clone()
    train(experts, optimizer, inputs, steps=100, **kwargs)
    for name in ("expert_0", "expert_1"):
        assert_equal(list(tensors_of(experts, name).values()), list(before[name].values()))
    young = tensors_of(experts, "expert_2")
    moved = [key for key in young if not torch.equal(young[key], before["expert_2"][key])]
    assert {key.split(".lora_")[1].split(".")[0] for key in moved} >= {"A", "B"}
    assert any("lora_router" in key for key in moved) == routed
    if router is not None and rows is not None:
        assert_equal(router.stacked("weight")[:2], rows[:2])
        assert torch.equal(router.stacked("weight")[2], rows[2]) == bool(explicit)


@pytest.mark.parametrize("routed", [False, True])
def test_a_frozen_expert_stays_frozen_whatever_peft_activates(routed: bool) -> None:
    experts = manager(3, routed=routed)
    experts.freeze("expert_1")
    model = experts.model
    steps = [
        lambda: experts.activate_all_experts(),
        lambda: experts.set_active_expert(1),
        lambda: model.set_adapter("expert_1"),
        lambda: model.base_model.set_adapter(["expert_0", "expert_1"]),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.add_adapter("extra", LoraConfig(r=2)),
        lambda: model.delete_adapter("expert_0"),
    ]
    for step in steps:
        step()
        assert "expert_1" not in trainable_names(experts)
        assert experts.is_frozen("expert_1")


def test_freezing_drops_a_gradient_that_was_there() -> None:
    experts = manager(2)
    experts.model(token_ids(), routing_weights=torch.ones(2)).logits.sum().backward()
    experts.freeze(0)
    gradients = {n: p.grad for n, p in experts.model.named_parameters() if ".expert_" in n}
    assert {n for n, g in gradients.items() if g is not None} == {
        n for n in gradients if "expert_1" in n
    }


def test_frozen_experts_still_serve() -> None:
    experts = manager(2)
    ids = token_ids()
    before = output(experts, ids, routing_weights=torch.ones(2))
    experts.freeze()
    assert_equal(output(experts, ids, routing_weights=torch.ones(2)), before)


def test_unfreezing_lets_active_experts_train_at_once_and_others_when_activated() -> None:
    experts = manager(2)
    experts.freeze()
    experts.set_active_expert(0)
    experts.unfreeze()
    assert trainable_names(experts) == {"expert_0"}
    experts.activate_all_experts()
    assert trainable_names(experts) == {"expert_0", "expert_1"}
    assert not experts.is_frozen(0)


def test_a_new_adapter_of_a_removed_ones_name_is_not_frozen() -> None:
    experts = manager(2)
    experts.freeze("expert_1")
    experts.remove_expert("expert_1")
    experts.create_expert("expert_1")
    assert not experts.is_frozen("expert_1")
    assert "expert_1" in trainable_names(experts)


def test_a_copy_of_the_model_knows_what_is_frozen() -> None:
    experts = manager(2)
    experts.freeze(0)
    twin = ExpertManager(copy.deepcopy(experts.model))
    assert [twin.is_frozen(e) for e in (0, 1)] == [True, False]
    twin.unfreeze(0)
    assert experts.is_frozen(0)


def test_rows_of_a_foreign_router_cannot_be_frozen_one_by_one() -> None:
    experts = manager(2)
    router = nn.Linear(HIDDEN, 2)
    experts.model.attach_router(router)
    with pytest.raises(UnsupportedLayerError, match="rows of the attached Linear cannot be frozen"):
        experts.freeze(0)
    assert not experts.is_frozen(0)
    router.requires_grad_(False)
    experts.freeze(0)
    assert experts.is_frozen(0)


# Mature ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
def test_routing_is_dense_while_an_expert_is_young(routed: bool) -> None:
    experts = manager(3, routed=routed)
    if not routed:
        experts.add_router(top_k=1, moe_config=MoELoraConfig(num_experts=3))

    def chosen() -> set[int]:
        with record_routing(experts.model) as record:
            output(experts, token_ids())
        return {int((r.routing_weights > 0).sum(-1).max()) for r in record.routing.values()}

    assert not experts.all_mature
    assert chosen() == {3}
    experts.mark_mature()
    assert experts.all_mature
    assert chosen() == {2 if routed else 1}
    experts.create_expert()
    assert [experts.is_mature(e) for e in range(4)] == [True, True, True, False]
    assert chosen() == {4}
    experts.mark_mature("expert_3")
    assert chosen() == {2 if routed else 1}


def test_without_routers_maturity_is_kept_in_the_records() -> None:
    experts = manager(2)
    experts.mark_mature(1)
    assert [experts.is_mature(e) for e in (0, 1)] == [False, True]
    router = experts.add_router()
    assert router.mature is not None
    assert router.mature.tolist() == [False, True]
    experts.mark_mature(0)
    assert router.mature.tolist() == [True, True]


# The router over all ---------------------------------------------------------------------------


def test_a_router_gets_a_row_with_each_expert() -> None:
    experts = manager(1)
    router = experts.add_router(top_k=2)
    experts.create_expert()
    experts.create_expert()
    assert router.row_blocks == [1, 1, 1]
    hidden = torch.randn(2, 3, HIDDEN)
    weights = experts.model.get_routing_weights(hidden)
    assert weights.shape == (2, 3, 3)
    rows = router.stacked("weight").clone()
    experts.remove_expert(1)
    assert_equal(router.stacked("weight"), rows[[0, 2]])


def test_a_router_made_for_experts_to_come_does_not_grow_early() -> None:
    experts = manager(1)
    experts.model.attach_router(Router(HIDDEN, 3))
    experts.create_expert()
    assert experts.model.router.num_experts == 3
    experts.create_expert()
    assert experts.model.router.num_experts == 3
    experts.create_expert()
    assert experts.model.router.num_experts == 4


def test_rows_of_frozen_experts_start_frozen() -> None:
    experts = manager(2)
    experts.freeze(0)
    router = experts.add_router()
    assert [router.is_frozen(column) for column in range(2)] == [True, False]


# Renaming and removing -------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_a_renamed_expert_is_the_same(base: str, routed: bool) -> None:
    experts = manager(3, base=base, routed=routed)
    inputs = BASES[base][1]()
    experts.freeze(1)
    experts.update_record(1, skill="sql")
    expected = output(experts, inputs, **weights_for(experts))
    parameters = [id(p) for p in experts.model.parameters()]
    experts.rename_expert("expert_1", "sql")
    assert [id(p) for p in experts.model.parameters()] == parameters
    assert experts.get_all_adapter_names() == ["expert_0", "sql", "expert_2"]
    assert experts.active_experts == ["expert_0", "sql", "expert_2"]
    assert experts.is_frozen("sql")
    assert experts.record("sql").skill == "sql"
    assert_equal(output(experts, inputs, **weights_for(experts)), expected)
    assert not any("expert_1" in key for key in experts.model.state_dict())
    experts.set_active_expert("sql")
    experts.remove_expert("sql")
    assert experts.active_experts == ["expert_0", "expert_2"]
    output(experts, inputs, **weights_for(experts))


def test_renaming_to_the_same_name_changes_nothing() -> None:
    experts = manager(2)
    experts.rename_expert(0, "expert_0")
    assert experts.get_all_adapter_names() == ["expert_0", "expert_1"]


def test_removing_the_only_active_expert_activates_the_others_quietly() -> None:
    experts = manager(3)
    experts.set_active_expert(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts.remove_expert(1)
    assert experts.active_experts == ["expert_0", "expert_2"]
