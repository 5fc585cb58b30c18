"""Auxiliary losses as pure functions: laws, and loops that define them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora import load_balancing_loss, router_z_loss, switch_loss, top_k_routing
from moelora.losses import auxiliary_loss, gradient_by_statistics, loss_of_statistics
from tests.models import gradients, unchecked_types
from tests.tolerances import assert_close, assert_equal

LOSSES: dict[str, Callable[..., Tensor]] = {
    "aux_loss": lambda logits, k, mask=None: load_balancing_loss(
        logits.softmax(dim=-1), logits.topk(k, dim=-1).indices, token_mask=mask
    ),
    "switch": lambda logits, _, mask=None: switch_loss(logits.softmax(dim=-1), token_mask=mask),
    "z_loss": lambda logits, _, mask=None: router_z_loss(logits, token_mask=mask),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


@st.composite
def routers(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """Logits in float64, a k, and a mask with at least one real token."""
    tokens, experts = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    return logits.requires_grad_(), draw(st.integers(1, experts)), torch.tensor(mask)


def balance_by_hand(logits: Tensor, top_k: int, mask: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` with ``f_e`` the share of slots and ``P_e`` the mean probability."""
    tokens = [row for row, real in zip(logits, mask, strict=True) if real]
    experts = logits.shape[-1]
    total = logits.new_zeros(())
    for expert in range(experts):
        slots = sum(expert in row.topk(top_k).indices.tolist() for row in tokens)
        mean = sum(row.softmax(dim=-1)[expert] for row in tokens) / len(tokens)
        total = total + slots / (len(tokens) * top_k) * mean
    return experts * total


def z_by_hand(logits: Tensor, mask: Tensor) -> Tensor:
    tokens = [row for row, real in zip(logits, mask, strict=True) if real]
    return sum(row.exp().sum().log() ** 2 for row in tokens) / len(tokens)  # type: ignore[return-value]


@given(router=routers())
def test_every_loss_equals_its_loop_with_gradients(router: tuple[Tensor, int, Tensor]) -> None:
    logits, top_k, mask = router
    for loss, expected in (
        ("aux_loss", balance_by_hand(logits, top_k, mask)),
        ("switch", balance_by_hand(logits, 1, mask)),
        ("z_loss", z_by_hand(logits, mask)),
    ):
        value = LOSSES[loss](logits, top_k, mask)
        assert_close(value, expected)
        assert_close(gradients(value, [logits]), gradients(expected, [logits]))


@every_loss
@given(router=routers())
def test_masked_tokens_count_nowhere(loss: str, router: tuple[Tensor, int, Tensor]) -> None:
    logits, top_k, mask = router
    masked = LOSSES[loss](logits, top_k, mask)
    assert_close(masked, LOSSES[loss](logits[mask], top_k))
    (gradient,) = gradients(masked, [logits])
    assert_equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@every_loss
@given(router=routers(), seed=st.integers(0, 99))
def test_the_order_of_tokens_and_of_experts_does_not_matter(
    loss: str, router: tuple[Tensor, int, Tensor], seed: int
) -> None:
    logits, top_k, _ = router
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(logits.shape[0], generator=generator)
    experts = torch.randperm(logits.shape[1], generator=generator)
    assert_close(LOSSES[loss](logits[tokens][:, experts], top_k), LOSSES[loss](logits, top_k))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_a_balanced_router_has_balancing_loss_one_for_every_k(top_k: int) -> None:
    # each token prefers another expert, in a circle
    logits = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)]).double()
    assert_close(LOSSES["aux_loss"](logits, top_k), torch.ones((), dtype=torch.float64))


def test_one_expert_that_takes_everything_costs_the_number_of_experts() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0]] * 5)
    assert_close(LOSSES["aux_loss"](logits, 1), torch.tensor(3.0))


def test_the_balancing_loss_can_be_less_than_one() -> None:
    """A law that sounds right and is false: slots and probabilities may disagree."""
    probabilities = torch.tensor([[0.0, 0.51, 0.49], [0.51, 0.0, 0.49]])
    assert float(switch_loss(probabilities)) == pytest.approx(0.765)


def test_the_balancing_loss_sends_gradient_only_through_the_probabilities() -> None:
    probabilities = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0], [0], [0], [1]])
    loss = load_balancing_loss(probabilities, chosen)
    (gradient,) = torch.autograd.grad(loss, [probabilities])
    share = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    assert_close(gradient, (3 * share / 4).expand(4, 3))


@given(router=routers())
def test_the_z_loss_is_never_negative(router: tuple[Tensor, int, Tensor]) -> None:
    assert float(router_z_loss(router[0].detach())) >= 0


def test_the_z_loss_is_zero_where_the_logits_are_normalised() -> None:
    logits = torch.full((3, 4), -math.log(4), dtype=torch.float64)
    assert_close(router_z_loss(logits), torch.zeros((), dtype=torch.float64))


@every_loss
@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)], ids=["none", "empty"])
def test_no_tokens_at_all_give_zero(loss: str, mask: Tensor | None) -> None:
    assert_equal(LOSSES[loss](torch.zeros(0, 3), 2, mask), torch.zeros(()))


@every_loss
def test_only_padding_gives_zero_and_finite_gradients(loss: str) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    value = LOSSES[loss](logits, 2, torch.zeros(4, dtype=torch.bool))
    assert_equal(value.detach(), torch.zeros(()))
    assert_equal(gradients(value, [logits]), [torch.zeros(4, 3)])


@every_loss
def test_gradcheck(loss: str) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(lambda value: LOSSES[loss](value, 2, mask), [logits])


@every_loss
@given(router=routers())
def test_the_config_names_choose_the_loss(loss: str, router: tuple[Tensor, int, Tensor]) -> None:
    logits, top_k, mask = router
    routing = top_k_routing(logits, top_k=top_k)
    chosen = auxiliary_loss(routing, loss_type=loss, token_mask=mask)
    assert_close(chosen, LOSSES[loss](logits, top_k, mask))


def test_an_unknown_loss_is_refused() -> None:
    routing = top_k_routing(torch.zeros(1, 2), top_k=1)
    with pytest.raises(ValueError, match="loss_type must be .*'switch'.* got 'entropy'"):
        auxiliary_loss(routing, loss_type="entropy")


def test_inputs_of_different_length_are_refused() -> None:
    match = "router_probs holds 2 tokens but selected_experts 3"
    with unchecked_types(), pytest.raises(ValueError, match=match):
        load_balancing_loss(torch.full((2, 2), 0.5), torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("loss_type", ["aux_loss", "switch", "z_loss"])
@pytest.mark.parametrize(("experts", "width"), [(3, 3), (3, 8)])
def test_the_gradient_by_statistics_is_that_of_the_loss(
    loss_type: str, experts: int, width: int
) -> None:
    statistics = torch.rand(3 * width + 2, dtype=torch.float64, requires_grad=True)
    loss = loss_of_statistics(statistics[None], num_experts=experts, loss_type=loss_type)
    (expected,) = torch.autograd.grad(loss.sum(), statistics)
    found = gradient_by_statistics(statistics.detach(), num_experts=experts, loss_type=loss_type)
    torch.testing.assert_close(found, expected)
