"""``torch_compile=True``: the same gradients, the same figures, or an error with a name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lm import run_python
from tests.tracing import needs_model_tracing
from tests.trainer.compiled import CELLS

pytestmark = [pytest.mark.slow, needs_model_tracing]
CODE = "from tests.trainer.compiled import main; main()"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cells, run in a process of their own: the shape checks of this one cannot be traced."""
    finished = run_python(CODE, tmp_path_factory.mktemp("compiled"), *CELLS)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line for line in finished.stdout.splitlines() if line.startswith("CELL ")]
    found = [json.loads(line.removeprefix("CELL ")) for line in lines]
    return {each["cell"]: each for each in found}


@pytest.mark.parametrize("cell", [name for name in CELLS if name != "refused"])
def test_a_compiled_step_has_the_gradients_of_a_plain_one(
    cell: str, verdicts: dict[str, Any]
) -> None:
    found = verdicts[cell]
    assert found["error"] is None
    assert found["graphs"] > 0
    assert found["close"]
    assert found["matters"]


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.logs])
def test_the_callback_logs_of_a_compiled_model_what_it_logs_of_a_plain_one(
    cell: str, verdicts: dict[str, Any]
) -> None:
    found, expected = verdicts[cell]["logs"], verdicts[cell]["expected_logs"]
    assert len(found) == len(expected) == (3 if cell == "three_steps" else 1)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_a_loss_of_ones_own_is_refused_without_the_callback_when_compiled_too(
    verdicts: dict[str, Any],
) -> None:
    assert verdicts["refused"]["graphs"] > 0
    assert "MoETrainerCallback" in verdicts["refused"]["error"]
