"""``moelora inspect``, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "upper.txt").write_text("SELECT NAME FROM USERS;\n" * 9)
    (folder / "lower.jsonl").write_text('{"text": "bonjour tout le monde"}\n' * 12)
    return folder


def test_loads_are_measured_on_text(loras: list[Path], text: Path, tmp_path: Path) -> None:
    moelora("compose", *loras, "--out", tmp_path / "M")
    assert all(
        e["load"] is None for e in moelora("inspect", tmp_path / "M", "--json").json["experts"]
    )
    options = ("--data", text, "--max-tokens", 60, "--max-length", 20, "--batch", 2)
    told = moelora("inspect", tmp_path / "M", *options, "--json").json
    assert told["measured"] == {"lower": 60, "upper": 60}
    loads = [expert["load"] for expert in told["experts"]]
    assert sum(load["mean"] for load in loads) == pytest.approx(1, abs=1e-5)
    for domain in ("lower", "upper"):
        assert sum(load["domains"][domain] for load in loads) == pytest.approx(1, abs=1e-5)
    # the report measures the same
    out = ("--out", tmp_path / "report.html", "--json")
    report = moelora("report", tmp_path / "M", *options, *out).json
    assert report["load"] == {"sql": loads[0]["mean"], "french": loads[1]["mean"]}
    shown = moelora("inspect", tmp_path / "M", *options).out
    assert "Load in % of the routing weight, measured on 120 tokens" in shown
    last = shown.splitlines()[-1].split()
    mean, lowest, highest = (loads[1][key] for key in ("mean", "lowest", "highest"))
    assert last[:3] == ["1", "french", f"{100 * mean:.1f}"]
    assert last[3:5] == [f"{100 * lowest:.1f}", f"{100 * highest:.1f}"]
    assert lowest < mean < highest


def test_loads_of_adapters_under_an_attached_router_are_measured(
    tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    model = two_loras(AutoModelForCausalLM.from_pretrained(tiny_model))
    model.base_model.set_adapter(["second", "first"])
    model.attach_router(Router(32, 2, top_k=1), MoELoraConfig(num_experts=2, top_k_experts=1))
    model.save_pretrained(tmp_path / "attached")
    told = moelora("inspect", tmp_path / "attached", "--data", text, "--json").json
    assert [expert["name"] for expert in told["experts"]] == ["second", "first"]
    assert sum(expert["load"]["mean"] for expert in told["experts"]) == pytest.approx(1, abs=1e-5)
    assert {expert["load"]["lowest"] for expert in told["experts"]} == {
        expert["load"]["mean"] for expert in told["experts"]
    }


def test_loads_that_cannot_be_measured_are_an_error(
    loras: list[Path], text: Path, tmp_path: Path
) -> None:
    for arguments, part in [
        ((loras[0], "--data", text), "None of the active adapters"),
        ((loras[0], "--data", tmp_path / "none.txt"), "does not exist"),
        ((loras[0], "--data", text, "--max-tokens", 0), "--max-tokens must be at least 1"),
        ((loras[0], "--base", "x"), "--base and --field are for measuring loads and need --data"),
        ((tmp_path, "--data", text), "holds no adapter_config.json"),
    ]:
        assert_one_line_error(moelora("inspect", *arguments), "inspect", part)


def test_errors_are_one_line(tmp_path: Path) -> None:
    assert_one_line_error(moelora("inspect", tmp_path), "inspect", "holds no adapter_config.json")
    assert_one_line_error(moelora("inspect", tmp_path / "x"), "inspect", "neither a folder nor")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert_one_line_error(moelora("inspect", tmp_path), "inspect", "peft_type 'IA3'")
