"""Every cell of the architecture table is a test, and the page is what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.architecture_table.bases import ARCHITECTURES, Architecture
from tests.architecture_table.cases import COLUMNS, Column, mixture_of, output_of
from tests.architecture_table.page import PAGE, render, rows
from tests.lm import lora_layers

MIXTRAL = next(a for a in ARCHITECTURES if a.title.startswith("Mixtral"))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.title)
@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: c.title)
def test_a_cell_of_the_table_is_true(
    column: Column, architecture: Architecture, tmp_path: Path
) -> None:
    column.check(architecture, tmp_path)


def test_no_cell_is_empty() -> None:
    assert [cell for row in rows() for cell in row if not cell.strip()] == []


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m tests.architecture_table"


# A base with experts of its own ----------------------------------------------------------------


def test_a_plain_adapter_is_converted_for_fused_experts_as_before() -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(MIXTRAL.make(), config)
    assert config.target_parameters == {"gate.weight", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3"], ["q_proj", "down_proj"]])
def test_fused_experts_named_beside_linears_are_left_out(targets: list[str]) -> None:
    model = mixture_of(MIXTRAL, target_modules=targets)
    assert {name.split(".")[-1] for name in lora_layers(model)} == {"q_proj"}
    output_of(MIXTRAL, model)


def test_fused_experts_alone_are_no_target() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        mixture_of(MIXTRAL, target_modules=["w1", "w2", "w3"])


def test_fused_experts_as_target_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="target_parameters is not supported"):
        mixture_of(MIXTRAL, target_modules=["q_proj"], target_parameters=["gate_up_proj"])


def test_a_router_of_the_base_is_no_linear_layer() -> None:
    with pytest.raises(ValueError, match="is not supported"):
        mixture_of(MIXTRAL, target_modules=["q_proj", "gate"])
