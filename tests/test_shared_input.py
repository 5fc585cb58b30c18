"""Layers that read the same input: found by watching a forward, served by one of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5ForConditionalGeneration

from moelora import scope
from moelora.ops import RoutedOutput
from moelora.shared_input import (
    InputWatch,
    Ready,
    conditions_of,
    expected_groups,
    groups_for_traces,
    without,
)
from tests.interpreter import run_interpreted
from tests.lm import mixture, mixture_config, token_ids, two_loras
from tests.models import t5_config


@pytest.mark.slow
def test_whole_models_give_the_same_and_their_layers_are_served_together() -> None:
    finished = run_interpreted("tests.shared_input_cases")
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("ok", "WRONG"))]
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(lines) == 37
    assert all(line.startswith("ok") for line in lines), "\n".join(lines)


def _watched(calls: list[tuple[str, torch.Tensor]]) -> dict[str, list[str]]:
    watch = InputWatch()
    for name, x in calls:
        watch.see(name, object(), x)
    groups = watch.close()
    assert groups is not None
    return {name: [member for member, _ in group] for name, group in groups.items()}


def test_only_the_very_same_tensor_makes_a_group() -> None:
    x, y = torch.ones(1), torch.ones(1)
    assert _watched([("q", x), ("k", x), ("v", x.clone()), ("o", y)]) == {
        "q": ["q", "k"],
        "k": ["q", "k"],
    }


def test_a_tensor_that_was_changed_in_between_is_another() -> None:
    x = torch.ones(1)
    watch = InputWatch()
    watch.see("q", object(), x)
    x.add_(1)
    watch.see("k", object(), x)
    assert watch.close() == {}


def test_a_layer_that_is_called_twice_is_in_one_group_at_most() -> None:
    x = torch.ones(1)
    assert _watched([("q", x), ("q", x)]) == {}
    assert _watched([("q", x), ("k", x), ("q", x)])["k"] == ["q", "k"]


def test_a_watch_that_saw_nothing_learnt_nothing_and_a_closed_one_looks_no_more() -> None:
    watch = InputWatch()
    assert watch.close() is None
    watch.see("q", object(), torch.ones(1))
    assert watch.close() is None


def test_a_group_is_given_up_as_a_whole() -> None:
    pair = (("q", 1), ("k", 2))
    other = (("gate", 3), ("up", 4))
    groups = {"q": pair, "k": pair, "gate": other, "up": other}
    assert without(groups, {"k": None}) == {"gate": other, "up": other}


def test_a_ready_result_is_for_the_same_input_under_the_same_conditions() -> None:
    x = torch.ones(1)
    result = RoutedOutput(x, None, None, None)
    ready = Ready(None, result, x, x._version, conditions_of(x))
    assert ready.is_for(x)
    assert not ready.is_for(x.clone())
    with torch.no_grad():
        assert not ready.is_for(x)
    x.add_(1)
    assert not ready.is_for(x)


def test_names_suggest_the_groups_of_the_first_forward() -> None:
    model = mixture(target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
    groups = expected_groups(model.get_base_model())
    assert {name: [member for member, _ in group] for name, group in groups.items()} == {
        f"model.layers.{number}.{name}": [f"model.layers.{number}.{one}" for one in pair]
        for number in (0, 1)
        for pair in (
            ("self_attn.q_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )
        for name in pair
    }


def test_names_are_looked_at_once_also_where_nothing_is_ever_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[nn.Module] = []
    monkeypatch.setattr(scope, "expected_groups", lambda base: looked.append(base) or {})
    for model in (two_loras(), mixture()):
        for _ in range(3):
            model(input_ids=token_ids())
    assert len(looked) == 2


def test_traces_take_names_at_their_word_but_for_cross_attention() -> None:
    llama = mixture(target_modules="all-linear").get_base_model()
    groups = groups_for_traces(llama)
    attention = [name for name, _ in groups["model.layers.0.self_attn.q_proj"]]
    assert attention == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert "model.layers.1.mlp.up_proj" in groups
    t5 = get_peft_model(
        T5ForConditionalGeneration(t5_config()),
        mixture_config(target_modules=["q", "k", "v"], task_type="SEQ_2_SEQ_LM"),
    )
    names = set(groups_for_traces(t5.get_base_model()))
    assert "decoder.block.0.layer.0.SelfAttention.q" in names
    assert not any("EncDecAttention" in name for name in names)


def test_traces_of_an_unknown_model_share_gates_only() -> None:
    llama = mixture(target_modules="all-linear").get_base_model()
    unknown = nn.Module()
    unknown.model = llama.model
    assert {name.rpartition(".")[2] for name in groups_for_traces(unknown)} == {
        "gate_proj",
        "up_proj",
    }
