"""The model card: what a person who finds the folder has to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.lm import mixture


def _card(folder: Path, **fields: Any) -> ModelCard:
    mixture(**fields).save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_names_the_experts_and_says_how_to_load_them(tmp_path: Path) -> None:
    card = _card(tmp_path, expert_names=["sql", "french", "shell"])
    first = card.text.strip().splitlines()
    assert "`import moelora` before" in first[1]
    row = "| `default` | 3 LoRA experts of rank 2: `sql`, `french`, `shell` |"
    assert any(line.startswith(row) for line in first)
    assert {"moelora", "mixture-of-experts", "lora"} <= set(card.data.tags)


def test_experts_without_names_are_counted(tmp_path: Path) -> None:
    assert "| 3 LoRA experts of rank 2 |" in _card(tmp_path).text


def test_a_name_cannot_break_the_table(tmp_path: Path) -> None:
    text = _card(tmp_path, expert_names=["a|b", "c``d", "<b>"]).text
    assert r": `a\|b`, ``` c``d ```, `<b>` |" in text


def test_saving_again_replaces_the_section_and_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(f"{card.read_text(encoding='utf-8')}\nTrained on a train.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    text = card.read_text(encoding="utf-8")
    assert "Trained on a train." in text
    assert text.count("Load this adapter with moelora") == 1


@pytest.mark.parametrize(
    ("fields", "router"),
    [
        ({"use_moe_routing": False}, "none: always on"),
        ({"router_type": "fixed"}, "fixed weights"),
        ({"router_scope": "layer", "router_type": "learned"}, "learned, in every block, top 2"),
    ],
)
def test_the_router_is_told(fields: dict[str, Any], router: str, tmp_path: Path) -> None:
    assert f"| {router} |" in _card(tmp_path, **fields).text
