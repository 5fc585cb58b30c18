"""``moelora merge``, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from moelora import MoELoraConfig
from tests.adapters import edit_config
from tests.cli.adapters import assert_one_line_error, moelora, save_loras


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    assert moelora("compose", *save_loras(root, tiny_model), "--out", root / "M").code == 0
    return root / "M"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("SELECT name FROM users;\nOù est la bibliothèque ?\n" * 3, encoding="utf-8")
    return path


def test_the_distance_is_measured_and_told(mixture: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--weights", "0.5,0.5", "--out", tmp_path / "D", "--data", text)
    outcome = moelora("merge", mixture, *arguments)
    assert outcome.code == 0, outcome.err
    assert "a plain LoRA of rank 5 with the weights sql 0.5, french 0.5" in outcome.out
    assert "Distance from the routed model on 152 tokens: KL 0.0" in outcome.out
    assert type(LoraConfig.from_pretrained(tmp_path / "D")) is LoraConfig


def test_json_is_one_object_and_nothing_else(mixture: Path, text: Path, tmp_path: Path) -> None:
    lengths = ("--max-tokens", 20, "--max-length", 8)
    arguments = ("--weights=1,-1", "--rank", 2, "--out", tmp_path / "D", "--data", text, "--json")
    outcome = moelora("merge", mixture, *arguments, *lengths)
    assert outcome.code == 0, outcome.err
    assert outcome.json["weights"] == {"sql": 1.0, "french": -1.0}
    assert outcome.json["r"] == 2
    assert outcome.json["truncation_error"] > 0
    # 20 tokens in pieces of 8, 8 and 4, of which each has one token that nothing predicts
    assert (outcome.json["distance"]["texts"], outcome.json["distance"]["tokens"]) == (3, 17)


def test_an_unknown_distance_must_be_accepted(mixture: Path, tmp_path: Path) -> None:
    arguments = ("merge", mixture, "--weights", "0.5,0.5", "--out", tmp_path / "D")
    assert_one_line_error(moelora(*arguments), "merge", "distance is unknown", "--data", "--yes")
    assert not (tmp_path / "D").exists()
    outcome = moelora(*arguments, "--yes")
    assert outcome.code == 0
    assert "Its distance from the routed model is unknown" in outcome.out


def test_fixed_routing_is_merged_as_it_is(mixture: Path, tmp_path: Path) -> None:
    from tests.lm import mixture as saved

    saved(router_type="fixed").save_pretrained(tmp_path / "fixed")
    assert MoELoraConfig.from_pretrained(tmp_path / "fixed").router_type == "fixed"
    outcome = moelora("merge", tmp_path / "fixed", "--out", tmp_path / "D")
    assert outcome.code == 0, outcome.err
    assert "It is the mixture" in outcome.out


def test_errors_are_one_line(mixture: Path, text: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "D", "--yes")
    for arguments, part in [
        ((mixture, *out), "weights must be given, one for each of ['sql', 'french']"),
        ((mixture, *out, "--weights", "1"), "weights must be 2 finite numbers"),
        ((mixture, *out, "--weights", "1,x"), "--weights must be numbers with commas, got '1,x'"),
        ((mixture, *out, "--weights", "nan,1"), "weights must be 2 finite numbers"),
        ((mixture, *out, "--weights", "1,1", "--rank", "0"), "rank must be None or an integer"),
        ((mixture, *out, "--weights", "1,1", "--base", "b"), "--base is for measuring"),
        (
            (mixture, *out, "--weights", "1,1", "--max-tokens", "1"),
            "--max-tokens must be at least 2",
        ),
        ((mixture, *out, "--weights", "1,1", "--data", tmp_path / "no.txt"), "does not exist"),
        (
            (mixture, *out, "--weights", "1,1", "--data", text, "--base", tmp_path / "none"),
            "cannot be loaded",
        ),
        (
            (mixture, *out, "--weights", "1,1", "--data", text, "--device", "abacus"),
            "--device abacus is not available",
        ),
    ]:
        assert_one_line_error(moelora("merge", *arguments), "merge", part)
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_without_a_base_model_asks_for_one(
    mixture: Path, text: Path, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--weights", "1,1", "--out", tmp_path / "D", "--data", text)
    before = MoELoraConfig.from_pretrained(mixture).base_model_name_or_path
    edit_config(mixture, base_model_name_or_path=None)
    try:
        assert_one_line_error(moelora("merge", mixture, *arguments), "merge", "name it with --base")
        assert moelora("merge", mixture, *arguments, "--base", tiny_model).code == 0
    finally:
        edit_config(mixture, base_model_name_or_path=before)
