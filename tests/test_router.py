"""Router modules: what they compute, in which dtype, and how they start."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moelora import RoutingWeightsError
from moelora.router import ROUTER_INIT_STD, ModuleRouter
from tests.models import gradients
from tests.tolerances import assert_close, assert_equal


@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 6),
    experts=st.integers(1, 5),
    hidden=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
)
def test_logits_equal_the_formula_with_gradients(
    tokens: int, width: int, experts: int, hidden: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    router = ModuleRouter(in_features=width, num_experts=experts, hidden_size=hidden).double()
    x = torch.randn(2, tokens, width, dtype=torch.float64, requires_grad=True)
    expected = x
    if router.hidden_weight is not None:
        inner = torch.einsum("bti,hi->bth", x, router.hidden_weight)
        expected = inner / (1 + (-inner).exp())
    expected = torch.einsum("bth,eh->bte", expected, router.weight)
    output = router(x)
    assert_close(output, expected)
    inputs = [x, *router.parameters()]
    assert_close(gradients(output, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("hidden", [None, 3])
def test_a_router_of_an_embedding_reads_one_hot_vectors(hidden: int | None) -> None:
    router = ModuleRouter(in_features=7, num_experts=3, hidden_size=hidden, reads_indices=True)
    dense = copy.deepcopy(router)
    dense.reads_indices = False
    ids = torch.tensor([[0, 6, 3]])
    assert_close(router(ids), dense(F.one_hot(ids, 7).float()))


@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [None, 3])
def test_logits_are_float32_whatever_the_dtypes(
    hidden: int | None, dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    router = ModuleRouter(in_features=6, num_experts=4, hidden_size=hidden).to(dtype)
    x = torch.randn(5, 6).to(input_dtype)
    logits = router(x)
    assert logits.dtype == torch.float32
    assert_close(logits, copy.deepcopy(router).float()(x.float()))


def test_autocast_does_not_lower_the_logits_precision() -> None:
    router = ModuleRouter(in_features=6, num_experts=4)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x)
    assert_equal(logits, router(x))


def test_rows_start_small_random_and_different() -> None:
    router = ModuleRouter(in_features=400, num_experts=8)
    assert float(router.weight.std()) == pytest.approx(ROUTER_INIT_STD, rel=0.1)
    assert len({tuple(row.tolist()) for row in router.weight}) == 8


def test_a_hidden_layer_starts_random_too() -> None:
    router = ModuleRouter(in_features=40, num_experts=8, hidden_size=16)
    assert router.hidden_weight is not None
    assert float(router.hidden_weight.std()) > 0
    before = router.hidden_weight.detach().clone()
    router.reset_parameters()
    assert not torch.equal(router.hidden_weight, before)


@pytest.mark.parametrize(
    ("hidden", "track", "names"),
    [
        (None, False, ["weight"]),
        (3, False, ["hidden_weight", "weight"]),
        (3, True, ["hidden_weight", "mature", "weight"]),
    ],
)
def test_tensors_lie_directly_in_the_router(
    hidden: int | None, track: bool, names: list[str]
) -> None:
    for dropout in (0.0, 0.5):
        router = ModuleRouter(
            in_features=6,
            num_experts=4,
            hidden_size=hidden,
            track_maturity=track,
            expert_dropout=dropout,
        )
        assert sorted(router.state_dict()) == names


def test_experts_start_mature() -> None:
    router = ModuleRouter(in_features=6, num_experts=3, track_maturity=True)
    assert router.mature is not None
    assert router.mature.tolist() == [True, True, True]


@pytest.mark.parametrize("hidden", [None, 3])
def test_hidden_states_of_another_width_are_refused(hidden: int | None) -> None:
    router = ModuleRouter(in_features=6, num_experts=3, hidden_size=hidden)
    with pytest.raises(RoutingWeightsError, match="reads hidden states of width 6, got 5"):
        router(torch.zeros(2, 5))


def test_experts_are_left_out_as_any_dropout_says() -> None:
    router = ModuleRouter(in_features=6, num_experts=3, expert_dropout=0.25)
    assert router.dropped_share == 0.25
    assert router.eval().dropped_share == 0.0
    for module in router.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert router.dropped_share == 0.0
    assert ModuleRouter(in_features=6, num_experts=3).dropped_share == 0.0


def test_repr_names_the_sizes() -> None:
    plain = ModuleRouter(in_features=6, num_experts=4)
    hidden = ModuleRouter(in_features=6, num_experts=4, hidden_size=3)
    assert repr(plain) == "ModuleRouter(num_experts=4)"
    assert repr(hidden) == "ModuleRouter(num_experts=4, hidden_size=3)"


def test_a_routers_input_is_not_written_to() -> None:
    router = ModuleRouter(in_features=6, num_experts=4, hidden_size=3)
    x = torch.ones(2, 6)
    router(x)
    untouched: Tensor = torch.ones(2, 6)
    assert_equal(x, untouched)
