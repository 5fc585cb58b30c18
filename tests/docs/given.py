"""What a page may ask for with ``<!-- given: ... -->``: small files made on the spot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.demo.tiny import save_tiny_model, tiny_llama
from tests.lm import mixture
from tests.validation.old_checkpoints import old_gate, old_model, save_old

# names on the hub that stand for the tiny model while a page runs.
MODEL_NAMES = re.compile(r"HuggingFaceTB/SmolLM2-135M(-Instruct)?\b")


def make_given(names: list[str], folder: Path) -> Path:
    """Put everything asked for into ``folder``; returns the base model's folder."""
    base = save_tiny_model(folder / "base")
    unknown = sorted(set(names) - set(GIVEN))
    assert not unknown, f"unknown: {', '.join(unknown)}; a page may ask for {', '.join(GIVEN)}"
    for name in names:
        GIVEN[name](folder / name, base)
    return base


def _text(content: str) -> Callable[[Path, Path], None]:
    def write(path: Path, _: Path) -> None:
        path.write_text(content, encoding="utf-8")

    return write


def _mixture(path: Path, base: Path) -> None:
    model = mixture(tiny_llama())
    model.peft_config["default"].base_model_name_or_path = base.as_posix()
    model.save_pretrained(path)


def _lora(**fields: object) -> Callable[[Path, Path], None]:
    def save(path: Path, base: Path) -> None:
        torch.manual_seed(len(path.name))
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
        get_peft_model(model, config).save_pretrained(path)

    return save


def _old_checkpoint(path: Path, _: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_old(path, old_model(3, base=tiny_llama()), router="pt", gate=old_gate(3))


GIVEN: dict[str, Callable[[Path, Path], None]] = {
    # a saved mixture of three experts on the base model
    "my-mixture": _mixture,
    # plain LoRA adapters of PEFT, of unequal rank
    "sql": _lora(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "french": _lora(r=3, lora_alpha=9, target_modules=["q_proj"]),
    "shell": _lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    # text
    "sql.txt": _text("SELECT name FROM users WHERE age > 30;\n" * 20),
    "french.txt": _text("Il fait beau aujourd'hui.\n" * 20),
    "shell.txt": _text("find . -name '*.py' | xargs wc -l\n" * 20),
    "letters.txt": _text("Il fait beau.\n" * 40),
    "queries.jsonl": _text('{"text": "SELECT 1;"}\n' * 9),
    # what DyLoRA-MoE saved
    "results/checkpoint-500": _old_checkpoint,
}
