"""``moelora export``, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from tests.cli.adapters import assert_one_line_error, moelora, save_loras


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    assert moelora("compose", *save_loras(root, tiny_model), "--out", root / "M").code == 0
    return root / "M"


@pytest.mark.parametrize("expert", ["french", "1"])
def test_an_expert_is_exported_by_name_or_index(expert: str, mixture: Path, tmp_path: Path) -> None:
    outcome = moelora("export", mixture, "--expert", expert, "--out", tmp_path / "D")
    assert outcome.code == 0, outcome.err
    assert "expert 1 (french) as a plain LoRA, r=3, lora_alpha=6, 2 layers" in outcome.out
    assert "Left out 2 layers" in outcome.out
    config = LoraConfig.from_pretrained(tmp_path / "D")
    assert (type(config), config.r, config.target_modules) == (LoraConfig, 3, {"q_proj"})


@pytest.mark.parametrize(("rank", "r"), [("vllm", 8), ("5", 5)])
def test_json_tells_the_rank(rank: str, r: int, mixture: Path, tmp_path: Path) -> None:
    arguments = ("--expert", "sql", "--out", tmp_path / "D", "--rank", rank, "--json")
    outcome = moelora("export", mixture, *arguments)
    assert outcome.json["r"] == r
    assert outcome.json["lora_alpha"] == 2 * r


def test_errors_are_one_line(mixture: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "D")
    for arguments, part in [
        ((mixture, "--expert", "2", *out), "expert must be an index in [0, 2)"),
        ((mixture, "--expert=-1", *out), "expert must be one of ['sql', 'french'] or an index"),
        ((mixture, "--expert", "0", *out, "--rank", "1"), "at least 2, the expert's own"),
        ((mixture, "--expert", "0", *out, "--rank", "many"), "must be an integer or 'vllm'"),
        ((mixture, "--expert", "0", "--out", mixture, "--force"), "is read from"),
        ((tmp_path, "--expert", "0", *out), "holds no adapter_config.json"),
        ((mixture, *out), "required: --expert"),
    ]:
        assert_one_line_error(moelora("export", *arguments), "export", part)
    assert list(tmp_path.iterdir()) == []
