"""From router logits to routing weights: laws of the pure functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora import Routing, top_k_routing
from moelora.routing import drop_experts, keep_experts, limit_capacity, share_while_immature
from tests.models import gradients
from tests.reference import routing_reference
from tests.tolerances import assert_close, assert_equal


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Router logits without ties, in float64, and a k."""
    tokens, experts = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))
    logits = spread * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), top_k


# Top-k -----------------------------------------------------------------------------------------


@given(decision=decisions())
def test_weights_equal_the_loop_with_gradients(decision: tuple[Tensor, int]) -> None:
    logits, top_k = decision
    weights = top_k_routing(logits, top_k=top_k).routing_weights
    expected = routing_reference(logits, top_k=top_k)
    assert_close(weights, expected)
    if len(logits):
        assert_close(gradients(weights, [logits]), gradients(expected, [logits]))


@given(decision=decisions())
def test_weights_of_a_token_sum_to_one(decision: tuple[Tensor, int]) -> None:
    logits, top_k = decision
    routing = top_k_routing(logits, top_k=top_k)
    sums = routing.routing_weights.sum(dim=-1)
    # k = 1 keeps the probability itself, so that the router gets a gradient
    best = routing.router_probs.max(dim=-1).values
    assert_close(sums, torch.ones_like(sums) if top_k > 1 else best)


@given(decision=decisions())
def test_exactly_the_selected_experts_have_weight(decision: tuple[Tensor, int]) -> None:
    logits, top_k = decision
    routing = top_k_routing(logits, top_k=top_k)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, routing.selected_experts, True)
    assert routing.selected_experts.shape == (len(logits), top_k)
    assert bool((routing.routing_weights[~chosen] == 0).all())
    assert bool((chosen.sum(dim=-1) == top_k).all())


@given(decision=decisions())
def test_all_experts_chosen_is_a_dense_softmax(decision: tuple[Tensor, int]) -> None:
    logits, _ = decision
    routing = top_k_routing(logits, top_k=logits.shape[-1])
    assert_close(routing.routing_weights, logits.softmax(dim=-1))


@given(decision=decisions(), seed=st.integers(0, 99))
def test_renaming_experts_renames_their_weights(decision: tuple[Tensor, int], seed: int) -> None:
    logits, top_k = decision
    order = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    renamed = top_k_routing(logits[:, order], top_k=top_k).routing_weights
    assert_close(renamed, top_k_routing(logits, top_k=top_k).routing_weights[:, order])


@given(decision=decisions())
def test_a_tokens_routing_is_its_own(decision: tuple[Tensor, int]) -> None:
    logits, top_k = decision
    whole = top_k_routing(logits, top_k=top_k)
    for token in range(len(logits)):
        alone = top_k_routing(logits[token : token + 1], top_k=top_k)
        assert_equal(alone.routing_weights[0], whole.routing_weights[token])
        assert_equal(alone.selected_experts[0], whole.selected_experts[token])


def test_one_expert_per_token_keeps_the_routers_gradient() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(top_k_routing(logits, top_k=1).routing_weights, [logits])
    assert bool((gradient != 0).all())


def test_logits_far_apart_give_finite_weights_and_gradients() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -2e4, -1e4]], requires_grad=True)
    weights = top_k_routing(logits, top_k=2).routing_weights
    (gradient,) = gradients(weights, [logits])
    assert_close(weights.sum(dim=-1), torch.ones(2))
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_an_impossible_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be between 1 and num_experts=3, got {top_k}"):
        top_k_routing(torch.zeros(1, 3), top_k=top_k)


def test_a_detached_routing_has_the_same_values_and_no_graph() -> None:
    routing = top_k_routing(torch.randn(2, 3, requires_grad=True), top_k=2)
    detached = routing.detach()
    assert_equal(detached.routing_weights, routing.routing_weights.detach())
    assert not any(value.requires_grad for value in vars(detached).values())


# Maturity --------------------------------------------------------------------------------------


@given(decision=decisions(), data=st.data())
def test_experts_share_all_tokens_until_all_are_mature(
    decision: tuple[Tensor, int], data: st.DataObject
) -> None:
    logits, top_k = decision
    experts = logits.shape[-1]
    mature = data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    sparse = top_k_routing(logits, top_k=top_k)
    shared = share_while_immature(sparse, torch.tensor(mature))
    expected = sparse.routing_weights if all(mature) else logits.softmax(dim=-1)
    assert_close(shared.routing_weights, expected)


# Capacity --------------------------------------------------------------------------------------


@given(decision=decisions(), factor=st.sampled_from([0.2, 0.5, 1.0, 1.25, 3.0]))
def test_no_expert_serves_more_tokens_than_its_capacity(
    decision: tuple[Tensor, int], factor: float
) -> None:
    logits, top_k = decision
    routing = limit_capacity(top_k_routing(logits, top_k=top_k), capacity_factor=factor)
    tokens, experts = logits.shape
    served = (routing.routing_weights > 0).sum(dim=0)
    assert bool((served <= math.ceil(round(factor * tokens * top_k / experts, 9))).all())


@given(decision=decisions(), factor=st.sampled_from([0.2, 0.5, 1.0]))
def test_capacity_goes_to_the_first_tokens_and_the_rest_renormalise(
    decision: tuple[Tensor, int], factor: float
) -> None:
    logits, top_k = decision
    before = top_k_routing(logits, top_k=top_k)
    weights = limit_capacity(before, capacity_factor=factor).routing_weights
    capacity = math.ceil(round(factor * logits.shape[0] * top_k / logits.shape[1], 9))
    served = [0] * logits.shape[1]
    for token, chosen in enumerate(before.selected_experts.tolist()):
        kept = [expert for expert in chosen if served[expert] < capacity]
        for expert in chosen:
            served[expert] += 1
        total = sum(float(before.routing_weights[token, e]) for e in kept)
        for expert in range(logits.shape[1]):
            old = float(before.routing_weights[token, expert])
            scale = 1.0 if top_k == 1 or total == 0 else 1.0 / total
            expected = old * scale if expert in kept else 0.0
            assert float(weights[token, expert]) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@settings(max_examples=40)
@given(decision=decisions(), data=st.data())
def test_capacity_is_causal(decision: tuple[Tensor, int], data: st.DataObject) -> None:
    logits, top_k = decision
    cut = data.draw(st.integers(0, len(logits)))
    other = logits.detach().clone()
    other[cut:] = torch.randn_like(other[cut:])
    one, two = (
        limit_capacity(top_k_routing(value, top_k=top_k), capacity_factor=0.5)
        for value in (logits, other)
    )
    assert_equal(one.routing_weights[:cut].detach(), two.routing_weights[:cut])


@settings(max_examples=40)
@given(decision=decisions(), data=st.data())
def test_padding_takes_no_capacity(decision: tuple[Tensor, int], data: st.DataObject) -> None:
    logits, top_k = decision
    tokens = len(logits)
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool
    )
    padded = limit_capacity(
        top_k_routing(logits, top_k=top_k), capacity_factor=0.5, token_mask=mask
    )
    alone = limit_capacity(top_k_routing(logits[mask], top_k=top_k), capacity_factor=0.5)
    assert_close(padded.routing_weights[mask], alone.routing_weights)


def test_a_token_without_any_expert_left_has_only_zeros_and_finite_gradients() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]] * 4, requires_grad=True)
    weights = limit_capacity(top_k_routing(logits, top_k=2), capacity_factor=0.4).routing_weights
    (gradient,) = gradients(weights, [logits])
    assert_equal(weights[2:], torch.zeros(2, 3))
    assert bool(torch.isfinite(gradient).all())


# Dropping experts ------------------------------------------------------------------------------


@given(decision=decisions())
def test_dropping_nothing_changes_nothing(decision: tuple[Tensor, int]) -> None:
    logits, top_k = decision
    routing = top_k_routing(logits, top_k=top_k)
    kept = drop_experts(routing, probability=0.0)
    assert_close(kept.routing_weights, routing.routing_weights)


@given(decision=decisions(), data=st.data())
def test_experts_that_stay_keep_their_proportions(
    decision: tuple[Tensor, int], data: st.DataObject
) -> None:
    logits, top_k = decision
    logits = logits.detach().clamp(-5, 5)
    routing = top_k_routing(logits, top_k=top_k)
    flags = data.draw(st.lists(st.booleans(), min_size=logits.numel(), max_size=logits.numel()))
    keep = torch.tensor(flags, dtype=torch.bool).reshape(logits.shape)
    kept = keep_experts(routing, keep=keep).routing_weights
    assert bool((kept[~keep] == 0).all())
    if top_k == 1:
        assert_close(kept, routing.routing_weights * keep)
        return
    remaining = (routing.routing_weights * keep).sum(dim=-1)
    sums = torch.where(remaining > 0, torch.ones_like(remaining), torch.zeros_like(remaining))
    assert_close(kept.sum(dim=-1), sums)
    assert_close(kept * remaining[:, None], routing.routing_weights * keep)


def test_experts_are_dropped_at_about_the_given_rate() -> None:
    routing = top_k_routing(torch.zeros(4000, 2), top_k=2)
    kept = drop_experts(routing, probability=0.25).routing_weights > 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.03


def test_functions_write_to_no_argument() -> None:
    routing = top_k_routing(torch.randn(5, 3), top_k=2)
    before = Routing(*(value.clone() for value in vars(routing).values()))
    limit_capacity(routing, capacity_factor=0.3)
    drop_experts(routing, probability=0.5)
    share_while_immature(routing, torch.tensor([True, False, True]))
    assert_equal(list(vars(routing).values()), list(vars(before).values()))


def test_losing_an_expert_of_weight_nearly_one_leaves_finite_gradients() -> None:
    # the expert that is kept has weight exp(-80): its square is no float32
    logits = torch.tensor([[0.0, 80.0, -5.0], [-5.0, 80.0, 0.0]], requires_grad=True)
    routing = limit_capacity(top_k_routing(logits, top_k=2), capacity_factor=0.5)
    assert routing.routing_weights[1].tolist() == [0.0, 0.0, 1.0]
    (routing.routing_weights * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
