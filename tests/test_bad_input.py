"""One table of wrong input: which error each gets, and that nothing of the model has changed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.bad_files import FILES
from tests.bad_input import CONFIGS, KEYWORDS, ROUTERS, STATES, WEIGHTS, World, saved_under_name
from tests.lm import (
    assert_same_snapshot,
)
from tests.models import unchecked_types
from tests.tolerances import assert_equal

TABLES = {
    "config": CONFIGS,
    "weights": WEIGHTS,
    "keyword": KEYWORDS,
    "router": ROUTERS,
    "file": FILES,
    "state": STATES,
}
CASES = {f"{kind}: {name}": bad for kind, table in TABLES.items() for name, bad in table.items()}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    bad = CASES[case]
    with warnings.catch_warnings(), unchecked_types():
        warnings.simplefilter("ignore")
        world = World(tmp_path)
        expected, before = world.logits(), world.state()
        with pytest.raises(bad.error, match=bad.match):
            bad.call(world)
        after = world.state()
        for (found, *rest), (wanted, *other) in zip(after, before, strict=True):
            assert_same_snapshot(found, wanted)
            assert rest == other
        assert_equal(world.logits(), expected)


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "/absolute"])
def test_a_refused_name_writes_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, KeyError), match="name"):
        saved_under_name(World(tmp_path), name)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
