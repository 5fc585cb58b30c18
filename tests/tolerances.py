"""The one table of tolerances, and the one way to compare tensors.

Loosening a row is a commit of its own, with the measured error in its message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far a value may lie from the expected one: ``atol + rtol * abs(expected)``."""

    rtol: float
    atol: float


# rtol: for float64 what the laws must hold to; below it about two to ten units in the last place of
# the dtype, since outputs are sums over ranks that were rounded once.
# atol: the same at the size of the terms, about 0.1 to 1, for sums that cancel.
TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-7, atol=1e-9),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-2),
}
EXACT = Tolerance(rtol=0, atol=0)

Comparable = Union[Tensor, None, Sequence["Comparable"]]  # noqa: UP007 - refers to itself


def assert_close(
    actual: Comparable,
    expected: Comparable,
    *,
    dtype: torch.dtype | None = None,
    check_dtype: bool = True,
) -> None:
    """Compare tensors, or sequences of tensors (gradients), by the table's row for their dtype.

    Shapes must be equal and NaN is equal to nothing, not even to itself. Integers and booleans must
    be equal exactly.

    Args:
        actual: what the code under test returned; a gradient may be None.
        expected: what it should be, of the same dtype unless ``check_dtype`` is False.
        dtype: the row to use instead of ``actual``'s own, for a float32 result of a bfloat16 model.
        check_dtype: False to hold a result against an oracle of higher precision.
    """
    _compare(
        actual,
        expected,
        lambda tensor: TOLERANCES.get(dtype or tensor.dtype, EXACT),
        check_dtype=check_dtype,
    )


def assert_equal(actual: Comparable, expected: Comparable) -> None:
    """Compare to the bit, for laws that change nothing: save and load, uninstall, no weights."""
    _compare(actual, expected, lambda _: EXACT, check_dtype=True)


def _compare(
    actual: Comparable,
    expected: Comparable,
    tolerance_of: Callable[[Tensor], Tolerance],
    *,
    check_dtype: bool,
) -> None:
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        torch.testing.assert_close(
            actual,
            expected,
            **tolerance_of(actual)._asdict(),
            check_dtype=check_dtype,
            equal_nan=False,
        )
    elif isinstance(actual, Sequence) and isinstance(expected, Sequence):
        for one, other in zip(actual, expected, strict=True):
            _compare(one, other, tolerance_of, check_dtype=check_dtype)
    else:
        assert actual is None, f"got {actual!r}, expected {expected!r}"
        assert expected is None, f"got None, expected {expected!r}"
