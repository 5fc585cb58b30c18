"""Results as JSON, as a table and as a sentence."""

import dataclasses
import json

import pytest

from moelora.demo.results import (
    DemoResults,
    from_json,
    loss_table,
    read_results,
    to_json,
    verdict,
)
from tests.demo.tiny import made_up_results


def test_json_gives_back_the_same_results_and_holds_the_means(tmp_path) -> None:
    results = made_up_results(nasty='é"\u2028</script>')
    assert from_json(to_json(results)) == results
    means = [branch["mean_loss"] for branch in json.loads(to_json(results))["contenders"]]
    assert means == pytest.approx([3.5, 2.5, 2.4])
    (tmp_path / "results.json").write_text(to_json(results), encoding="utf-8")
    assert read_results(tmp_path) == results


def test_the_table_has_a_row_for_each_skill_and_the_mean() -> None:
    assert loss_table(made_up_results()) == (
        "validation loss  frozen base  one LoRA  mixture plain\n"
        "-----------------------------------------------------\n"
        "a plain                3.000     2.000          1.900\n"
        "b plain                4.000     3.000          2.900\n"
        "-----------------------------------------------------\n"
        "mean                   3.500     2.500          2.400"
    )


def _with_mixture_at(shift: float) -> DemoResults:
    results = made_up_results()
    *others, mixture = results.contenders
    losses = {name: loss + shift for name, loss in results.contender("lora").losses.items()}
    return dataclasses.replace(
        results, contenders=[*others, dataclasses.replace(mixture, losses=losses)]
    )


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.01, "beats the frozen base on 2 of 2 skills; its mean loss is as good as one LoRA"),
        (0.05, "its mean loss is 0.050 higher than that of one LoRA."),
        (-0.05, "its mean loss is 0.050 lower than that of one LoRA."),
        (2.0, "beats the frozen base on 0 of 2 skills"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(shift: float, words: str) -> None:
    assert words in verdict(_with_mixture_at(shift))
