"""Short names, labels of layers, spelt tokens, and colours."""

import pytest

from moelora.report.names import layer_labels, layer_of, short_name, spell_tokens
from moelora.report.palette import (
    DARK_EXPERT_COLOURS,
    EXPERT_COLOURS,
    expert_colour,
    expert_variable,
    theme_css,
)
from tests.report.tiny import TOKENIZER


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj", 12),
        ("transformer.h.0.attn.c_attn", 0),
        ("7.linear", 7),
        ("block.3", 3),
        ("encoder.conv1", 0),
    ],
)
def test_the_layer_is_the_first_whole_number_of_the_name(name: str, layer: int) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.3.self_attn.q_proj", "layer 3 self_attn.q_proj"),
        ("blocks.7", "layer 7"),
        ("classifier", "classifier"),
    ],
)
def test_a_module_is_called_by_its_layer(name: str, short: str) -> None:
    assert short_name(name) == short


@pytest.mark.parametrize(
    ("blocks", "labels"),
    [
        ([], []),
        (["h.0", "h.1"], ["0", "1"]),
        (["0", "1"], ["0", "1"]),
        (["model"], ["model"]),
        (["model.vision.blocks.2", "model.text.layers.2"], ["vision.blocks 2", "text.layers 2"]),
        (["encoder.block.1", "decoder.block.1", "lm_head"], ["encoder 1", "decoder 1", "lm_head"]),
    ],
)
def test_layers_are_called_by_what_tells_them_apart(blocks: list[str], labels: list[str]) -> None:
    assert layer_labels(blocks) == labels


@pytest.mark.parametrize("text", ["plain", "wörld → 🙂!", "", "a\n\tb"])
def test_spelt_tokens_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    spelt = spell_tokens(ids, TOKENIZER)
    assert len(spelt) == len(ids)
    assert "".join(spelt) == text


def test_colours_start_again_after_the_last_and_have_a_dark_twin() -> None:
    number = len(EXPERT_COLOURS)
    assert expert_colour(number) == expert_colour(0)
    assert expert_variable(number + 1) == "var(--e1)"
    assert len(DARK_EXPERT_COLOURS) == number
    assert f"--e{number - 1}:" in theme_css()
