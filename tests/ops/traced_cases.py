"""The operators of traces against the reference of the routed op; run as a script, in Triton's
interpreter.

TRITON_INTERPRET=1 python -m tests.ops.traced_cases
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from moelora.ops import Member, RoutedOutput, RouterOptions
from moelora.ops.traced import routed_linear_traced
from tests.ops import routed_cases

#: What the cases of the routed op are run with, dense and sparse.
_IS_SPARSE = {"dense": False, "sparse": True}


def traced(
    x: Tensor,
    member: Member,
    *,
    options: RouterOptions,
    token_mask: Tensor | None = None,
    all_mature: bool = False,
    is_sparse: bool,
) -> RoutedOutput:
    """A layer by its operator; sparse where that is possible."""
    countable = token_mask is None or options.capacity_factor is not None
    known = member.mature is None or all_mature
    return routed_linear_traced(
        x, member, options=options, token_mask=token_mask,
        is_sparse=is_sparse and countable and known and member.dropped is None,
    )  # fmt: skip


def through_operators(*, is_sparse: bool) -> list[tuple[Any, list[float]]]:
    """The cases of the routed op with their errors, all computed by the operators."""

    def several(
        x: Tensor, members: list[Member], *, backend: str, **told: Any
    ) -> list[RoutedOutput]:
        assert backend == "triton"
        return [traced(x, member, is_sparse=is_sparse, **told) for member in members]

    def without_gradients(x: Tensor, members: list[Member], **told: Any) -> list[RoutedOutput]:
        with torch.no_grad():
            return several(x, members, **told)

    def one(x: Tensor, *tensors: Any, mature: Tensor | None = None, **told: Any) -> RoutedOutput:
        return several(x, [Member(*tensors, mature)], **told)[0]

    names = ("routed_linear", "routed_linears", "routed_linears_inference")
    kept = [getattr(routed_cases, name) for name in names]
    try:
        for name, function in zip(names, (one, several, without_gradients), strict=True):
            setattr(routed_cases, name, function)
        return list(routed_cases.on_the_kernels())
    finally:
        for name, function in zip(names, kept, strict=True):
            setattr(routed_cases, name, function)


def decided() -> list[float]:
    """What is recorded with gradients and without, against each other."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 9, 12), (7, 12), (8, 12), (7, 8), (4, 12))
    x, weight, *rest = (torch.randn(*shape, generator=generator) for shape in shapes)
    told: dict[str, Any] = {"options": RouterOptions(4, 2, 2.0, 1.7), "record": True}
    trained = routed_linear_traced(x, Member(weight, None, *rest), **told)
    with torch.no_grad():
        found = routed_linear_traced(x, Member(weight, None, *rest), **told)
    results = (found.output, found.router_logits, found.routing_weights)
    others = (trained.output, trained.router_logits, trained.routing_weights)
    assert all(result is not None for result in (*results, *others))
    return [routed_cases.relative(a, b.double()) for a, b in zip(results, others, strict=True)]  # type: ignore[arg-type]


def operator_arguments(
    *, dtype: torch.dtype, loss_type: str | None, is_sparse: bool, needs: bool
) -> tuple[Any, ...]:
    """Arguments of the operator, with padding, bias and a capacity."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(2, 9, 16).to(dtype).requires_grad_(needs)
    mask = torch.rand(18, generator=generator) > 0.3
    weight, bias = normal(7, 16).to(dtype), normal(7).to(dtype)
    pair = [t.requires_grad_(needs) for t in (normal(16, 16), normal(7, 16), normal(8, 16))]
    options = (8, 2, 2.0, 1.7, 1.0, loss_type, is_sparse)
    return x, mask, None, weight, bias, *pair, None, False, *options


#: Not that equal calls give equal results: some of what is kept for backward is never written.
_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_operators() -> None:
    """Raise if one of what the dispatcher, autograd and the compiler rely on is not so."""
    forward, infer = torch.ops.moelora.routed_linear, torch.ops.moelora.routed_linear_inference
    for dtype in (torch.float32, torch.bfloat16):
        for loss_type, is_sparse in (("aux_loss", False), (None, False), ("switch", True)):
            told = {"dtype": dtype, "loss_type": loss_type, "is_sparse": is_sparse}
            arguments = operator_arguments(**told, needs=True)
            torch.library.opcheck(forward.default, arguments, test_utils=_CHECKS)
    arguments = operator_arguments(
        dtype=torch.float32, loss_type=None, is_sparse=False, needs=False
    )
    for record in (True, False):
        without_capacity = (*arguments[:14], None, *arguments[15:], record)
        torch.library.opcheck(infer.default, without_capacity, test_utils=_CHECKS)


def main() -> int:
    """Run everything; say what is wrong."""
    wrong: list[Any] = []
    for name, is_sparse in _IS_SPARSE.items():
        cases = [*through_operators(is_sparse=is_sparse), ("decided", decided())]
        wrong += [(name, case, found) for case, found in cases if not all(e < 2e-5 for e in found)]
    check_operators()
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
