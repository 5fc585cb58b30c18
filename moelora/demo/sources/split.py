"""Splitting a skill's candidates so that no validation example is a disguised training one."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from moelora.demo.skills import Example

SHINGLE = 4
NEAR_DUPLICATE = 0.7
LARGEST_SHARE = 8


@dataclass(frozen=True)
class Candidate:
    """An example with the group whose members are too alike to be split."""

    example: Example
    group: str


@dataclass(frozen=True)
class Split:
    """Training and validation examples of one skill, in a random order."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]


def split_by_group(
    candidates: Iterable[Candidate], *, train_size: int, valid_size: int, seed: str
) -> Split:
    """Draw both splits from disjoint groups, then drop near duplicates from validation.

    Groups are shuffled; the first ones fill the validation split, at most an eighth of it from
    any one group (the rest of such a group is left out), the others fill the training split.
    A validation example is dropped if its completion, or its prompt, is nearly one of training:
    a Jaccard similarity of 4-character shingles above 0.7, the instruction that all prompts
    share put aside.

    Args:
        candidates: all examples of a skill; repeated prompts or completions count once.
        train_size: most examples to train on.
        valid_size: most examples to validate on.
        seed: any text; the same text gives the same split.
    """
    groups = _groups(_distinct(candidates))
    order = sorted(groups)
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    valid: list[Example] = []
    train: list[Example] = []
    largest = max(1, valid_size // LARGEST_SHARE)
    # twice as many as wanted, since near duplicates are still to be dropped
    for name in order:
        if len(valid) < 2 * valid_size and len(groups[name]) <= 4 * largest:
            valid += shuffler.sample(groups[name], min(largest, len(groups[name])))
        else:
            train += groups[name]
    shuffler.shuffle(valid)
    shuffler.shuffle(train)
    train = train[:train_size]
    kept = _without_near_duplicates(valid, of=train)
    return Split(tuple(train), tuple(kept[:valid_size]))


def is_near_duplicate(a: str, b: str) -> bool:
    """Tell whether two texts say the same but for punctuation or a few characters."""
    return _alike(_shingles(a), _shingles(b))


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    prompts: set[str] = set()
    completions: set[str] = set()
    kept = []
    for candidate in candidates:
        prompt, completion = candidate.example.prompt, candidate.example.completion
        if prompt not in prompts and completion not in completions:
            kept.append(candidate)
        prompts.add(prompt)
        completions.add(completion)
    return kept


def _groups(candidates: Iterable[Candidate]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.group, []).append(candidate.example)
    return groups


def _without_near_duplicates(valid: list[Example], *, of: list[Example]) -> list[Example]:
    instruction = _common_start([example.prompt for example in valid + of])
    prompts = [_shingles(example.prompt.removeprefix(instruction)) for example in of]
    completions = [_shingles(example.completion) for example in of]
    return [
        example
        for example in valid
        if not _alike_any(_shingles(example.prompt.removeprefix(instruction)), prompts)
        and not _alike_any(_shingles(example.completion), completions)
    ]


def _common_start(texts: list[str]) -> str:
    # what the first and the last in order share, all share
    first, last = min(texts, default=""), max(texts, default="")
    size = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[:size]


def _alike_any(shingles: frozenset[str], others: list[frozenset[str]]) -> bool:
    return any(_alike(shingles, other) for other in others)


def _alike(a: frozenset[str], b: frozenset[str]) -> bool:
    return len(a & b) > NEAR_DUPLICATE * len(a | b)


def _shingles(text: str) -> frozenset[str]:
    letters = re.sub(r"[\s_]+", " ", text.lower()).strip()
    return frozenset(letters[i : i + SHINGLE] for i in range(max(1, len(letters) - SHINGLE + 1)))
