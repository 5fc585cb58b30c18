"""The contract of ``output_router_logits``: told by the config, answered, and taken back."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora import Router
from tests.auxiliary import expected_mean_loss, router_inputs, train_batch
from tests.lm import mixture, mixture_config, tiny_llama, tiny_mixtral, two_loras
from tests.tolerances import assert_close

NAME = "output_router_logits"


class Strict(LlamaForCausalLM):
    """Takes what it names and nothing else."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, labels=labels)


def strict_llama() -> Strict:
    base = tiny_llama()
    strict = Strict(base.config).to(torch.float64)
    strict.load_state_dict(base.state_dict())
    return strict


def test_the_config_tells_that_the_model_answers() -> None:
    assert getattr(mixture().config, NAME) is False


@pytest.mark.parametrize(
    "fields", [{"router_type": "fixed"}, {"router_aux_loss_coef": 0.0}], ids=["fixed", "off"]
)
def test_it_tells_nothing_where_there_is_no_loss(fields: dict[str, Any]) -> None:
    assert not hasattr(mixture(**fields).config, NAME)
    assert not hasattr(two_loras().config, NAME)


def test_unload_leaves_the_config_as_it_was() -> None:
    before = tiny_llama().config.to_dict()
    model = mixture()
    base = model.unload()
    assert base.config.to_dict() == before
    assert not hasattr(base.config, NAME)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_takes_its_own_config_back(copied: Any) -> None:
    model = mixture()
    other = copied(model)
    base = other.unload()
    assert not hasattr(base.config, NAME)
    assert hasattr(model.config, NAME)


def test_uninstalling_takes_every_config_back_and_installing_restores_them() -> None:
    models = [mixture(), copy.deepcopy(mixture())]
    moelora.uninstall()
    try:
        assert not any(hasattr(model.config, NAME) for model in models)
    finally:
        moelora.install()
    assert all(hasattr(model.config, NAME) for model in models)


def test_a_base_with_routers_of_its_own_keeps_its_field() -> None:
    base = tiny_mixtral()
    base.config.output_router_logits = True
    model = mixture(base, target_modules=["q_proj"])
    assert model.unload().config.output_router_logits is True


def test_an_attached_router_with_a_config_tells_and_detaching_takes_it_back() -> None:
    model = two_loras()
    router = Router(input_size=16, num_experts=2, top_k=2).double()
    config = mixture_config(num_experts=2)
    model.attach_router(router, config)
    assert hasattr(model.config, NAME)
    model.detach_router()
    assert not hasattr(model.config, NAME)
    model.attach_router(router)
    assert not hasattr(model.config, NAME)


@pytest.mark.parametrize("training", [True, False])
def test_the_answer_is_the_unscaled_loss_in_evaluation_too(training: bool) -> None:
    model = mixture(router_aux_loss_coef=0.25).train(training)
    with router_inputs(model) as inputs:
        output = model(**train_batch(), output_router_logits=True)
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))


def test_the_answer_comes_without_a_gradient_too() -> None:
    model = mixture().train()
    with torch.no_grad(), router_inputs(model) as inputs:
        output = model(**train_batch(), output_router_logits=True)
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))


def test_padding_counts_nowhere_in_the_answer_of_an_evaluation() -> None:
    model = mixture().eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with router_inputs(model) as inputs:
        output = model(**train_batch(), attention_mask=mask, output_router_logits=True)
    assert_close(output.aux_loss, expected_mean_loss(model, inputs, mask=mask))


@pytest.mark.parametrize("asked", [False, None])
def test_who_does_not_ask_gets_no_answer_in_evaluation(asked: bool | None) -> None:
    output = mixture().eval()(**train_batch(), output_router_logits=asked)
    assert "aux_loss" not in output


def test_a_config_that_was_set_asks_for_every_forward() -> None:
    model = mixture().eval()
    model.config.output_router_logits = True
    assert "aux_loss" in model(**train_batch())
    assert "aux_loss" not in model(**train_batch(), output_router_logits=False)


def test_a_base_that_does_not_know_the_argument_never_sees_it() -> None:
    model = mixture(strict_llama(), task_type=None).train()
    output = model(**train_batch(), output_router_logits=True)
    assert output.aux_loss.item() > 0
    with pytest.raises(TypeError, match="unexpected keyword"):
        strict_llama()(**train_batch(), output_router_logits=True)


def test_disabled_adapters_answer_zero() -> None:
    model = mixture().train()
    with model.disable_adapter():
        output = model(**train_batch(), output_router_logits=True)
    assert output.aux_loss.item() == 0


def test_the_answer_can_be_weighed_by_the_caller_instead_of_the_model() -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    plain = copy.deepcopy(model)
    output = model(**train_batch(), output_router_logits=True)
    (output.logits.square().mean() + 3.0 * output.aux_loss).backward()
    with router_inputs(plain) as inputs:
        logits = plain(**train_batch()).logits
    (logits.square().mean() + 3.0 * expected_mean_loss(plain, inputs)).backward()
    # the reference's own output attaches 0.25 of its loss, since nobody used it
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    oracle = copy.deepcopy(plain)
    oracle.zero_grad()
    with router_inputs(oracle) as inputs:
        oracle(**train_batch())
    (0.25 * expected_mean_loss(oracle, inputs)).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    extra = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        assert_close(gradient + extra.get(name, 0), expected[name], dtype=torch.float32)


def test_a_saved_adapter_holds_nothing_of_it(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    assert NAME not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_deleting_the_last_router_takes_the_config_back() -> None:
    model = mixture()
    model.add_adapter("second", mixture_config())
    model.delete_adapter("second")
    assert hasattr(model.config, NAME)
    model.delete_adapter("default")
    assert not hasattr(model.config, NAME)
