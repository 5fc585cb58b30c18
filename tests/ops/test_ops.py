"""The arithmetic of a mixture, held against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.ops import lora_combine, lora_combine_reference, mix_ranks
from tests.models import gradients
from tests.tolerances import assert_close, assert_equal

BACKENDS = {"eager": lora_combine}
Mixture = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """A small mixture problem. Sizes and a seed are drawn, so failures shrink and replay."""
    tokens, experts = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    r, d_in, d_out = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = normal(tokens, experts)
    # an expert nobody chose
    weights[:, 0] *= draw(st.booleans())
    inputs = (normal(tokens, d_in), normal(experts * r, d_in), normal(d_out, experts * r), weights)
    return tuple(tensor.requires_grad_() for tensor in inputs)  # type: ignore[return-value]


def by_hand(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """The formula in indices, sharing no code with the package."""
    experts = weights.shape[1]
    a = lora_a.unflatten(0, (experts, -1))
    b = lora_b.unflatten(1, (experts, -1))
    return torch.einsum("te,oer,eri,ti->to", weights, b, a, x)


@given(mixture=mixtures())
def test_the_reference_is_the_formula(mixture: Mixture) -> None:
    output, expected = lora_combine_reference(*mixture), by_hand(*mixture)
    assert_close(output, expected)
    if len(output):
        assert_close(gradients(output, mixture), gradients(expected, mixture))


@pytest.mark.parametrize("backend", BACKENDS)
@given(mixture=mixtures())
def test_every_backend_matches_the_reference(backend: str, mixture: Mixture) -> None:
    output, expected = BACKENDS[backend](*mixture), lora_combine_reference(*mixture)
    assert_close(output, expected)
    if len(output):
        assert_close(gradients(output, mixture), gradients(expected, mixture))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(mixture=mixtures())
def test_gradcheck(backend: str, mixture: Mixture) -> None:
    assert torch.autograd.gradcheck(BACKENDS[backend], mixture)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5)
@given(mixture=mixtures())
def test_second_derivatives_exist(backend: str, mixture: Mixture) -> None:
    assert torch.autograd.gradgradcheck(BACKENDS[backend], mixture)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2,), (1, 1, 2), (3, 1, 2), (1, 4, 2), (3, 4, 2)])
def test_weights_broadcast_over_leading_axes(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    a, b = torch.randn(6, 5, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    weights = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = BACKENDS[backend](x, a, b, weights)
    full = weights.expand(3, 4, 2)
    expected = by_hand(x.flatten(0, 1), a, b, full.flatten(0, 1)).unflatten(0, (3, 4))
    assert_close(output, expected)
    assert_close(gradients(output, [weights]), gradients(expected, [weights]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_depends_on_another(backend: str) -> None:
    x, a, b, weights = (torch.randn(*s).double() for s in [(4, 5), (6, 5), (7, 6), (4, 3)])
    whole = BACKENDS[backend](x, a, b, weights)
    alone = [BACKENDS[backend](x[t : t + 1], a, b, weights[t : t + 1]) for t in range(4)]
    assert_close(torch.cat(alone), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_has_the_inputs_dtype_whatever_the_weights_have(
    backend: str, dtype: torch.dtype
) -> None:
    x, a, b = (torch.randn(*s).to(dtype) for s in [(4, 5), (6, 5), (7, 6)])
    weights = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    output = BACKENDS[backend](x, a, b, weights)
    assert output.dtype == dtype
    assert gradients(output, [weights])[0].dtype == torch.float64


@pytest.mark.parametrize("function", [lora_combine_reference, *BACKENDS.values()])
def test_a_rank_that_cannot_be_split_is_refused(function: object) -> None:
    x, a, b = torch.ones(1, 2), torch.ones(5, 2), torch.ones(2, 5)
    with pytest.raises(ValueError, match="ranks=5 cannot be split evenly over experts=2"):
        function(x, a, b, torch.ones(1, 2))  # type: ignore[operator]


@pytest.mark.parametrize("function", [lora_combine_reference, *BACKENDS.values()])
def test_no_experts_are_refused(function: object) -> None:
    x, a, b = torch.ones(1, 2), torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match="over experts=0"):
        function(x, a, b, torch.ones(1, 0))  # type: ignore[operator]


def test_mixing_ranks_scales_each_experts_own_share() -> None:
    ranks = torch.arange(6.0).reshape(1, 6)
    mixed = mix_ranks(ranks, torch.tensor([[1.0, 0.0, -2.0]]))
    assert_equal(mixed, torch.tensor([[0.0, 1.0, 0.0, 0.0, -8.0, -10.0]]))


def test_mixing_ranks_writes_to_no_argument() -> None:
    ranks, weights = torch.ones(2, 4), torch.full((2, 2), 3.0)
    mix_ranks(ranks, weights)
    assert_equal([ranks, weights], [torch.ones(2, 4), torch.full((2, 2), 3.0)])
