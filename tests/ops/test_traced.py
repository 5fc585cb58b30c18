"""The operators that stand for the routed op in a trace: their values, gradients and shapes."""

from __future__ import annotations

from tests.interpreter import run_interpreted


def test_the_operators_equal_the_reference_and_keep_what_compilers_rely_on() -> None:
    finished = run_interpreted("tests.ops.traced_cases")
    assert finished.returncode == 0, finished.stderr[-3000:]
