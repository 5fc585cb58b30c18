"""The products that accumulate an update into a base output, on their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora.ops.products import two_products, update_first, with_update


def _operands(d_in: int, d_out: int, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(d_in + 10 * d_out)
    x = torch.randn(*batch, d_in, dtype=torch.float64)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    ranks = torch.randn(x[..., 0].numel(), 3, dtype=torch.float64)
    return x, weight, ranks, torch.randn(d_out, 3, dtype=torch.float64)


@given(
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 12),
    batch=st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple),
)
def test_two_products_are_the_layer_and_its_update_in_either_order(
    d_in: int, d_out: int, batch: tuple[int, ...]
) -> None:
    x, weight, ranks, lora_b = _operands(d_in, d_out, batch)
    flat = x.reshape(-1, d_in)
    expected = x @ weight.t() + (ranks @ lora_b.t()).reshape(*batch, d_out)
    torch.testing.assert_close(two_products(flat, weight, ranks, lora_b, x.shape), expected)
    torch.testing.assert_close(
        with_update(x, flat, weight, None, ranks, lora_b, is_conv1d=False), expected
    )


@pytest.mark.parametrize("d_out", [3, 8], ids=["base first", "update first"])
def test_what_two_products_give_may_be_written_by_those_who_get_it_from_autograd(
    d_out: int,
) -> None:
    x, weight, ranks, lora_b = _operands(4, d_out, (2, 3))
    assert update_first(weight, None, is_conv1d=False) is (d_out == 8)

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return two_products(x.reshape(-1, 4), weight, ranks, lora_b, x.shape)

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] @ weight

    x.requires_grad_()
    output = Identity.apply(x)
    assert output.shape == (2, 3, d_out)
    assert output.is_contiguous()
    assert not output._is_view()
    output.relu_().sum().backward()
    kept = (output.detach() > 0).to(x)
    torch.testing.assert_close(x.grad, kept @ weight)
