"""Is this data a skill that is known already?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora import (
    ConfigError,
    NoveltyDetector,
    SkillError,
    SkillLibrary,
    record_routing,
    router_entropy,
)
from tests.lm import mixture, token_ids
from tests.models import unchecked_types


def at(degrees: float) -> Tensor:
    """A direction in the plane."""
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()])


def detector(*degrees: float, **fields: Any) -> NoveltyDetector:
    """One that knows a skill in each direction."""
    library = SkillLibrary()
    for each in degrees:
        library.add_skill(f"{each:g}", at(each))
    return NoveltyDetector(library, **fields)


def test_everything_is_new_to_an_empty_library() -> None:
    found = NoveltyDetector().assess(at(0))
    assert found.is_novel
    assert (found.similarity, found.nearest, found.similarities) == (None, None, {})


def test_the_nearest_skill_decides() -> None:
    close = detector(0, 90, 180, similarity_threshold=0.9)
    found = close.assess(at(80))
    assert not found.is_novel
    assert found.nearest == "90"
    assert found.similarity == pytest.approx(0.98481, abs=1e-4)
    assert list(found.similarities) == ["0", "90", "180"]
    assert close.is_novel(at(45))


def test_the_median_skill_decides() -> None:
    # cosines at 80 degrees: 0.17, 0.98, -0.17
    median = detector(0, 90, 180, similarity_threshold=0.1, compare="median")
    assert median.assess(at(80)).similarity == pytest.approx(0.17365, abs=1e-4)
    assert not median.is_novel(at(80))
    assert detector(0, 90, 180, similarity_threshold=0.2, compare="median").is_novel(at(80))


def test_the_median_of_two_lies_between_them() -> None:
    found = detector(0, 90, compare="median").assess(at(0))
    assert found.similarity == pytest.approx(0.5, abs=1e-6)
    assert found.nearest == "0"


def test_the_mean_direction_of_the_texts_is_compared() -> None:
    spread = torch.stack([at(60), at(120)])
    assert not detector(90).is_novel(spread)
    assert detector(90).is_novel(spread[:1])


@given(st.floats(-1, 1), st.floats(0, 360))
def test_data_is_new_exactly_when_below_the_threshold(threshold: float, degrees: float) -> None:
    found = detector(30, similarity_threshold=threshold).assess(at(degrees))
    assert found.similarity is not None
    assert found.is_novel == (found.similarity < threshold)
    assert found.similarity == pytest.approx(float(at(30) @ at(degrees)), abs=1e-5)


def test_data_exactly_at_the_threshold_is_known() -> None:
    similarity = detector(30).assess(at(70)).similarity
    assert similarity is not None
    assert not detector(30, similarity_threshold=similarity).is_novel(at(70))


def test_a_skill_is_known_once_it_is_added() -> None:
    one = detector(0)
    assert one.is_novel(at(90))
    one.skill_library.add_skill("new", at(90))
    assert not one.is_novel(at(90))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"similarity_threshold": 1.5}, r"similarity_threshold must be a number in \[-1, 1\], got"),
        ({"similarity_threshold": float("nan")}, "similarity_threshold must be .* got nan"),
        ({"similarity_threshold": "high"}, "similarity_threshold must be .* got 'high'"),
        ({"entropy_threshold": -0.1}, r"entropy_threshold must be a number in \[0, 1\], got -0.1"),
        ({"compare": "mean"}, "compare must be one of 'nearest', 'median', got 'mean'"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with unchecked_types(), pytest.raises(ConfigError, match=message):
        NoveltyDetector(**fields)


# By the router --------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 3, 8])
def test_entropy_is_0_for_a_certain_and_1_for_an_undecided_router(experts: int) -> None:
    assert router_entropy(torch.full((5, experts), 1 / experts)) == pytest.approx(1.0)
    assert router_entropy(torch.eye(experts)) == 0.0


def test_the_entropy_of_one_expert_is_0() -> None:
    assert router_entropy(torch.ones(4, 1)) == 0.0


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_entropy_is_the_mean_over_tokens_in_units_of_the_uniform_one(
    experts: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    by_hand = -sum(float(p) * float(p.log()) for row in probs for p in row) / tokens
    by_hand /= float(torch.tensor(float(experts), dtype=torch.float64).log())
    assert router_entropy(probs) == pytest.approx(by_hand, rel=1e-9)


def test_padding_does_not_count_in_the_entropy() -> None:
    probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    assert router_entropy(probs, token_mask=torch.tensor([[False, True]])) == 0.0
    assert router_entropy(probs, token_mask=torch.tensor([[True, False]])) == 1.0


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.zeros(0, 2), "hold no real token"),
        (torch.ones(3, 2), "must be probabilities that sum to 1 for each token, got sums from 2"),
        (torch.tensor([[1.5, -0.5]]), "must be probabilities"),
        (torch.full((1, 2), float("nan")), "must be probabilities"),
    ],
)
def test_what_are_no_probabilities_is_refused(probs: Tensor, message: str) -> None:
    with pytest.raises(SkillError, match=message):
        router_entropy(probs)


def test_a_router_is_uncertain_above_the_threshold() -> None:
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert NoveltyDetector(entropy_threshold=0.4).is_uncertain(probs)
    assert not NoveltyDetector(entropy_threshold=0.5).is_uncertain(probs)


def test_the_routers_of_a_mixture_can_be_asked() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model(token_ids())
    probs = torch.stack([routing.router_probs for routing in record.routing.values()])
    assert 0 < router_entropy(probs) < 1
