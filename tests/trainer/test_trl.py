"""TRL's trainers by its own contract: the router loss is logged, its gradient right, or refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from moelora import AuxLossError, MoEOptimizer, MoETrainerCallback, mark_mature
from tests.auxiliary import expected_mean_loss, gradients, router_inputs, scaled, summed
from tests.lm import (
    lora_config,
    mixture,
    mixture_config,
    tiny_llama,
    tiny_mixtral,
    trainable,
    two_loras,
)
from tests.test_trainer import NON_REENTRANT, REENTRANT, KeepGradients
from tests.tolerances import assert_close
from tests.trainer.small import SeenBatches, completions, text, tokenizer, trl_trainer

KINDS = ["sft", "dpo", "kto", "grpo"]
COEFFICIENT = 2.0
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "reentrant": {"gradient_accumulation_steps": 2, **REENTRANT},
    "non_reentrant": {"gradient_accumulation_steps": 2, **NON_REENTRANT},
}


class Run:
    """One training step: its gradients, what it logged, what the model was called with."""

    def __init__(self, kind: str, model: PeftModel, folder: Path, **fields: Any) -> None:
        keep = KeepGradients()
        callbacks = [keep, *fields.pop("callbacks", [])]
        trained = copy.deepcopy(model)
        self.trainer = trl_trainer(kind, trained, folder, callbacks=callbacks, **fields)
        seen = SeenBatches(trained)
        self.trainer.train()
        seen.hook.remove()
        self.gradients = keep.steps[0]
        self.batches = seen.batches
        self.logs = self.trainer.state.log_history[0]


def auxiliary(model: PeftModel, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], float]:
    """The mean over micro-batches of the auxiliary loss by hand, its gradient and its value."""
    oracle = copy.deepcopy(model).train()
    total = [torch.zeros_like(p) for p in trainable(oracle).values()]
    values = []
    for batch in batches:
        with router_inputs(oracle) as inputs:
            oracle.get_base_model()(**batch)
        loss = expected_mean_loss(oracle, inputs, mask=batch.get("attention_mask"))
        values.append(loss.item())
        total = summed(total, scaled(gradients(loss, oracle), 1 / len(batches)))
    return total, sum(values) / len(values)


def own_loss(coefficient: float, **fields: Any) -> PeftModel:
    return mixture(router_aux_loss_coef=coefficient, **fields)


# the two tests share the cells: every trainer has each of them once
@pytest.mark.parametrize("cell", ["plain", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_router_loss_is_weighed_and_logged_by_trl(kind: str, cell: str, tmp_path: Path) -> None:
    # the mixture's own coefficient has no say where TRL weighs the loss
    model = own_loss(0.01)
    with_loss = Run(kind, model, tmp_path, router_aux_loss_coef=COEFFICIENT, **CELLS[cell])
    without = Run(kind, own_loss(0.0), tmp_path, **CELLS[cell])
    expected, value = auxiliary(model, with_loss.batches)
    found = [a - b for a, b in zip(with_loss.gradients, without.gradients, strict=True)]
    assert len(with_loss.batches) == CELLS[cell].get("gradient_accumulation_steps", 1)
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)
    assert with_loss.logs["aux_loss"] == pytest.approx(value, rel=1e-5)
    assert with_loss.logs["loss"] - without.logs["loss"] == pytest.approx(
        COEFFICIENT * value, rel=1e-5
    )


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("cell", ["plain", "reentrant"])
def test_shared_routers_are_weighed_and_logged_too(cell: str, scope: str, tmp_path: Path) -> None:
    model = own_loss(0.01, router_scope=scope)
    with_loss = Run("dpo", model, tmp_path, router_aux_loss_coef=COEFFICIENT, **CELLS[cell])
    without = Run("dpo", own_loss(0.0, router_scope=scope), tmp_path, **CELLS[cell])
    expected, value = auxiliary(model, with_loss.batches)
    found = [a - b for a, b in zip(with_loss.gradients, without.gradients, strict=True)]
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)
    assert with_loss.logs["aux_loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("cell", ["accumulation", "non_reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_trls_coefficient_the_mixtures_own_counts(
    kind: str, cell: str, tmp_path: Path
) -> None:
    model = own_loss(COEFFICIENT)
    callbacks = [MoETrainerCallback()]
    with_loss = Run(kind, model, tmp_path, callbacks=callbacks, **CELLS[cell])
    without = Run(kind, own_loss(0.0), tmp_path, **CELLS[cell])
    expected, value = auxiliary(model, with_loss.batches)
    found = [a - b for a, b in zip(with_loss.gradients, without.gradients, strict=True)]
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)
    assert "aux_loss" not in with_loss.logs
    assert with_loss.logs["moe/aux_loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_coefficient_and_callback_accumulation_is_refused(
    kind: str, tmp_path: Path
) -> None:
    trainer = trl_trainer(kind, own_loss(0.01), tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(AuxLossError, match="router_aux_loss_coef in TRL's config"):
        trainer.train()


@pytest.mark.parametrize(
    "fields",
    [
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "router_aux_loss_coef": 0.5},
        {"label_smoothing_factor": 0.1, **REENTRANT},
    ],
    ids=["unset", "set", "reentrant"],
)
def test_label_smoothing_in_sft_that_drops_trls_term_gets_the_mixtures_own(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model = own_loss(COEFFICIENT)
    fields = {"gradient_accumulation_steps": 2, **fields}
    with_loss = Run("sft", model, tmp_path, callbacks=[MoETrainerCallback()], **fields)
    fields.pop("router_aux_loss_coef", None)
    without = Run("sft", own_loss(0.0), tmp_path, **fields)
    expected, _ = auxiliary(model, with_loss.batches)
    found = [a - b for a, b in zip(with_loss.gradients, without.gradients, strict=True)]
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_evaluation_logs_the_router_loss(kind: str, tmp_path: Path) -> None:
    trainer = trl_trainer(
        kind,
        own_loss(0.01),
        tmp_path,
        router_aux_loss_coef=0.5,
        eval_dataset=None if kind != "sft" else completions(2),
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate(trainer.train_dataset if kind != "sft" else None)
    found = [log["eval_aux_loss"] for log in trainer.state.log_history if "eval_aux_loss" in log]
    assert len(found) == 1
    assert found[0] > 0.5
    assert math.isfinite(metrics["eval_loss"])


# DPO's reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_first_dpo_loss_of_a_fresh_mixture_is_ln_2(dropout: float, tmp_path: Path) -> None:
    config = mixture_config(expert_dropout=dropout, lora_dropout=dropout)
    trainer = trl_trainer("dpo", tiny_llama(), tmp_path, peft_config=config)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"expert_capacity_factor": 0.7},
        {"router_scope": "layer"},
        {"router_scope": "model"},
        {"router_type": "learned_with_maturity"},
        {"router_type": "fixed"},
        {"expert_dropout": 0.4, "lora_dropout": 0.3},
        {"expert_dropout": 0.4, "router_scope": "layer"},
    ],
    ids=["sparse", "capacity", "layer", "model", "immature", "fixed", "dropout", "layer_dropout"],
)
def test_the_first_dpo_loss_of_a_trained_mixture_is_ln_2(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model = mixture(router_aux_loss_coef=0.0, **fields)
    if fields.get("router_type") == "learned_with_maturity":
        mark_mature(model, experts=[1], mature=False)
    trainer = trl_trainer("dpo", model, tmp_path, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_dropout_of_experts_that_trl_leaves_on_is_at_work(tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=0.0, expert_dropout=0.4)
    trainer = trl_trainer("dpo", model, tmp_path, disable_dropout=False)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) > 1e-3


def test_dpo_trains_the_mixture_and_leaves_its_reference_alone(tmp_path: Path) -> None:
    model = mixture()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trl_trainer("dpo", model, tmp_path, max_steps=2).train()
    for name, parameter in model.named_parameters():
        moved = ".lora_" in name and ".default." in name
        source = name.replace(".ref.", ".default.")
        assert torch.equal(parameter, before[source]) is not moved, name


# SFT's ways to batch ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_count_every_token_once(strategy: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"packing": True, "packing_strategy": strategy, "max_length": 12}
    from datasets import Dataset

    dataset = Dataset.from_list([{"text": text(4 + i, seed=i)} for i in range(6)])
    model = own_loss(0.01)
    with_loss = Run(
        "sft", model, tmp_path, router_aux_loss_coef=COEFFICIENT, dataset=dataset, **fields
    )
    without = Run("sft", own_loss(0.0), tmp_path, dataset=dataset, **fields)
    (batch,) = with_loss.batches
    assert "attention_mask" not in batch or bool(batch["attention_mask"].all())
    expected, value = auxiliary(model, with_loss.batches)
    found = [a - b for a, b in zip(with_loss.gradients, without.gradients, strict=True)]
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)
    assert with_loss.logs["aux_loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("completion_only", [True, False])
def test_completion_only_loss_routes_prompts_too(completion_only: bool, tmp_path: Path) -> None:
    model = own_loss(0.01)
    run = Run(
        "sft",
        model,
        tmp_path,
        router_aux_loss_coef=COEFFICIENT,
        completion_only_loss=completion_only,
        per_device_train_batch_size=4,
    )
    _, value = auxiliary(model, run.batches)
    assert run.logs["aux_loss"] == pytest.approx(value, rel=1e-5)
    oracle = copy.deepcopy(model).train()
    (batch,) = run.batches
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if completion_only:
        prompts = [2, 3, 4, 2]
        order = {tuple(row[row > 0].tolist()): None for row in batch["input_ids"]}
        assert len(order) == 4
        for row, ids in enumerate(batch["input_ids"].tolist()):
            length = next(
                n for n, example in zip(prompts, encoded(), strict=True) if starts(ids, example)
            )
            labels[row, :length] = -100
    logits = oracle.get_base_model()(**batch).logits
    task = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert run.logs["loss"] == pytest.approx(task.item() + COEFFICIENT * value, rel=1e-5)


def encoded() -> list[list[int]]:
    words = tokenizer()
    return [words(row["prompt"] + row["completion"])["input_ids"] for row in completions()]


def starts(ids: list[int], example: list[int]) -> bool:
    return ids[: len(example)] == example


# The contract ----------------------------------------------------------------------------------


def test_a_base_with_routers_of_its_own_gets_ours_added(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    model = mixture(tiny_mixtral(), **fields)
    run = Run("kto", model, tmp_path, router_aux_loss_coef=0.5)
    _, ours = auxiliary(model, run.batches)
    (batch,) = run.batches
    oracle = mixture(tiny_mixtral(), router_aux_loss_coef=0.0, **fields).train()
    own = oracle.get_base_model()(**batch, output_router_logits=True).aux_loss.item()
    assert run.logs["aux_loss"] == pytest.approx(own + ours, rel=1e-4)


def test_sft_of_a_base_with_routers_of_its_own_trains(tmp_path: Path) -> None:
    model = mixture(tiny_mixtral(), target_modules=["q_proj", "v_proj"])
    run = Run("sft", model, tmp_path, gradient_accumulation_steps=2)
    _, ours = auxiliary(model, run.batches)
    assert run.logs["aux_loss"] > ours


@pytest.mark.parametrize("model", [two_loras(), own_loss(0.0), mixture(router_type="fixed")])
def test_a_model_without_router_loss_is_refused_by_trl(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        trl_trainer("sft", model, tmp_path, router_aux_loss_coef=0.5)


def test_sft_takes_a_config_and_rates_of_their_own(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            router_aux_loss_coef=0.1,
        ),
        train_dataset=completions(),
        processing_class=tokenizer(),
        peft_config=mixture_config(),
        optimizer_cls_and_kwargs=(MoEOptimizer, {"lr": 1e-3, "router_lr": 1e-2}),
    )
    trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"experts_a": 1e-3, "experts_b": 1e-3, "routers": 1e-2}


def test_a_plain_lora_trains_in_trl_as_ever(tmp_path: Path) -> None:
    trainer = trl_trainer("sft", tiny_llama(), tmp_path, peft_config=lora_config())
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
