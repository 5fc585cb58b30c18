"""Names, suites and filters."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.bar import AIMS
from benchmarks.baselines import BUILDERS
from benchmarks.cases import (
    MODES,
    SUITES,
    Case,
    Conditions,
    UnknownNameError,
    Variant,
    cases_of,
    groups_of,
    mixture,
    select,
)
from benchmarks.ops import make_problem  # noqa: F401 - its kinds are below
from benchmarks.shapes import DTYPES, SHAPES

OP_KINDS = {"linear", "combine", "fused", "routed", "loop"}


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_a_suite_has_a_name_of_its_own(suite: str) -> None:
    names = [case.name for case in cases_of(suite)]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_names_things_that_exist(suite: str) -> None:
    for case in cases_of(suite):
        conditions, variant = case.conditions, case.variant
        assert conditions.mode in MODES
        assert conditions.dtype in DTYPES
        if conditions.kind == "op":
            assert re.fullmatch(r"\d+x\d+", conditions.shape)
            assert variant.kind in OP_KINDS
        else:
            assert conditions.shape in SHAPES
            assert variant.kind in BUILDERS


def test_a_name_tells_conditions_and_sizes() -> None:
    conditions = Conditions("train", "llama-1b", 4, 1024, checkpointing="reentrant")
    case = Case(conditions, mixture(64, 4, r=8, detail="layer"))
    assert case.name == "train/llama-1b/4x1024/bf16/eager/reentrant/moelora-e64-k4-r8-layer"
    assert Variant("lora", adapter_dtype="base").name == "lora-r16-halfadapters"


def test_the_bar_suite_measures_every_aim_of_the_gpu_in_groups() -> None:
    measured = {case.name for suite in ("bar", "cpu") for case in cases_of(suite)}
    assert [name for aim in AIMS for name in aim.cases if name not in measured] == []


def test_every_group_of_models_has_the_frozen_base_to_compare_with() -> None:
    for suite in ("bar", "sweep", "cpu"):
        for conditions, cases in groups_of(cases_of(suite)).items():
            kinds = {case.variant.kind for case in cases}
            assert "base" in kinds or conditions.optimizer, conditions.name


def test_what_the_host_launches_is_timed_in_turns() -> None:
    conditions = Conditions("train", "tiny", 1, 8)
    assert conditions.in_turns
    assert Conditions("generate", "tiny", 1, 8, checkpointing="reentrant").in_turns
    assert not any(replace(conditions, mode=mode).in_turns for mode in MODES if mode != "eager")
    assert not any(replace(conditions, kind=kind).in_turns for kind in ("host", "op", "leak"))


def test_filters_are_parts_of_names_or_patterns() -> None:
    cases = cases_of("tiny")
    assert select(cases, []) == cases
    assert {case.variant.kind for case in select(cases, ["/xlora"])} == {"xlora"}
    chosen = select(cases, ["decode/*/base", "leak/*lora-r16"])
    assert [case.name for case in chosen] == [
        "decode/tiny/2x8/fp32/eager/base",
        "leak/tiny/2x8/fp32/eager/lora-r16",
    ]


def test_a_filter_without_a_match_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="No case matches 'decode/llama-2'"):
        select(cases_of("tiny"), ["decode/llama-2"])


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="Unknown suite 'all': choose one of bar, sweep"):
        cases_of("all")
