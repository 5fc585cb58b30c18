"""``moelora inspect``, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from moelora import MoELoraConfig, Router
from tests.cli.adapters import assert_one_line_error, moelora, save_loras
from tests.lm import lora_config, mixture, tiny_llama, two_loras


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_loras(tmp_path_factory.mktemp("loras"), tiny_model)


def test_a_composed_mixture_is_told(loras: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    moelora("compose", *loras, "--out", tmp_path / "M")
    outcome = moelora("inspect", tmp_path / "M")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == f"{tmp_path / 'M'}: a mixture of 2 experts"
    assert f"base model   {tiny_model}" in lines
    assert "targets      q_proj x 2, v_proj x 2" in lines
    assert any(
        line.startswith("router       learned, one per adapted layer, top 2, temperature 1, hidden")
        for line in lines
    )
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["0", "sql", "2", "4"],
        ["1", "french", "3", "2"],
    ]


def test_every_kind_of_folder_is_told(loras: list[Path], tmp_path: Path) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2).double())
    model.save_pretrained(tmp_path / "attached")
    mixture(router_type="learned_with_maturity", router_scope="layer").save_pretrained(
        tmp_path / "blocks"
    )
    mixture(router_type="fixed").save_pretrained(tmp_path / "fixed")
    get_peft_model(tiny_llama(), lora_config(use_dora=True)).save_pretrained(tmp_path / "dora")
    for source, parts in {
        loras[0]: ["a plain LoRA of 1 expert", "router       none", "norm"],
        tmp_path / "attached": ["several adapters of 2 experts", "attached, one per model, top 2"],
        tmp_path / "blocks": ["learned_with_maturity, one per block", "yes"],
        tmp_path / "fixed": ["router       fixed, one per adapted layer\n"],
        tmp_path / "dora": ["a plain LoRA of 1 expert", "use_dora=True", "?"],
    }.items():
        outcome = moelora("inspect", source)
        assert outcome.code == 0, outcome.err
        assert [part for part in parts if part not in outcome.out] == [], outcome.out
        assert moelora("inspect", source, "--json").json["source"] == str(source)


def test_an_expert_that_was_never_trained_is_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MoELoraConfig(num_experts=2, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "new")
    assert "Expert '1' is zero: was it ever trained?" in moelora("inspect", tmp_path / "new").out


def test_errors_are_one_line(tmp_path: Path) -> None:
    assert_one_line_error(moelora("inspect", tmp_path), "inspect", "holds no adapter_config.json")
    assert_one_line_error(moelora("inspect", tmp_path / "x"), "inspect", "neither a folder nor")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert_one_line_error(moelora("inspect", tmp_path), "inspect", "peft_type 'IA3'")
