"""Laws of the split: nothing of validation is in training, in disguise either."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelora.demo.skills import Example
from moelora.demo.sources.split import Candidate, is_near_duplicate, split_by_group

WORDS = st.text("abcdefgh ", min_size=1, max_size=12)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """A few candidates in a few groups; prompts and completions may repeat."""
    pairs = draw(st.lists(st.tuples(WORDS, WORDS, st.sampled_from("wxyz")), max_size=25))
    return [Candidate(Example(prompt, completion), group) for prompt, completion, group in pairs]


@given(candidates(), st.integers(1, 6), st.integers(1, 6))
def test_no_group_prompt_or_completion_is_on_both_sides(
    drawn: list[Candidate], train_size: int, valid_size: int
) -> None:
    split = split_by_group(drawn, train_size=train_size, valid_size=valid_size, seed="s")
    groups = {candidate.example: candidate.group for candidate in reversed(drawn)}
    assert len(split.train) <= train_size
    assert len(split.valid) <= valid_size
    assert set(split.train) | set(split.valid) <= set(groups)
    for kept in split.valid:
        for seen in split.train:
            assert groups[kept] != groups[seen]
            assert kept.prompt != seen.prompt
            assert not is_near_duplicate(kept.completion, seen.completion)


@given(candidates())
def test_the_same_seed_splits_alike_in_any_order_of_groups(drawn: list[Candidate]) -> None:
    first = split_by_group(drawn, train_size=5, valid_size=3, seed="s")
    by_group = sorted(drawn, key=lambda candidate: candidate.group)
    if (
        len({c.example.prompt for c in drawn})
        == len({c.example.completion for c in drawn})
        == len(drawn)
    ):
        assert split_by_group(by_group, train_size=5, valid_size=3, seed="s") == first
    assert split_by_group(drawn, train_size=5, valid_size=3, seed="s") == first


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        ("return self._value + offset", "return self.value + offset", True),
        ("Enter a valid value.", "enter  a valid value", True),
        ("sin(x) + 4", "cos(x) + 4", False),
        ("a", "b", False),
        ("", "", True),
    ],
)
def test_near_duplicates_differ_in_a_few_characters(a: str, b: str, alike: bool) -> None:
    assert is_near_duplicate(a, b) is alike
