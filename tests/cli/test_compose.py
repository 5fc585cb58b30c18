"""``moelora compose``, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moelora import describe
from tests.cli.adapters import assert_one_line_error, moelora, save_loras


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_loras(tmp_path_factory.mktemp("loras"), tiny_model)


def test_a_mixture_is_composed_and_loads(
    loras: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    outcome = moelora("compose", *loras, "--out", tmp_path / "M")
    assert outcome.code == 0, outcome.err
    assert "2 experts in 4 layers, router arrow, top 2, temperature 1" in outcome.out
    assert "Expert 'french' adapts 2 of 4 layers" in outcome.out
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, tmp_path / "M")
    assert [expert.name for expert in describe(tmp_path / "M").experts] == ["sql", "french"]


def test_json_is_one_object_and_nothing_else(loras: list[Path], tmp_path: Path) -> None:
    arguments = ("--names", "a,b", "--top-k", 1, "--temperature", 0.5, "--router", "train")
    outcome = moelora("compose", *loras, "--out", tmp_path / "M", "--json", *arguments)
    assert outcome.code == 0
    assert outcome.json["folder"] == str(tmp_path / "M")
    assert [expert["name"] for expert in outcome.json["experts"]] == ["a", "b"]
    assert (outcome.json["top_k"], outcome.json["temperature"]) == (1, 0.5)
    assert outcome.json["router"] == "train"


def test_errors_are_one_line(loras: list[Path], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "M")
    for arguments, part in [
        ((loras[0], *out), "at least 2 experts"),
        ((loras[0], loras[0], *out), "more than once"),
        ((*loras, "--out", loras[0], "--force"), "is read from"),
        ((loras[0], "no/such", *out), "no/such is no folder here"),
        ((*loras, *out, "--top-k", "3"), "top_k_experts must be between 1 and num_experts=2"),
        ((*loras, *out, "--names", "a,.."), "plain folder name"),
        ((*loras, *out, "--router", "cosine"), "invalid choice: 'cosine'"),
        (loras, "the following arguments are required: --out"),
        ((*loras, *out, "--top-k", "x"), "invalid int value: 'x'"),
    ]:
        assert_one_line_error(moelora("compose", *arguments), "compose", part)
    assert list(tmp_path.iterdir()) == []


def test_force_replaces(loras: list[Path], tmp_path: Path) -> None:
    assert moelora("compose", *loras, "--out", tmp_path / "M").code == 0
    again = ("compose", *loras, "--out", tmp_path / "M", "--router", "zeros")
    assert_one_line_error(moelora(*again), "compose", "is not empty", "--force")
    assert moelora(*again, "--force").code == 0
    router = describe(tmp_path / "M").router
    assert router is not None
    assert router.hidden_size is None
