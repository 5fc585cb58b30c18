"""From text to padded batches: formatting, truncation, and which examples share a step."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moelora.demo.skills import Example

IGNORED = -100
KEPT_PROMPT_TOKENS = 8
LENGTH_GROUPS = 8


@dataclass(frozen=True)
class Encoded:
    """An example as token ids: the prompt with its markup, and the completion with its end."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    truncated: bool

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Right-padded model inputs; labels are set on completions only."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """Turn an example into token ids, at most ``max_length`` of them.

    A tokenizer with a chat template writes a user's and an assistant's turn; any other gets
    ``prompt``, an empty line, ``completion`` and its end token, if it has one. A text that is too
    long loses the start of its prompt; only where less than 8 tokens of prompt would stay, the
    end of the completion goes too.

    Args:
        example: the text.
        tokenizer: of the model to be trained.
        max_length: most tokens, prompt and completion together.
    """
    before, after = _format(example, tokenizer)
    prompt = tokenizer(before, add_special_tokens=tokenizer.chat_template is None).input_ids
    completion = tokenizer(after, add_special_tokens=False).input_ids
    room = max_length - min(len(prompt), KEPT_PROMPT_TOKENS)
    kept = completion[:room]
    return Encoded(
        prompt=tuple(prompt[-(max_length - len(kept)) :]),
        completion=tuple(kept),
        truncated=len(prompt) + len(completion) > max_length,
    )


def plan_steps(
    lengths: Mapping[str, Sequence[int]], *, steps: int, per_skill: int, seed: int
) -> list[list[tuple[str, int]]]:
    """Choose the examples of every step: equally many of each skill, of like length.

    Each skill's examples are shuffled epoch by epoch and taken in windows of 8 steps; within a
    window they are sorted by length, so the short examples of all skills meet in one step and
    little is spent on padding. The steps of a window are shuffled.

    Args:
        lengths: for each skill the number of tokens of each of its training examples.
        steps: optimiser steps.
        per_skill: examples of each skill in a step.
        seed: the same seed gives the same plan.

    Returns:
        For each step its pairs of skill and index into that skill's examples.
    """
    shuffler = random.Random(seed)
    streams = {name: _epochs(len(lengths[name]), shuffler) for name in lengths}
    plan: list[list[tuple[str, int]]] = []
    while len(plan) < steps:
        window: list[list[tuple[str, int]]] = [[] for _ in range(LENGTH_GROUPS)]
        for name, stream in streams.items():
            drawn = sorted(
                (next(stream) for _ in range(LENGTH_GROUPS * per_skill)),
                key=lengths[name].__getitem__,
            )
            for position, index in enumerate(drawn):
                window[position // per_skill].append((name, index))
        shuffler.shuffle(window)
        plan += window
    return plan[:steps]


def collate(examples: Sequence[Encoded], *, pad_token_id: int, device: torch.device) -> Batch:
    """Pad examples on the right into one batch.

    Labels are masked by length and not by token id, since many models pad with their end token,
    which a completion must learn.

    Args:
        examples: at least one.
        pad_token_id: what fills the input; its value is never seen.
        device: of the returned tensors.
    """
    width = max(len(example) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        padding = width - len(example)
        ids.append([*example.prompt, *example.completion, *[pad_token_id] * padding])
        mask.append([1] * len(example) + [0] * padding)
        labels.append([*[IGNORED] * len(example.prompt), *example.completion, *[IGNORED] * padding])
    return Batch(*(torch.tensor(rows, device=device) for rows in (ids, mask, labels)))


def _format(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    end = tokenizer.eos_token or ""
    if tokenizer.chat_template is None:
        return f"{example.prompt}\n\n", f"{example.completion}{end}"
    asked = [{"role": "user", "content": example.prompt}]
    answered = [*asked, {"role": "assistant", "content": example.completion}]
    before = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    if whole.startswith(before):
        return before, whole.removeprefix(before)
    # a template that rewrites the answer (thinking marks, say) cannot be split
    return before, f"{example.completion}{end}"


def _epochs(size: int, shuffler: random.Random) -> Iterator[int]:
    while True:
        yield from shuffler.sample(range(size), size)
