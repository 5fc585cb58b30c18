"""Training lowers the loss, and the loss is what its name says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moelora.demo.batches import IGNORED, Batch, collate, encode
from moelora.demo.skills import Example
from moelora.demo.train import completion_loss, learning_rate_share, train_adapter
from tests.demo.tiny import tiny_llama, tiny_tokenizer


def _batches() -> list[Batch]:
    tokenizer = tiny_tokenizer()
    pairs = [("a", "bc"), ("abc", "d"), ("b", "ef"), ("ab", "ghijk")]
    examples = [encode(Example(*pair), tokenizer, max_length=64) for pair in pairs]
    cpu = torch.device("cpu")
    # unequal batches, so that a mean of means would be wrong
    return [collate(part, pad_token_id=256, device=cpu) for part in (examples[:1], examples[1:])]


def test_the_loss_is_the_mean_over_all_completion_tokens() -> None:
    model, losses, seen = tiny_llama(), [], []
    for batch in _batches():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for row, labels in zip(logits, batch.labels, strict=True):
            targets = labels[1:] != IGNORED
            losses.append(F.cross_entropy(row[:-1][targets], labels[1:][targets], reduction="none"))
    measured = completion_loss(model, _batches(), on_batch=seen.append)
    assert measured == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert len(seen) == 2


def test_training_lowers_the_loss_and_ends_in_evaluation_mode() -> None:
    model, told = tiny_llama(), []
    before = completion_loss(model, _batches())
    train_adapter(model, _batches() * 10, on_step=told.append)
    assert len(told) == 20
    assert not model.training
    assert completion_loss(model, _batches()) < before


def test_frozen_parameters_stay() -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    before = model.lm_head.weight.clone()
    train_adapter(model, _batches(), on_step=lambda loss: None)
    assert torch.equal(model.lm_head.weight, before)


@given(st.integers(1, 200))
def test_the_rate_rises_to_one_and_falls_without_reaching_zero(steps: int) -> None:
    shares = [learning_rate_share(step, steps=steps) for step in range(steps)]
    peak = shares.index(max(shares))
    assert max(shares) == 1
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert min(shares) > 0
    assert learning_rate_share(steps, steps=steps) == 0
