"""Laws of expert shares and of the separation of skills."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora.demo.usage import (
    clearest_routers,
    example_shares,
    layer_shares,
    separation,
    shuffled_separation,
    skill_shares,
    stack_routing_weights,
)
from moelora.routing import top_k_routing


@st.composite
def shares(draw: st.DrawFn) -> Tensor:
    """Shares of texts, routers and experts, summing to 1."""
    sizes = [draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 5))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return torch.randn(*sizes, generator=generator).mul(3).softmax(dim=-1)


def test_routing_is_stacked_by_router_and_padding_weighs_nothing() -> None:
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    routing = {name: top_k_routing(one, top_k=2) for name, one in zip("ab", logits, strict=True)}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    stacked = stack_routing_weights(routing, mask)
    assert stacked.shape == (2, 3, 2, 4)
    assert torch.equal(stacked[0, 2, 1], routing["b"].routing_weights[2])
    assert torch.equal(stacked[1, 0, 0], routing["a"].routing_weights[3])
    assert (stacked[1, 1:] == 0).all()


@given(shares(), st.integers(0, 5))
def test_padding_a_text_changes_no_share(weights: Tensor, padding: int) -> None:
    # (batch, seq, routers, experts) with as many tokens as there were texts
    batch = weights.unsqueeze(0)
    padded = torch.cat([batch, torch.zeros(1, padding, *batch.shape[2:])], dim=1)
    assert torch.allclose(example_shares(padded), example_shares(batch))
    assert torch.allclose(example_shares(batch).sum(-1), torch.ones(batch.shape[2]))


@given(shares())
def test_skills_that_are_alike_are_not_separated(one: Tensor) -> None:
    twice = torch.cat([one, one])
    skills = torch.tensor([0] * len(one) + [1] * len(one))
    assert separation(skill_shares(twice, skills)).abs().max() < 1e-6


@given(shares())
def test_separation_lies_between_zero_and_its_bound(by_skill: Tensor) -> None:
    values = separation(by_skill)
    assert (values >= 0).all()
    assert (values <= 1 - 1 / len(by_skill) + 1e-6).all()


@given(shares())
def test_renaming_experts_changes_no_separation(by_skill: Tensor) -> None:
    assert torch.allclose(separation(by_skill.flip(-1)), separation(by_skill), atol=1e-6)


def test_skills_with_experts_of_their_own_reach_the_bound() -> None:
    by_skill = torch.eye(4).unsqueeze(1)
    assert separation(by_skill).item() == pytest.approx(1 - 1 / 4)


def test_shuffled_texts_are_separated_less_than_sorted_ones() -> None:
    own = torch.eye(2).repeat_interleave(20, dim=0).unsqueeze(1)
    skills = torch.tensor([0] * 20 + [1] * 20)
    shuffled = shuffled_separation(own, skills, seed=0)
    assert shuffled.item() < 0.2 < separation(skill_shares(own, skills)).item()
    assert torch.equal(shuffled, shuffled_separation(own, skills, seed=0))


def test_a_layer_has_the_mean_of_its_routers() -> None:
    by_skill = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    assert layer_shares(by_skill, [4, 4, 7]).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert layer_shares(by_skill, [7, 4, 7]).tolist() == [[0.0, 1.0], [0.75, 0.25]]


def test_of_each_layer_the_clearest_router_is_chosen() -> None:
    assert clearest_routers(torch.tensor([0.1, 0.3, 0.2, 0.0]), [1, 1, 0, 0]) == {0: 2, 1: 1}
