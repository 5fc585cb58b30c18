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
from moelora.ops.traced import routed_linears_traced
from tests.ops import routed_cases

#: What the cases of the routed op are run with, dense and sparse.
_IS_SPARSE = {"dense": False, "sparse": True}


def traced(
    x: Tensor,
    members: list[Member],
    *,
    options: RouterOptions,
    token_mask: Tensor | None = None,
    all_mature: bool = False,
    is_sparse: bool,
) -> list[RoutedOutput]:
    """Layers of one kind by their operator; sparse where that is possible."""
    first = members[0]
    countable = token_mask is None or options.capacity_factor is not None
    known = first.mature is None or all_mature
    return routed_linears_traced(
        x, members, options=options, token_mask=token_mask,
        is_sparse=is_sparse and countable and known and first.dropped is None,
    )  # fmt: skip


def through_operators(*, is_sparse: bool) -> list[tuple[Any, list[float]]]:
    """The cases of the routed op with their errors, all computed by the operators."""

    def several(
        x: Tensor, members: list[Member], *, backend: str, **told: Any
    ) -> list[RoutedOutput]:
        assert backend == "triton"
        together = [members]
        if len({member.dropped is None for member in members}) > 1:
            together = [[member] for member in members]
        found = [traced(x, some, is_sparse=is_sparse, **told) for some in together]
        return [result for results in found for result in results]

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
    members = [Member(weight, None, *rest), Member(-weight, None, *rest)]
    trained = routed_linears_traced(x, members, **told)
    with torch.no_grad():
        found = routed_linears_traced(x, members, **told)
    pairs: list[tuple[Any, Any]] = []
    for one, other in zip(found, trained, strict=True):
        pairs += list(zip(one[:3], other[:3], strict=True))
    assert all(tensor is not None for pair in pairs for tensor in pair)
    return [routed_cases.relative(one, other.double()) for one, other in pairs]


def operator_arguments(
    *, number: int, dtype: torch.dtype, loss_type: str | None, is_sparse: bool, needs: bool
) -> tuple[Any, ...]:
    """Arguments of the operator of so many layers, with padding, bias and a capacity."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    members: list[Any] = []
    for width in range(7, 7 + number):
        frozen = [normal(width, 16).to(dtype), normal(width).to(dtype)]
        own = [normal(16, 16), normal(width, 16), normal(8, 16)]
        members += [*frozen, *(t.requires_grad_(needs) for t in own), None, False, None]
    x = normal(2, 9, 16).to(dtype).requires_grad_(needs)
    mask = torch.rand(18, generator=generator) > 0.3
    capacity_factor = 1.0 if needs else None
    return x, mask, *members, 8, 2, 2.0, 1.7, capacity_factor, loss_type, is_sparse


#: Not that equal calls give equal results: some of what is kept for backward is never written.
_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_backward(number: int, operator: Any, arguments: tuple[Any, ...]) -> None:
    """The same of the backward operator, with all gradients and with every other one."""
    with torch.no_grad():
        found = operator(*arguments)
    made, grads = found[number:], [torch.ones_like(output) for output in found[:number]]
    pull = torch.ones_like(made[2]) if made[2].numel() else None
    backward = getattr(torch.ops.moelora, f"routed_linears_{number}_backward").default
    # of no layer an input after dropout
    all_needs = [True, *[True, True, True, False] * number]
    for needs in (all_needs, [needed and index % 2 == 0 for index, needed in enumerate(all_needs)]):
        told = (*arguments, *grads, pull, *made, needs)
        torch.library.opcheck(backward, told, test_utils=("test_schema", "test_faketensor"))


def check_operators() -> None:
    """Raise if one of what the dispatcher, autograd and the compiler rely on is not so."""
    for number, dtype, loss_type, is_sparse in (
        (1, torch.float32, "aux_loss", False),
        (2, torch.bfloat16, None, False),
        (3, torch.bfloat16, "switch", True),
    ):
        told: dict[str, Any] = {"number": number, "dtype": dtype, "is_sparse": is_sparse}
        arguments = operator_arguments(**told, loss_type=loss_type, needs=True)
        operator = getattr(torch.ops.moelora, f"routed_linears_{number}").default
        torch.library.opcheck(operator, arguments, test_utils=_CHECKS)
        check_backward(number, operator, arguments)
        arguments = operator_arguments(**told, loss_type=None, needs=False)
        operator = getattr(torch.ops.moelora, f"routed_linears_{number}_inference").default
        for record in (True, False):
            torch.library.opcheck(operator, (*arguments, record), test_utils=_CHECKS)


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
