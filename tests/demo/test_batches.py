"""Laws of encoding, planning and padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.demo.batches import IGNORED, Encoded, collate, encode, plan_steps
from moelora.demo.model import SHORT_CHAT_TEMPLATE
from moelora.demo.skills import Example
from tests.demo.tiny import tiny_tokenizer

PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer()
CHAT.chat_template = SHORT_CHAT_TEMPLATE.replace("<|im_end|>", "<end>")
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)
ENCODED = st.builds(Encoded, TOKENS, TOKENS, truncated=st.just(False))


def test_a_model_without_a_chat_template_reads_prompt_empty_line_and_completion() -> None:
    encoded = encode(Example("hé", "yo"), PLAIN, max_length=99)
    assert PLAIN.decode(encoded.prompt) == "hé\n\n"
    assert PLAIN.decode(encoded.completion) == "yo<end>"


def test_a_chat_template_writes_both_turns_and_the_end_belongs_to_the_completion() -> None:
    encoded = encode(Example("hi", "yo"), CHAT, max_length=99)
    assert PLAIN.decode(encoded.prompt) == "<|im_start|>user\nhi<end>\n<|im_start|>assistant\n"
    assert PLAIN.decode(encoded.completion) == "yo<end>"


def test_a_template_that_rewrites_the_answer_still_gives_prompt_and_completion() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}:{{ messages[-1]['content'] }}|"
    encoded = encode(Example("hi", "yo"), tokenizer, max_length=99)
    assert tokenizer.decode(encoded.prompt) == "1:hi|"
    assert tokenizer.decode(encoded.completion) == "yo<end>"


@given(TEXT, TEXT, st.integers(16, 60))
def test_a_text_keeps_its_completion_and_the_end_of_its_prompt(
    prompt: str, completion: str, max_length: int
) -> None:
    whole = encode(Example(prompt, completion), PLAIN, max_length=10_000)
    cut = encode(Example(prompt, completion), PLAIN, max_length=max_length)
    assert len(cut) == min(len(whole), max_length)
    assert cut.truncated == (len(whole) > max_length)
    assert cut.completion == whole.completion[: len(cut.completion)]
    assert cut.prompt == whole.prompt[len(whole.prompt) - len(cut.prompt) :]
    assert len(cut.prompt) >= min(len(whole.prompt), 8)
    if len(whole.completion) + 8 <= max_length:
        assert cut.completion == whole.completion


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(1, 90), min_size=1, max_size=40), min_size=1
    ),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_every_step_has_equally_many_examples_of_each_skill(
    lengths: dict[str, list[int]], steps: int, per_skill: int, seed: int
) -> None:
    plan = plan_steps(lengths, steps=steps, per_skill=per_skill, seed=seed)
    assert len(plan) == steps
    for step in plan:
        for name, known in lengths.items():
            drawn = [index for skill, index in step if skill == name]
            assert len(drawn) == per_skill
            assert set(drawn) <= set(range(len(known)))
    assert plan == plan_steps(lengths, steps=steps, per_skill=per_skill, seed=seed)


def test_no_example_comes_twice_before_all_came_once() -> None:
    plan = plan_steps({"a": [1] * 32}, steps=8, per_skill=4, seed=0)
    assert sorted(index for step in plan for _, index in step) == list(range(32))


def test_short_examples_meet_short_ones() -> None:
    lengths = {"a": list(range(1, 65)), "b": list(range(101, 165))}
    for step in plan_steps(lengths, steps=8, per_skill=2, seed=0):
        of_a, of_b = ([lengths[n][i] for n, i in step if n == name] for name in "ab")
        assert max(of_a) - min(of_a) < 40
        assert max(of_b) - min(of_b) < 40


@given(st.lists(ENCODED, min_size=1, max_size=4))
def test_labels_are_the_completions_and_nothing_else(examples: list[Encoded]) -> None:
    # 9 is a token of some completions too: only the length may decide what is padding
    batch = collate(examples, pad_token_id=9, device=torch.device("cpu"))
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
    for row, example in enumerate(examples):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == [*example.prompt, *example.completion]
        assert batch.attention_mask[row].tolist() == sorted(
            batch.attention_mask[row].tolist(), reverse=True
        )
        labels = batch.labels[row]
        assert labels[labels != IGNORED].tolist() == list(example.completion)
        assert (labels[: len(example.prompt)] == IGNORED).all()
        assert (labels[~real] == IGNORED).all()


@pytest.mark.parametrize("lengths", [{"a": [3]}, {"a": [5, 5, 5], "b": [1]}])
def test_a_skill_smaller_than_a_step_repeats_its_examples(lengths: dict[str, list[int]]) -> None:
    plan = plan_steps(lengths, steps=2, per_skill=4, seed=0)
    assert all(len(step) == 4 * len(lengths) for step in plan)
