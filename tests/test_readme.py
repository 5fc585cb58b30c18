"""The README is run: its Python in order, with a tiny random model for the one it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def after_readme(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The working folder and the variables after all blocks ran in one namespace."""
    folder = tmp_path_factory.mktemp("readme")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(_blocks("python"), start=1):
            code = block.replace(MODEL_NAME, tiny_model.as_posix())
            exec(compile(code, f"README.md, python block {number}", "exec"), names)
    return folder, names


def test_the_readme_names_a_model_to_replace() -> None:
    """Else the other tests would ask the network for the real one."""
    assert README.count(MODEL_NAME) == 1
    assert MODEL_NAME in _blocks("python")[0]


def test_the_readme_story_trains_and_saves_a_mixture(
    after_readme: tuple[Path, dict[str, Any]],
) -> None:
    folder, names = after_readme
    assert sorted(path.name for path in (folder / "my-mixture").glob("*.*")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "router.safetensors",
    ]
    assert names["config"].num_experts == 4


def test_the_readme_weights_act_and_get_gradients(
    after_readme: tuple[Path, dict[str, Any]],
) -> None:
    _, names = after_readme
    assert names["by_text"].logits.shape[:2] == names["tokens"]["input_ids"].shape
    assert names["weights"].grad.shape == names["weights"].shape


def test_the_readme_router_is_saved_beside_its_experts(
    after_readme: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = after_readme
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert {
        "my-experts/sql/adapter_model.safetensors",
        "my-experts/french/adapter_model.safetensors",
        "my-experts/router.safetensors",
    } <= saved


def test_every_make_command_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    commands = re.findall(r"\bmake ([a-z]+)", "\n".join(_blocks("bash")))
    assert commands == ["demo", "test"]
    assert set(commands) <= targets


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []
