"""Measuring: memory is counted exactly, and a measured model is the same as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora.validation.speed import measure, peak_bytes, summarise
from moelora.validation.stacking import stack_experts
from moelora.validation.ways import activate, all_ways, trainable
from tests.validation.old_checkpoints import old_model

CPU = torch.device("cpu")
NAMES = ["expert_0", "expert_1", "expert_2"]


@pytest.fixture(scope="module")
def model() -> Any:
    made = old_model(target_modules=["q_proj", "v_proj"])
    stack_experts(made, NAMES, "stack")
    return made


def ways_of(model: Any) -> Any:
    from moelora.gate_router import GateRouter

    torch.manual_seed(0)
    return all_ways(model, NAMES, router=GateRouter(32, 3, top_k=1), mixtures=["stack"])


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 61, (2, 8))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_the_peak_is_the_most_that_lived_at_once() -> None:
    def together() -> None:
        kept = [torch.empty(1000) for _ in range(5)]
        del kept

    def one_by_one() -> None:
        for _ in range(5):
            torch.empty(1000)

    assert peak_bytes(CPU, together) == 5 * 4000
    assert peak_bytes(CPU, one_by_one) == 4000
    # what is there before does not count, and freeing it does not hide what comes
    there = torch.empty(10_000)
    assert peak_bytes(CPU, there.clone) == 40_000


def test_memory_is_told_only_where_it_is_measured() -> None:
    assert peak_bytes(torch.device("meta"), lambda: torch.empty(3)) is None


def test_quantiles_are_of_what_was_measured() -> None:
    found = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (found.median, found.low, found.high, found.repeats) == (3.5, 2.0, 5.0, 6)
    assert summarise([2.0]).low == summarise([2.0]).high == 2.0


def test_every_way_gives_logits_and_trains_its_own_parameters(model: Any, batch: Any) -> None:
    for way in ways_of(model):
        way.prepare()
        try:
            logits, loss = way.run(batch, batch["input_ids"])
        finally:
            way.finish()
        assert logits.shape == (2, 8, 61)
        assert loss is not None
        parameters = trainable(model, way)
        assert bool(parameters) == bool(way.adapters)
        if way.name in ("n_plus_1", "two_passes", "one_pass"):
            model.zero_grad()
            loss.backward()
            missing = [p.shape for p in parameters if p.grad is None]
            assert missing == []
    assert model.router is None


def test_measuring_leaves_every_value_as_it_was(model: Any, batch: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[str] = []
    ways = ways_of(model)
    found = measure(model, ways, batch, warmup=1, repeats=2, tick=told.append)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(told) == 3 * (6 + 5)
    assert [one.way for one in found] == [way.name for way in ways]
    assert all(one.forward.repeats == 2 and one.forward.median > 0 for one in found)
    assert found[0].step is None
    assert model.router is None


def test_more_experts_and_passes_need_more_memory(model: Any, batch: Any) -> None:
    found = {one.way: one for one in measure(model, ways_of(model), batch, warmup=1, repeats=1)}
    base_bytes = sum(
        p.numel() * p.element_size() for name, p in model.named_parameters() if ".lora_" not in name
    )
    assert found["base"].resident == base_bytes
    one = sum(p.numel() * 4 for n, p in model.named_parameters() if ".expert_0." in n)
    assert found["lora"].resident == base_bytes + one
    steps = {name: way.step_peak or 0 for name, way in found.items()}
    assert steps["lora"] < steps["one_pass"] < steps["two_passes"] < steps["n_plus_1"]
    activate(model, NAMES)
