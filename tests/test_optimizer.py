"""Optimisers of a model that grows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moelora import ExpertManager, MoELoraConfig, Router, update_optimizer
from moelora.optim import param_groups
from tests.experts import BASES, manager, snapshot, tensors_of, train
from tests.models import HIDDEN, token_ids, unchecked_types
from tests.tolerances import assert_equal

WIDTH = 5
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
X = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3))


def step(optimizer: torch.optim.Optimizer, router: Router, number: int = 1) -> None:
    """Steps on each expert's own loss, so that the rows do not influence each other."""
    for _ in range(number):
        loss: Any = (router.logits(X) - 1).pow(2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fresh(number: int) -> Router:
    torch.manual_seed(number)
    return Router(WIDTH, number, growing=True, track_maturity=True)


# Rows that moved -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_as_if_the_router_had_not_been_cut(name: str) -> None:
    whole, cut = fresh(4), fresh(4)
    optimizers = [OPTIMISERS[name](router.parameters()) for router in (whole, cut)]
    for router, optimizer in zip((whole, cut), optimizers, strict=True):
        step(optimizer, router, 3)
    cut.freeze([1])
    cut.unfreeze([1])
    assert cut.row_blocks == [1, 1, 2]
    assert update_optimizer(optimizers[1], cut) == []
    for router, optimizer in zip((whole, cut), optimizers, strict=True):
        step(optimizer, router, 3)
    assert_equal(cut.stacked("weight"), whole.weight)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_rows_that_stay_train_on_when_others_go_and_come(name: str) -> None:
    alone, changing = fresh(4), fresh(4)
    optimizers = [OPTIMISERS[name](router.parameters()) for router in (alone, changing)]
    for router, optimizer in zip((alone, changing), optimizers, strict=True):
        step(optimizer, router, 2)
    changing.shrink([1])
    changing.expand(2)
    assert len(update_optimizer(optimizers[1], changing)) == 1
    for router, optimizer in zip((alone, changing), optimizers, strict=True):
        step(optimizer, router, 2)
    assert_equal(changing.stacked("weight")[:3], alone.weight[[0, 2, 3]])
    assert all(p.grad is None for p in changing.parameters())
    assert {id(p) for g in optimizers[1].param_groups for p in g["params"]} == {
        id(p) for p in changing.parameters()
    }
    assert set(optimizers[1].state) <= set(changing.parameters())


@given(st.data())
def test_any_history_of_a_router_keeps_the_state_of_its_rows(data: Any) -> None:
    router = fresh(3)
    optimizer = OPTIMISERS["AdamW"](router.parameters())
    step(optimizer, router, 2)
    # each row's first moment, by an id that travels with the row
    moments = dict(enumerate(optimizer.state[router.weight]["exp_avg"].clone()))
    ids = [0, 1, 2]
    for _ in range(data.draw(st.integers(1, 4))):
        columns = data.draw(st.sets(st.integers(0, len(ids) - 1), max_size=2))
        match data.draw(st.sampled_from(["freeze", "unfreeze", "expand", "shrink", "update"])):
            case "freeze":
                router.freeze(columns)
            case "unfreeze":
                router.unfreeze(columns)
            case "expand":
                router.expand()
                ids.append(-1)
            case "shrink" if len(columns) < len(ids):
                router.shrink(columns)
                ids = [one for column, one in enumerate(ids) if column not in columns]
            case _:
                update_optimizer(optimizer, router)
    router.unfreeze()
    update_optimizer(optimizer, router)
    column = 0
    for block in [p for name, p in router.named_parameters() if name.startswith("weight")]:
        for row in range(block.shape[0]):
            if ids[column] >= 0:
                assert_equal(optimizer.state[block]["exp_avg"][row], moments[ids[column]])
            column += 1
    step(optimizer, router)


def test_a_state_that_cannot_be_cut_is_refused_and_nothing_changes() -> None:
    router = fresh(4)
    optimizer = torch.optim.Adafactor(router.parameters())
    step(optimizer, router)
    router.freeze([1])
    before, state = copy.copy(optimizer.param_groups[0]["params"]), snapshot(optimizer)
    with pytest.raises(ValueError, match=r"The state 'row_var' of Adafactor has shape \(4, 1\)"):
        update_optimizer(optimizer, router)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, before))
    assert snapshot(optimizer).keys() == state.keys()


def test_named_parameters_keep_their_names_in_step() -> None:
    router = fresh(2)
    optimizer = torch.optim.AdamW(router.named_parameters())
    step(optimizer, router)
    router.freeze([0])
    router.expand()
    update_optimizer(optimizer, router)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["weight", "weight_1", "weight_2"]
    assert [id(p) for p in group["params"]] == [id(p) for p in router.parameters()]


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS keeps one history"),
        (lambda p: list(p), "optimizer must be a torch optimiser, got list"),
    ],
)
def test_what_is_no_fitting_optimiser_is_refused(optimizer: Any, match: str) -> None:
    router = fresh(2)
    with unchecked_types(), pytest.raises(TypeError, match=match):
        update_optimizer(optimizer(router.parameters()), router)


# Models ----------------------------------------------------------------------------------------


def trainable(experts: ExpertManager) -> list[nn.Parameter]:
    return [p for p in experts.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_the_state_of_old_experts_survives_a_new_one(base: str, routed: bool) -> None:
    experts = manager(2, base=base, routed=routed)
    inputs = BASES[base][1]()
    weights: dict[str, Any] = {} if routed else {"routing_weights": torch.tensor([0.4, 0.6])}
    if not routed:
        experts.add_router(input_size=HIDDEN)
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-2)
    train(experts, optimizer, inputs, steps=3, **weights)
    before, values = snapshot(optimizer), tensors_of(experts, "expert_0")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new_id = experts.create_expert(r=4)
    joined = update_optimizer(optimizer, experts.model)
    assert {id(p) for p in joined} == {id(p) for p in trainable(experts)} - known
    after = snapshot(optimizer)
    for key, state in before.items():
        assert_equal(list(after[key].values()), list(state.values()))
    assert_equal(list(tensors_of(experts, "expert_0").values()), list(values.values()))
    assert tensors_of(experts, experts.name_of(new_id))


def test_new_parameters_join_the_groups_of_their_like() -> None:
    experts = manager(2)
    experts.add_router()
    groups = param_groups(experts.model, lr=1e-3, router_lr=1e-4, loraplus_lr_ratio=4)
    optimizer = torch.optim.AdamW(groups)
    number = len(optimizer.param_groups)
    experts.create_expert(r=3)
    joined = update_optimizer(optimizer, experts.model)
    assert len(optimizer.param_groups) == number
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in experts.model.named_parameters()}
    rates = {
        kind: {rate[id(p)] for p in joined if kind in names[id(p)]}
        for kind in ("lora_A", "lora_B", "router")
    }
    assert rates == {"lora_A": {1e-3}, "lora_B": {4e-3}, "router": {1e-4}}


def test_options_make_a_group_of_their_own() -> None:
    experts = manager(1)
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-3)
    experts.create_expert()
    joined = update_optimizer(optimizer, experts.model, lr=1e-2, weight_decay=0.0)
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group["initial_lr"]) == (1e-2, 0.0, 1e-2)
    assert [id(p) for p in group["params"]] == [id(p) for p in joined]


def test_two_optimisers_share_a_model() -> None:
    experts = manager(1)
    experts.add_router()

    def is_router(name: str) -> bool:
        return "router" in name

    def is_expert(name: str) -> bool:
        return not is_router(name)

    named = [(n, p) for n, p in experts.model.named_parameters() if p.requires_grad]
    optimizers = {
        select: torch.optim.AdamW([p for n, p in named if select(n)], lr=1e-3)
        for select in (is_router, is_expert)
    }
    experts.create_expert()
    joined = {s: update_optimizer(o, experts.model, select=s) for s, o in optimizers.items()}
    names = {id(p): n for n, p in experts.model.named_parameters()}
    assert [names[id(p)] for p in joined[is_router]] == ["base_model.router.weight_1"]
    assert {is_router(names[id(p)]) for p in joined[is_expert]} == {False}
    assert sum(map(len, joined.values())) == len(trainable(experts)) - len(named)


def test_a_second_call_changes_nothing() -> None:
    experts = manager(2)
    experts.add_router()
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-3)
    experts.create_expert()
    experts.freeze(0)
    update_optimizer(optimizer, experts.model)
    before = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert update_optimizer(optimizer, experts.model) == []
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == before


def test_the_callers_list_is_not_written_to() -> None:
    experts = manager(1)
    parameters = trainable(experts)
    number = len(parameters)
    optimizer = torch.optim.AdamW([{"params": parameters}], lr=1e-3)
    experts.create_expert()
    update_optimizer(optimizer, experts.model)
    assert len(parameters) == number


def test_removed_experts_leave_the_optimiser() -> None:
    experts = manager(3)
    router = experts.add_router()
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-3)
    train(experts, optimizer, token_ids(), routing_weights=torch.tensor([0.2, 0.3, 0.5]))
    experts.remove_expert(1)
    update_optimizer(optimizer, experts.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(experts)}
    assert set(optimizer.state) <= set(trainable(experts))
    assert router.num_experts == 2


def test_parameters_of_other_modules_stay_in_the_optimiser() -> None:
    experts, other = manager(1), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*trainable(experts), *other.parameters()], lr=1e-3)
    experts.create_expert()
    update_optimizer(optimizer, experts.model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in other.parameters()} <= held


def test_a_saved_optimiser_fits_the_grown_model_made_anew() -> None:
    experts = manager(1)
    experts.add_router(hidden_size=3)
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-3)
    experts.create_expert()
    update_optimizer(optimizer, experts.model)
    train(experts, optimizer, token_ids(), steps=2, routing_weights=torch.tensor([0.5, 0.7]))
    again = torch.optim.AdamW(trainable(experts), lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) > 0
    for parameter, state in optimizer.state.items():
        assert_equal(list(again.state[parameter].values()), list(state.values()))


def test_a_group_in_another_order_stays_in_it() -> None:
    experts = manager(1)
    parameters = trainable(experts)[::-1]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    experts.create_expert()
    joined = update_optimizer(optimizer, experts.model)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in [*parameters, *joined]]


def test_training_with_automatic_routing_goes_on_through_growth() -> None:
    experts = manager(2)
    router = experts.add_router(moe_config=MoELoraConfig(num_experts=2))
    optimizer = torch.optim.AdamW(trainable(experts), lr=1e-2)
    ids = token_ids()
    train(experts, optimizer, ids, labels=ids, loss=lambda result: result.loss)
    experts.freeze([0, 1])
    experts.create_expert()
    joined = update_optimizer(optimizer, experts.model)
    frozen = {n: tensors_of(experts, n) for n in ("expert_0", "expert_1")}
    rows: Tensor = router.stacked("weight").detach().clone()
    train(experts, optimizer, ids, steps=3, labels=ids, loss=lambda result: result.loss)
    for name, tensors in frozen.items():
        assert_equal(list(tensors_of(experts, name).values()), list(tensors.values()))
    assert_equal(router.stacked("weight")[:2], rows[:2])
    assert (router.stacked("weight")[2] != rows[2]).any()
    assert router.weight.shape == (2, HIDDEN)
    assert any(optimizer.state[p] for p in joined)
