"""Skills in sequence: the laws that the example shows. It runs in test_uses.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.continual import (
    Data,
    Figures,
    Plan,
    as_markdown,
    learn_with_experts,
    learn_with_one_lora,
    report,
    write,
)
from examples.continual_learning import ContinualLearner, counting
from tests.dylora.tiny import llama
from tests.examples.tiny import EXAMPLES
from tests.tolerances import assert_equal

#: Between skills that share no token, on a tiny model; what a real one needs is in the report.
ROUTED_MARGIN = 0.6
FIRSTS = (2, 26, 50)
PLAN = Plan(seeding=15, consolidation=20, lr=5e-3, router_lr=0.1, threshold=0.95)


def skills() -> dict[str, Data]:
    data = {}
    for first in FIRSTS:
        batches = list(counting(first, batches=6))
        data[f"from {first}"] = Data(batches[:4], batches[4:])
    return data


@pytest.fixture(scope="module")
def figures() -> Figures:
    """Skills in sequence, by experts and by one LoRA."""
    torch.manual_seed(0)
    found = learn_with_experts(llama(), skills(), PLAN)
    learn_with_one_lora(llama(), skills(), PLAN, found)
    return found


def test_every_skill_is_learnt(figures: Figures) -> None:
    assert list(figures.base) == [f"from {first}" for first in FIRSTS]
    for name, loss in figures.learnt.items():
        assert loss < figures.base[name] - 1.5


def test_with_its_expert_chosen_nothing_is_forgotten_to_the_bit(figures: Figures) -> None:
    assert figures.chosen == figures.learnt
    assert figures.bit_equal


def test_routed_every_skill_is_within_the_margin(figures: Figures) -> None:
    assert figures.margin == max(figures.routed[n] - figures.chosen[n] for n in figures.chosen)
    assert figures.margin < ROUTED_MARGIN
    for name, loss in figures.routed.items():
        assert loss < figures.base[name] - 1.0


def test_one_lora_forgets_the_first_skill(figures: Figures) -> None:
    first = next(iter(figures.base))
    assert figures.one_lora_learnt[first] < figures.base[first] - 1.5
    assert figures.one_lora[first] > figures.one_lora_learnt[first] + 2 * ROUTED_MARGIN
    assert figures.one_lora[first] > figures.routed[first] + ROUTED_MARGIN


def test_new_data_is_told_from_data_that_returns(figures: Figures) -> None:
    assert figures.returning == "from 2"
    similarities = list(figures.similarity.values())
    assert all(cosine is not None and cosine < PLAN.threshold for cosine in similarities[1:])


def test_the_report_holds_every_figure(figures: Figures, tmp_path: Path) -> None:
    write(report(figures, PLAN, model="tiny"), tmp_path)
    content = json.loads((tmp_path / "continual-learning.json").read_text())
    assert content["figures"]["chosen"] == figures.chosen
    assert content["routed_margin"] == figures.margin
    # of a build for one device, the packaged version may lack the build's name
    measured_with = content["environment"]["libraries"]["torch"]
    assert measured_with.split("+")[0] == torch.__version__.split("+")[0]
    page = (tmp_path / "continual-learning.md").read_text()
    assert page == as_markdown(content)
    for name in figures.base:
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f"{figures.chosen[name]:.3f}" in row
        assert f"{figures.one_lora[name]:.3f}" in row
    assert "the same to the bit" in page


def test_a_changed_first_skill_is_told_in_the_report(figures: Figures) -> None:
    content: dict[str, Any] = report(figures, PLAN, model="tiny")
    content["figures"]["bit_equal"] = False
    assert "CHANGED" in as_markdown(content)


# The loop -------------------------------------------------------------------------------------


def learner() -> ContinualLearner:
    torch.manual_seed(0)
    return ContinualLearner(llama(), seeding_steps=2, consolidation_steps=2)


def test_a_later_skill_moves_no_tensor_of_an_earlier_one() -> None:
    model = learner()
    model.meet("first", list(counting(2)))
    before = {n: t.clone() for n, t in model.experts.model.state_dict().items()}
    assert any(".lora_router.first" in name for name in before)
    model.meet("second", list(counting(38)))
    after = model.experts.model.state_dict()
    for name, tensor in before.items():
        assert_equal(after[name], tensor)


def test_an_expert_matures_when_it_is_learnt() -> None:
    model = learner()
    model.meet("first", list(counting(2)))
    model.meet("second", list(counting(38)))
    assert model.experts.get_all_adapter_names() == ["base", "first", "second"]
    assert model.experts.all_mature
    assert all(model.experts.is_frozen(name) for name in ("base", "first", "second"))
    assert model.experts.record("second").steps == 4
    assert model.detector.skill_library.names == ["first", "second"]


def test_known_data_changes_nothing() -> None:
    model = learner()
    model.meet("first", list(counting(2)))
    before = {n: t.clone() for n, t in model.experts.model.state_dict().items()}
    assert model.meet("again", list(counting(2))) == "first"
    assert model.experts.get_all_adapter_names() == ["base", "first"]
    after = model.experts.model.state_dict()
    for name, tensor in before.items():
        assert_equal(after[name], tensor)


def test_the_example_fits_some_pages() -> None:
    assert len((EXAMPLES / "continual_learning.py").read_text().splitlines()) < 220
