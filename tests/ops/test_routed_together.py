"""Layers that read one input, on the kernels together, against each layer's definition."""

from __future__ import annotations

import torch

from moelora.ops import Member, RouterOptions, routed_linear, routed_linears
from tests.interpreter import run_interpreted
from tests.tolerances import assert_close


def test_the_kernels_serve_layers_with_one_input_together_with_all_gradients() -> None:
    finished = run_interpreted("tests.ops.shared_cases")
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_layers_served_together_equal_each_layer_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    options = RouterOptions(3, 2, 1.0, 2.0, 1.25, "aux_loss")
    members = [
        Member(
            torch.randn(width, 6), None, torch.randn(6, 6), torch.randn(width, 6), torch.randn(3, 6)
        )
        for width in (4, 7)
    ]
    for member, together in zip(members, routed_linears(x, members, options=options), strict=True):
        alone = routed_linear(x, *member[:5], options=options)
        assert torch.equal(together.output, alone.output)
        # sums over the tokens, which may be taken in another order
        assert_close(together.statistics, alone.statistics)
