"""Balance statistics: what they are made of, and what one process makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora import ConfigError, MoELoraConfig, top_k_routing
from moelora.distributed import average_over_ranks, number_of_ranks, statistics_of, sum_over_ranks
from moelora.losses import auxiliary_loss, loss_of_statistics
from moelora.routing import Routing
from tests.lm import gradients_of, mixture, token_ids
from tests.tolerances import assert_close, assert_equal

LOSS_TYPES = ["aux_loss", "switch", "z_loss"]


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Routing, Tensor | None]:
    """A decision over some tokens, and perhaps which of them are real."""
    tokens, experts = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    logits = torch.randn(tokens, experts, generator=generator, requires_grad=True)
    routing = top_k_routing(logits, top_k=draw(st.integers(1, experts)))
    masked = draw(st.booleans())
    mask = torch.rand(tokens, generator=generator) > 0.4 if masked else None
    return routing, mask


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(decision=decisions())
def test_the_losses_follow_from_the_statistics(
    loss_type: str, decision: tuple[Routing, Tensor | None]
) -> None:
    routing, mask = decision
    expected = auxiliary_loss(routing, loss_type=loss_type, token_mask=mask)
    values = statistics_of(routing, token_mask=mask)
    experts = routing.router_logits.shape[-1]
    found = loss_of_statistics(values[None], num_experts=experts, loss_type=loss_type)[0]
    assert_close(found, expected)
    logits = [routing.router_logits]
    wanted = torch.autograd.grad(expected, logits, retain_graph=True, materialize_grads=True)
    assert_close(list(torch.autograd.grad(found, logits, materialize_grads=True)), list(wanted))


def test_without_a_process_group_there_is_one_rank() -> None:
    values = torch.randn(3, requires_grad=True)
    assert number_of_ranks() == 1
    assert sum_over_ranks(values) is values
    assert_equal(average_over_ranks([values]), [values])


@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_in_one_process_the_option_changes_nothing(scope: str) -> None:
    gradients = []
    for balance_over_ranks in (False, True):
        model = mixture(router_scope=scope, balance_over_ranks=balance_over_ranks).train()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append(gradients_of(model))
    assert_equal(gradients[1], gradients[0])


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_the_option_is_a_flag(value: object) -> None:
    with pytest.raises(ConfigError, match="balance_over_ranks must be True or False"):
        MoELoraConfig(balance_over_ranks=value)
