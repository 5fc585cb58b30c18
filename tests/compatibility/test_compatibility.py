"""Every cell of the compatibility table is a test, and the page is what the table says."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.compatibility.page import PAGE, all_cases, public_methods, render, rows
from tests.compatibility.registry import KINDS, Case, Refusal
from tests.lm import assert_same_snapshot, snapshot, token_ids
from tests.tolerances import assert_equal


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in all_cases()])
def test_a_cell_of_the_table_is_true(case: Case, tmp_path: Path) -> None:
    # PEFT warns of things that are no business of these tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = case.function(case.kind, tmp_path)
        if case.error is not None:
            assert isinstance(result, Refusal)
            _assert_refused(case, result)


def _assert_refused(case: Case, refusal: Refusal) -> None:
    assert case.error is not None
    before = None
    if refusal.model is not None:
        before = snapshot(refusal.model), refusal.model(token_ids()).logits
    with pytest.raises(case.error) as caught:
        refusal.call()
    assert type(caught.value) is case.error
    assert str(caught.value).startswith(case.note), str(caught.value)
    if refusal.model is not None:
        assert before is not None
        assert_same_snapshot(snapshot(refusal.model), before[0])
        assert_equal(refusal.model(token_ids()).logits, before[1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "explicit" if kind.explicit else "mixture")
def test_every_public_method_is_in_the_table(kind: object) -> None:
    covered = {method for case in all_cases() if case.kind == kind for method in case.covers}
    missing = sorted(public_methods() - covered)
    assert not missing, f"no case speaks of {missing}: add one to tests/compatibility"


def test_the_table_speaks_of_no_method_that_is_gone() -> None:
    covered = {method for case in all_cases() for method in case.covers}
    assert not covered - public_methods()


def test_no_cell_is_empty_and_none_is_given_twice() -> None:
    cells = [(case.area, case.name, case.kind.title) for case in all_cases()]
    assert len(cells) == len(set(cells))
    empty = [key for key, found in rows().items() if len(found) != len(KINDS)]
    assert not empty, f"only one kind of model is tested for {empty}"
    assert all(case.note for case in all_cases())


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m tests.compatibility"
