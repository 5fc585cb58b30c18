"""Settings of an unmodified Trainer: each leaves the auxiliary loss and the checkpoints right."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from moelora import AuxLossError, MoETrainerCallback, mark_mature
from tests.auxiliary import (
    expected_mean_loss,
    gradients,
    router_inputs,
    scaled,
    summed,
    without_loss,
)
from tests.lm import mixture, tiny_llama, token_ids, trainable
from tests.test_trainer import (
    COEFFICIENT,
    EVALUATION,
    ONE,
    PADDED,
    REENTRANT,
    UNEQUAL,
    KeepGradients,
    arguments,
    equal_shares,
    expected_auxiliary,
    micro_batch,
    shares_of_targets,
    trained_gradients,
    trainer_of,
)
from tests.tolerances import assert_close, assert_equal
from tests.trainer.small import tokenizer

# Gradient accumulation -------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Tensor]]:
    """Single rows without padding, of one length."""
    return [
        {"input_ids": ids[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
        | {"labels": ids[None].clone()}
        for ids in token_ids(count, 9, seed=41)
    ]


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulation_equals_the_large_batch(accumulated: int, tmp_path: Path) -> None:
    # a mean over tokens; a balancing loss is a product of means and has no such law
    fields: dict[str, Any] = {"load_balance_loss_type": "z_loss", "expert_capacity_factor": None}
    model = mixture(router_aux_loss_coef=COEFFICIENT, **fields)
    single = rows(4)
    size = 4 // accumulated
    small = [joined(single[i : i + size]) for i in range(0, 4, size)]
    logs: list[float] = []
    found = []
    for batches in (small, [joined(single)]):
        keep = KeepGradients()
        trainer = trainer_of(
            copy.deepcopy(model), batches, tmp_path, callbacks=[keep], logging_steps=1
        )
        trainer.train()
        found.append(keep.steps[0])
        logs.append(trainer.state.log_history[0]["loss"])
    assert_close(found[0], found[1], dtype=torch.float32)
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


# A loss of the user's own ----------------------------------------------------------------------


class OwnLoss(Trainer):
    """Computes the loss from logits; the labels went to the model as well."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["logits"].square().mean() / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class WithAuxLoss(Trainer):
    """Weighs ``outputs.aux_loss`` itself."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["logits"].square().mean() + 3.0 * outputs["aux_loss"]
        loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class WithHiddenStates(Trainer):
    """Looks at nothing but hidden states."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs, output_hidden_states=True)
        loss = outputs["hidden_states"][-1].square().mean()
        loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def own_gradients(
    trainer: Any, model: PeftModel, folder: Path, *, callback: bool = True, **fields: Any
) -> list[Tensor]:
    keep = KeepGradients()
    made = trainer(
        model=copy.deepcopy(model),
        args=arguments(folder, gradient_accumulation_steps=len(UNEQUAL), **fields),
        train_dataset=UNEQUAL,
        data_collator=lambda items: dict(items[0]),
        callbacks=[keep, MoETrainerCallback()] if callback else [keep],
    )
    made.loss_is_scaled_for_ga = True
    made.train()
    return keep.steps[0]


@pytest.mark.parametrize("checkpointing", [{}, REENTRANT], ids=["plain", "reentrant"])
@pytest.mark.parametrize(
    ("trainer", "weight"),
    [(OwnLoss, COEFFICIENT), (WithAuxLoss, 3.0), (WithHiddenStates, COEFFICIENT)],
)
def test_a_loss_of_ones_own_gets_the_auxiliary_gradient_once(
    trainer: Any, weight: float, checkpointing: dict[str, Any], tmp_path: Path
) -> None:
    model = mixture(router_aux_loss_coef=COEFFICIENT)
    found = own_gradients(trainer, model, tmp_path, **checkpointing)
    plain = trainer if trainer is not WithAuxLoss else OwnLoss
    without = own_gradients(plain, without_loss(model), tmp_path, **checkpointing)
    auxiliary = [a - b for a, b in zip(found, without, strict=True)]
    expected = expected_auxiliary(model, UNEQUAL, equal_shares(UNEQUAL))
    assert_close(auxiliary, scaled(expected, weight / COEFFICIENT), dtype=torch.float32)


def test_a_loss_of_ones_own_is_refused_without_the_callback(tmp_path: Path) -> None:
    with pytest.raises(AuxLossError, match="MoETrainerCallback"):
        own_gradients(OwnLoss, mixture(), tmp_path, callback=False)


# Precision -----------------------------------------------------------------------------------


def test_mixed_precision_keeps_the_auxiliary_gradient(tmp_path: Path) -> None:
    # so large that the rounding of the task's gradient does not hide it
    coefficient = 64.0
    model = mixture(tiny_llama(dtype=torch.float32), router_aux_loss_coef=coefficient)
    seen: list[torch.dtype] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            layer = kwargs["model"].get_submodule("base_model.model.model.layers.0.mlp.up_proj")
            layer.register_forward_hook(lambda *args: seen.append(args[-1].dtype))

    found = trained_gradients(model, UNEQUAL, tmp_path, bf16=True, callbacks=[Watch()])
    without = trained_gradients(without_loss(model), UNEQUAL, tmp_path, bf16=True)
    assert set(seen) == {torch.bfloat16}
    auxiliary = torch.cat([(a - b).flatten() for a, b in zip(found, without, strict=True)])
    exact = expected_auxiliary(model, UNEQUAL, shares_of_targets(UNEQUAL))
    expected = torch.cat([gradient.flatten() for gradient in exact])
    expected *= coefficient / COEFFICIENT
    # bfloat16 rounds to 2 ** -8, and a few tokens choose another expert for it
    assert (auxiliary - expected).norm() < 0.15 * expected.norm()


# Batches by length -----------------------------------------------------------------------------


def test_batches_grouped_by_length_count_real_tokens(tmp_path: Path) -> None:
    drawn = random.Random(0)
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}
        for ids in ([drawn.randrange(3, 61) for _ in range(3 + i % 7)] for i in range(12))
    ]
    model = mixture(router_aux_loss_coef=COEFFICIENT)
    batches: list[dict[str, Tensor]] = []
    collate = DataCollatorForSeq2Seq(tokenizer())

    def collator(items: list[Any]) -> dict[str, Tensor]:
        batch = dict(collate(items))
        batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch

    found = []
    for each in (model, without_loss(model)):
        batches.clear()
        keep = KeepGradients()
        Trainer(
            model=copy.deepcopy(each),
            args=arguments(
                tmp_path,
                train_sampling_strategy="group_by_length",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=3,
            ),
            train_dataset=examples,
            data_collator=collator,
            callbacks=[keep],
        ).train()
        found.append(keep.steps[0])
    lengths = [batch["attention_mask"].sum(dim=1) for batch in batches[:3]]
    assert all(length.max() - length.min() <= 4 for length in lengths)
    auxiliary = [a - b for a, b in zip(*found, strict=True)]
    assert_close(auxiliary, by_targets(model, batches[:3]), dtype=torch.float32)


def by_targets(model: PeftModel, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The auxiliary gradient, each batch weighed by its targets."""
    numbers = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches]
    oracle = without_loss(model).train()
    total = [torch.zeros_like(p) for p in trainable(oracle).values()]
    for batch, number in zip(batches, numbers, strict=True):
        with router_inputs(oracle) as inputs:
            oracle(**batch)
        loss = expected_mean_loss(oracle, inputs, mask=batch["attention_mask"])
        share = COEFFICIENT * number / sum(numbers)
        total = summed(total, scaled(gradients(loss, oracle), share))
    return total


# Checkpoints -----------------------------------------------------------------------------------


class Ripen(TrainerCallback):
    """Marks one expert mature at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            mark_mature(kwargs["model"], experts=[0])


def young_mixture() -> PeftModel:
    """Experts of which none is mature, with dropout, so that everything random is used."""
    model = mixture(
        router_type="learned_with_maturity",
        expert_dropout=0.3,
        lora_dropout=0.2,
        router_hidden_size=3,
    )
    mark_mature(model, mature=False)
    return model


def buffers(model: PeftModel) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if ".lora_router." in name}


def optimiser_tensors(trainer: Trainer) -> list[Tensor]:
    states = trainer.optimizer.state_dict()["state"].values()
    return [value for state in states for value in state.values()]


def test_resuming_restores_buffers_optimiser_and_random_numbers_to_the_bit(
    tmp_path: Path,
) -> None:
    batches = [micro_batch(seed=seed) for seed in range(31, 35)]
    fields: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    through, resumed = young_mixture(), young_mixture()
    first = trainer_of(through, batches, tmp_path, callbacks=[Ripen(2)], **fields)
    first.train()
    second = trainer_of(resumed, batches, tmp_path, **fields)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(list(trainable(resumed).values()), list(trainable(through).values()))
    assert len(buffers(resumed)) == 6
    assert_equal(list(buffers(resumed).values()), list(buffers(through).values()))
    assert all(b.tolist() == [True, False, False] for b in buffers(resumed).values())
    assert_equal(optimiser_tensors(second), optimiser_tensors(first))


def test_the_best_models_buffers_come_back_with_it(tmp_path: Path) -> None:
    model = young_mixture()
    trainer = trainer_of(
        model,
        ONE,
        tmp_path,
        max_steps=3,
        learning_rate=3.0,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        callbacks=[Ripen(2)],
        **EVALUATION,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "adapter_model.safetensors")
    found = {name: b for name, b in saved.items() if name.endswith(".mature")}
    assert len(found) == 6
    expected = best.name != "checkpoint-1"
    assert all(bool(b[0]) is expected for b in [*found.values(), *buffers(model).values()])


def test_the_limit_of_checkpoints_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    trainer = trainer_of(
        mixture(),
        ONE,
        tmp_path,
        max_steps=4,
        learning_rate=3.0,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        **EVALUATION,
    )
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    best = Path(trainer.state.best_model_checkpoint).name
    assert left == sorted({best, "checkpoint-4"})
    for name in left:
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert torch.isfinite(loaded(**PADDED[0]).loss)


def test_training_goes_on_from_the_last_checkpoint_of_a_folder(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer_of(mixture(), ONE, tmp_path, max_steps=2, **fields).train()
    resumed = mixture()
    trainer = trainer_of(resumed, ONE, tmp_path, max_steps=3, **fields)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-3")
    assert_equal(
        [p.detach() for n, p in resumed.named_parameters() if ".lora_" in n],
        [p.detach() for n, p in loaded.named_parameters() if ".lora_" in n],
    )


def test_prediction_gives_logits_alone(tmp_path: Path) -> None:
    trainer = trainer_of(mixture(), ONE, tmp_path)
    predicted = trainer.predict(PADDED)
    assert predicted.predictions.shape == (2, 9, 61)
