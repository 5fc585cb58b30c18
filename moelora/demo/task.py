"""The batches that every contender of a run is trained and validated on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from moelora.demo.batches import Batch, Encoded, collate, encode, plan_steps
from moelora.demo.options import DemoOptions
from moelora.demo.skills import Example, Skill

TRAIN_PER_SKILL = 3
VALID_BATCH = 10


@dataclass(frozen=True)
class Task:
    """Skills turned into batches.

    Attributes:
        skills: the text behind the batches.
        steps: training batches, each with examples of all skills.
        valid: validation batches of each skill.
        texts: the first validation example of each skill, which the report shows.
        probe: those examples in one batch.
        truncated: examples of each skill that were too long.
        tokenizer: that encoded them.
    """

    skills: list[Skill]
    steps: list[Batch]
    valid: dict[str, list[Batch]]
    texts: dict[str, Encoded]
    probe: Batch
    truncated: dict[str, int]
    tokenizer: PreTrainedTokenizerBase

    def single(self, example: Encoded) -> Batch:
        """Return an example alone in its batch, without padding."""
        return collate([example], pad_token_id=0, device=self.probe.input_ids.device)


def build_task(
    skills: list[Skill],
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: DemoOptions,
    device: torch.device,
) -> Task:
    """Encode all examples, plan the steps and pad the batches.

    Args:
        skills: at least one.
        tokenizer: of the model.
        options: give the number of steps, the longest text and the seed.
        device: of the batches.
    """
    train = {s.name: _encode(s.train, tokenizer, options.max_length) for s in skills}
    valid = {s.name: _encode(s.valid, tokenizer, options.max_length) for s in skills}
    texts = {name: examples[0] for name, examples in valid.items()}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def batch(examples: Sequence[Encoded]) -> Batch:
        return collate(examples, pad_token_id=pad, device=device)

    plan = plan_steps(
        {name: [len(example) for example in examples] for name, examples in train.items()},
        steps=options.steps,
        per_skill=TRAIN_PER_SKILL,
        seed=options.seed,
    )
    return Task(
        skills=skills,
        steps=[batch([train[name][index] for name, index in step]) for step in plan],
        valid={name: [batch(part) for part in _by_length(valid[name])] for name in valid},
        texts=texts,
        probe=batch(list(texts.values())),
        truncated={
            name: sum(example.truncated for example in train[name] + valid[name]) for name in train
        },
        tokenizer=tokenizer,
    )


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    return [encode(example, tokenizer, max_length=max_length) for example in examples]


def _by_length(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    # texts of one length share a batch, so that little is spent on padding
    ordered = sorted(examples, key=len)
    return [ordered[i : i + VALID_BATCH] for i in range(0, len(ordered), VALID_BATCH)]
