"""From hidden states to the direction of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from moelora import SkillError, UnsupportedLayerError, pool_hidden_states, skill_embeddings
from tests.lm import (
    VOCABULARY,
    assert_same_snapshot,
    mixture,
    snapshot,
    tiny_llama,
    tiny_t5,
    token_ids,
    two_loras,
)
from tests.tolerances import assert_close, assert_equal


@st.composite
def texts(draw: Any) -> tuple[Tensor, Tensor]:
    """Hidden states and a mask in which every text has a token."""
    batch, seq, hidden = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    states = torch.randn(batch, seq, hidden + 1, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, (batch, seq), generator=generator)
    mask[:, draw(st.integers(0, seq - 1))] = 1
    return states, mask


@given(texts())
def test_a_text_is_the_normalised_mean_of_its_real_tokens(problem: tuple[Tensor, Tensor]) -> None:
    states, mask = problem
    found = pool_hidden_states(states, mask)
    for row, direction in enumerate(found):
        total = torch.zeros(states.shape[-1], dtype=torch.float64)
        for position in range(states.shape[1]):
            if mask[row, position]:
                total += states[row, position]
        assert_close(direction, total / total.norm())


@given(texts(), st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_what_stands_at_padding_has_no_influence(
    problem: tuple[Tensor, Tensor], value: float
) -> None:
    states, mask = problem
    filled = states.masked_fill(mask.unsqueeze(-1) == 0, value)
    assert_equal(pool_hidden_states(filled, mask), pool_hidden_states(states, mask))
    assert_equal(pool_hidden_states(states, mask.bool()), pool_hidden_states(states, mask))


def test_without_a_mask_every_token_counts() -> None:
    states = torch.randn(2, 3, 4)
    ones = torch.ones(2, 3, dtype=torch.long)
    assert_equal(pool_hidden_states(states), pool_hidden_states(states, ones))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32(dtype: torch.dtype) -> None:
    states = torch.full((1, 3000, 4), 60.0, dtype=dtype)
    assert_equal(pool_hidden_states(states), torch.full((1, 4), 0.5))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_hidden_states_does_not_matter(scale: float) -> None:
    states = torch.tensor([[[3.0, 4.0]]]) * scale
    assert_close(pool_hidden_states(states), torch.tensor([[0.6, 0.8]]))


def test_no_texts_give_no_rows() -> None:
    assert pool_hidden_states(torch.zeros(0, 3, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (torch.ones(2, 2, 3), torch.tensor([[1, 1], [0, 0]]), r"Texts \[1\] have no real token"),
        (torch.ones(1, 0, 3), None, r"Texts \[0\] have no real token"),
        (torch.zeros(1, 2, 3), None, "hidden states is zero, so it has no direction"),
        (torch.full((1, 2, 3), float("nan")), None, "holds NaN or infinity"),
    ],
)
def test_texts_without_a_direction_are_refused(
    states: Tensor, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(SkillError, match=message):
        pool_hidden_states(states, mask)


# The model ------------------------------------------------------------------------------------


def test_a_model_embeds_by_its_final_hidden_states() -> None:
    base = tiny_llama(dtype=torch.float32).eval()
    ids, mask = token_ids(), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        states = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_equal(skill_embeddings(base, ids, mask), pool_hidden_states(states, mask))


def test_a_padded_text_is_embedded_as_alone() -> None:
    base, ids = tiny_llama(), token_ids()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    alone = skill_embeddings(base, ids[1:, :4])
    assert_close(skill_embeddings(base, ids, mask)[1:], alone, dtype=torch.float32)


@pytest.mark.parametrize("make", [mixture, two_loras])
def test_adapters_have_no_influence_on_embeddings(make: Any) -> None:
    model, ids = make(), token_ids()
    expected = skill_embeddings(tiny_llama(), ids)
    assert_equal(skill_embeddings(model, ids), expected)
    assert_equal(skill_embeddings(model.base_model, ids), expected)


def test_embedding_leaves_no_trace_in_the_model() -> None:
    model = mixture().train()
    model.base_model.model.lm_head.eval()
    before, logits = snapshot(model), model(token_ids()).logits
    assert not skill_embeddings(model, token_ids()).requires_grad
    assert_same_snapshot(snapshot(model), before)
    assert_equal(model(token_ids()).logits, logits)


def test_dropout_of_a_training_model_is_off() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).train()
    assert_equal(skill_embeddings(model, token_ids()), skill_embeddings(model, token_ids()))
    assert model.transformer.drop.training


def test_an_encoder_decoder_model_embeds_by_its_encoder() -> None:
    base, ids = tiny_t5().eval(), token_ids()
    with torch.no_grad():
        states = base.get_encoder()(input_ids=ids).last_hidden_state
    assert_equal(skill_embeddings(base, ids), pool_hidden_states(states))


def test_a_merged_model_is_refused() -> None:
    model = two_loras()
    model.merge_adapter()
    with pytest.raises(SkillError, match=r"Adapters \['first', 'second'\] are merged"):
        skill_embeddings(model, token_ids())


def test_adapters_that_are_no_lora_are_refused() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(dtype=torch.float32), config)
    with pytest.raises(UnsupportedLayerError, match=r"LoRA adapters or none.*AdaLoraModel"):
        skill_embeddings(model, token_ids())
