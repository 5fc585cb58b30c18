"""An unmodified ``transformers.Trainer``: auxiliary gradients in every setting, checkpoints."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from moelora import AuxLossError, MoETrainerCallback
from tests.lm import (
    captured_inputs,
    mixture,
    router_parameters,
    tiny_llama,
    tiny_t5,
    token_ids,
    trainable,
)
from tests.test_auxiliary import (
    LOSS_TYPES,
    expected_mean_loss,
    gradients,
    router_inputs,
    scaled,
    summed,
    without_loss,
)
from tests.tolerances import assert_close, assert_equal

COEFFICIENT = 2.0


def micro_batch(*, seed: int, padding: int = 0, targets_from: int = 0) -> dict[str, Tensor]:
    """Two rows of nine tokens; the second has padding on the left and targets from a position."""
    ids = token_ids(2, 9, seed=seed)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    ids[1, :padding] = 0
    labels = ids.clone()
    labels[1, : max(padding + 1, targets_from)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ONE = [micro_batch(seed=11)]
PADDED = [micro_batch(seed=12, padding=4)]
# 16, 11 and 9 targets
UNEQUAL = [
    micro_batch(seed=13),
    micro_batch(seed=14, padding=4),
    micro_batch(seed=15, targets_from=8),
]


def targets(batch: dict[str, Tensor]) -> int:
    """How many predictions a causal model is judged by."""
    return int(batch["labels"][:, 1:].ne(-100).sum())


def shares_of_targets(batches: list[dict[str, Tensor]]) -> list[float]:
    return [targets(batch) / sum(map(targets, batches)) for batch in batches]


def equal_shares(batches: list[dict[str, Tensor]]) -> list[float]:
    return [1 / len(batches)] * len(batches)


class KeepGradients(TrainerCallback):
    """What the optimiser is about to use."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = trainable(kwargs["model"]).values()
        self.steps.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        )


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 0,
            **fields,
        }
    )


def trainer_of(
    model: PeftModel,
    batches: list[dict[str, Tensor]],
    folder: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    eval_batches: list[dict[str, Tensor]] | None = None,
    compute_loss_func: Any = None,
    compute_metrics: Any = None,
    **fields: Any,
) -> Trainer:
    """A Trainer whose data set holds whole micro-batches, all accumulated into one step."""
    return Trainer(
        model=model,
        args=arguments(folder, **{"gradient_accumulation_steps": len(batches), **fields}),
        train_dataset=batches,
        eval_dataset=eval_batches,
        data_collator=lambda items: dict(items[0]),
        compute_loss_func=compute_loss_func,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def trained_gradients(model: PeftModel, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The gradients of the first step of training a copy of ``model``."""
    keep = KeepGradients()
    callbacks = [keep, *kwargs.pop("callbacks", [])]
    trainer_of(copy.deepcopy(model), *args, callbacks=callbacks, **kwargs).train()
    return keep.steps[0]


def expected_auxiliary(
    model: PeftModel, batches: list[dict[str, Tensor]], shares: list[float]
) -> list[Tensor]:
    """The auxiliary loss's gradient, from logits recomputed by hand."""
    oracle = without_loss(copy.deepcopy(model)).train()
    total = [torch.zeros_like(p) for p in trainable(oracle).values()]
    for batch, share in zip(batches, shares, strict=True):
        with router_inputs(oracle) as inputs:
            oracle(**batch)
        loss = expected_mean_loss(oracle, inputs, mask=batch["attention_mask"])
        total = summed(total, scaled(gradients(loss, oracle), share * COEFFICIENT))
    return total


def sum_of_squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, normalised over the accumulated batch as the Trainer asks."""
    logits = outputs["logits"][:, :-1]
    valid = labels[:, 1:].ne(-100).unsqueeze(-1)
    return 0.01 * (logits.square() * valid).sum() / num_items_in_batch


NON_REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "eval_batches": PADDED}

# name, micro-batches, how each counts, what is asked of the Trainer
EXACT: dict[str, tuple[list[dict[str, Tensor]], Any, dict[str, Any]]] = {
    "plain": (ONE, shares_of_targets, {}),
    "padding": (PADDED, shares_of_targets, {}),
    "accumulation": (UNEQUAL, shares_of_targets, {}),
    "evaluation": (UNEQUAL, shares_of_targets, EVALUATION),
    "non_reentrant": (UNEQUAL, shares_of_targets, NON_REENTRANT),
    "reentrant": (UNEQUAL, shares_of_targets, REENTRANT),
    "label_smoothing": (
        UNEQUAL,
        equal_shares,
        {"label_smoothing_factor": 0.1, "callbacks": [MoETrainerCallback()]},
    ),
    "label_smoothing_of_one_batch": (
        PADDED,
        equal_shares,
        {"label_smoothing_factor": 0.1, "callbacks": [MoETrainerCallback()]},
    ),
    "label_smoothing_reentrant": (
        UNEQUAL,
        equal_shares,
        {"label_smoothing_factor": 0.1, "callbacks": [MoETrainerCallback()], **REENTRANT},
    ),
    "label_smoothing_non_reentrant": (
        UNEQUAL,
        equal_shares,
        {"label_smoothing_factor": 0.1, "callbacks": [MoETrainerCallback()], **NON_REENTRANT},
    ),
    "compute_loss_func": (
        UNEQUAL,
        equal_shares,
        {"compute_loss_func": sum_of_squares, "callbacks": [MoETrainerCallback()]},
    ),
    "compute_loss_func_reentrant": (
        UNEQUAL,
        equal_shares,
        {"compute_loss_func": sum_of_squares, "callbacks": [MoETrainerCallback()], **REENTRANT},
    ),
    "callback_where_it_is_not_needed": (
        UNEQUAL,
        shares_of_targets,
        {"callbacks": [MoETrainerCallback()]},
    ),
}
REFUSED: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": sum_of_squares},
    "label_smoothing_reentrant": {"label_smoothing_factor": 0.1, **REENTRANT},
    "label_smoothing_non_reentrant": {"label_smoothing_factor": 0.1, **NON_REENTRANT},
    "compute_loss_func_reentrant": {"compute_loss_func": sum_of_squares, **REENTRANT},
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("setting", EXACT)
def test_the_auxiliary_gradient_is_there_once_with_its_weight(
    setting: str, loss_type: str, tmp_path: Path
) -> None:
    batches, shares, fields = EXACT[setting]
    model = mixture(load_balance_loss_type=loss_type, router_aux_loss_coef=COEFFICIENT)
    with_loss = trained_gradients(model, batches, tmp_path, **fields)
    without = trained_gradients(without_loss(model), batches, tmp_path, **fields)
    auxiliary = [a - b for a, b in zip(with_loss, without, strict=True)]
    # the model's own norms and loss compute in float32
    assert_close(
        auxiliary, expected_auxiliary(model, batches, shares(batches)), dtype=torch.float32
    )


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    "setting", ["accumulation", "reentrant", "non_reentrant", "label_smoothing_reentrant"]
)
def test_shared_routers_get_the_auxiliary_gradient_once_with_its_weight(
    setting: str, scope: str, tmp_path: Path
) -> None:
    batches, shares, fields = EXACT[setting]
    model = mixture(router_scope=scope, router_aux_loss_coef=COEFFICIENT)
    with_loss = trained_gradients(model, batches, tmp_path, **fields)
    without = trained_gradients(without_loss(model), batches, tmp_path, **fields)
    auxiliary = [a - b for a, b in zip(with_loss, without, strict=True)]
    assert_close(
        auxiliary, expected_auxiliary(model, batches, shares(batches)), dtype=torch.float32
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("setting", REFUSED)
def test_a_loss_of_the_trainers_own_is_refused_without_the_callback(
    setting: str, loss_type: str, tmp_path: Path
) -> None:
    model = mixture(load_balance_loss_type=loss_type)
    trainer = trainer_of(model, UNEQUAL, tmp_path, **REFUSED[setting])
    with pytest.raises(AuxLossError, match="MoETrainerCallback"):
        trainer.train()


@pytest.mark.parametrize("fields", [{"label_smoothing_factor": 0.1}, {}])
def test_a_base_that_takes_no_batch_counts_gets_the_gradient_once_or_an_error(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_llama()
    base.accepts_loss_kwargs = False
    model = mixture(base, router_aux_loss_coef=COEFFICIENT)
    try:
        with_loss = trained_gradients(model, UNEQUAL, tmp_path, **fields)
    except AuxLossError:
        return
    without = trained_gradients(without_loss(model), UNEQUAL, tmp_path, **fields)
    auxiliary = [a - b for a, b in zip(with_loss, without, strict=True)]
    expected = expected_auxiliary(model, UNEQUAL, equal_shares(UNEQUAL))
    assert_close(auxiliary, expected, dtype=torch.float32)


def test_the_last_step_of_an_epoch_may_accumulate_fewer_batches(tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=COEFFICIENT)
    fields: dict[str, Any] = {
        "gradient_accumulation_steps": 4,
        "label_smoothing_factor": 0.1,
        "callbacks": [MoETrainerCallback()],
    }
    with_loss = trained_gradients(model, UNEQUAL, tmp_path, **fields)
    without = trained_gradients(without_loss(model), UNEQUAL, tmp_path, **fields)
    auxiliary = [a - b for a, b in zip(with_loss, without, strict=True)]
    expected = expected_auxiliary(model, UNEQUAL, equal_shares(UNEQUAL))
    assert_close(auxiliary, expected, dtype=torch.float32)


def test_the_callback_leaves_the_model_as_it_found_it(tmp_path: Path) -> None:
    model = mixture().train()
    callbacks = [MoETrainerCallback()]
    trainer_of(model, ONE, tmp_path, label_smoothing_factor=0.1, callbacks=callbacks).train()
    with pytest.raises(AuxLossError, match="MoETrainerCallback"):
        model.train()(input_ids=token_ids(), num_items_in_batch=torch.tensor(3))


def test_after_a_refused_training_a_loop_of_ones_own_is_served(tmp_path: Path) -> None:
    model = mixture().train()
    trainer = trainer_of(model, UNEQUAL, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(AuxLossError, match="MoETrainerCallback"):
        trainer.train()
    del trainer
    gc.collect()
    assert "aux_loss" in model(input_ids=token_ids())


def test_a_training_that_raised_leaves_no_scale_behind(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("interrupted")

    model = mixture(router_aux_loss_coef=COEFFICIENT)
    callbacks = [MoETrainerCallback(), Stop()]
    fields: dict[str, Any] = {"label_smoothing_factor": 0.1, "callbacks": callbacks}
    with pytest.raises(OSError, match="interrupted"):
        trainer_of(model, UNEQUAL, tmp_path, **fields).train()
    copied = without_loss(model).train()
    with captured_inputs(copied) as inputs:
        copied(input_ids=token_ids())
    expected = gradients(expected_mean_loss(copied, inputs), copied)
    model.zero_grad()
    (0.0 * model.train()(input_ids=token_ids()).logits.sum()).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model).values()]
    assert_close(found, scaled(expected, COEFFICIENT), dtype=torch.float32)


def test_an_encoder_decoder_trains_its_routers(tmp_path: Path) -> None:
    model = mixture(
        tiny_t5(),
        target_modules=["q", "wo"],
        task_type="SEQ_2_SEQ_LM",
        router_aux_loss_coef=COEFFICIENT,
    )
    batches = [
        {
            "input_ids": token_ids(2, 6, seed=seed),
            "attention_mask": torch.ones(2, 6, dtype=torch.long),
            "labels": token_ids(2, length, seed=seed + 1),
        }
        for seed, length in ((21, 4), (23, 8))
    ]
    with_loss = trained_gradients(model, batches, tmp_path)
    without = trained_gradients(without_loss(model), batches, tmp_path)
    auxiliary = [a - b for a, b in zip(with_loss, without, strict=True)]
    oracle = without_loss(model).train()
    expected = [torch.zeros_like(p) for p in trainable(oracle).values()]
    for batch, share in zip(batches, (1 / 3, 2 / 3), strict=True):
        with captured_inputs(oracle) as inputs:
            oracle(**batch)
        found = gradients(expected_mean_loss(oracle, inputs), oracle)
        expected = summed(expected, scaled(found, share * COEFFICIENT))
    assert_close(auxiliary, expected, dtype=torch.float32)


# Evaluation ------------------------------------------------------------------------------------


def test_evaluation_loss_and_predictions_have_no_extras(tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=COEFFICIENT)
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = trainer_of(model, ONE, tmp_path, eval_batches=PADDED, compute_metrics=metrics)
    loss = trainer.evaluate()["eval_loss"]
    assert shapes == [(2, 9, 61)]
    assert loss == pytest.approx(model.eval()(**PADDED[0]).loss.item(), rel=1e-6)


def test_logged_loss_of_a_step_holds_the_auxiliary_loss(tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=COEFFICIENT, expert_capacity_factor=None)
    trainer = trainer_of(copy.deepcopy(model), UNEQUAL, tmp_path, logging_steps=1)
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    model.train()
    shares = shares_of_targets(UNEQUAL)
    outputs = [model(**batch) for batch in UNEQUAL]
    expected = sum(share * o.loss.item() for share, o in zip(shares, outputs, strict=True))
    assert logged == [pytest.approx(expected, rel=1e-5)]


# Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_resuming_from_a_checkpoint_continues_to_the_bit(scope: str, tmp_path: Path) -> None:
    batches = [micro_batch(seed=seed) for seed in range(31, 35)]
    fields: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    through = mixture(router_scope=scope)
    trainer_of(through, batches, tmp_path / "a", **fields).train()
    resumed = mixture(router_scope=scope)
    trainer = trainer_of(resumed, batches, tmp_path / "a", **fields)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_equal(list(trainable(resumed).values()), list(trainable(through).values()))


def test_a_checkpoint_holds_the_three_files(tmp_path: Path) -> None:
    trainer_of(mixture(), ONE, tmp_path, save_strategy="steps", save_steps=1).train()
    found = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "router.safetensors"} <= found


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = mixture()
    trainer = trainer_of(
        model,
        ONE,
        tmp_path,
        max_steps=3,
        # every step makes it worse, so the first checkpoint is the best
        learning_rate=3.0,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **EVALUATION,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    expected = PeftModel.from_pretrained(tiny_llama(), best)
    assert_equal(
        [p.detach() for p in router_parameters(model).values()],
        [p.detach() for p in router_parameters(expected).values()],
    )
    assert_equal(model.eval()(**PADDED[0]).logits, expected(**PADDED[0]).logits)


def test_training_moves_routers_and_experts_and_nothing_else(tmp_path: Path) -> None:
    model = mixture()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, ONE, tmp_path).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
