"""The callback's figures against sums by hand, in every setting; TensorBoard; collapse."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainerCallback

from moelora import ConfigError, MoETrainerCallback
from moelora.binding import base_of
from moelora.scope import scope_of
from tests.auxiliary import expected_mean_loss, router_inputs
from tests.lm import mixture, two_loras
from tests.test_trainer import (
    EVALUATION,
    NON_REENTRANT,
    REENTRANT,
    UNEQUAL,
    micro_batch,
    sum_of_squares,
    trainer_of,
)

COEFFICIENT = 2.0


class KeepLogs(TrainerCallback):
    """What reaches a callback that writes logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def logged(
    model: PeftModel, batches: list[dict[str, Tensor]], folder: Path, **fields: Any
) -> list[dict[str, float]]:
    """The routers' figures in all logs of a training that changes nothing."""
    keep = KeepLogs()
    own = [MoETrainerCallback(**fields.pop("options", {}))]
    trainer_of(
        copy.deepcopy(model),
        batches,
        folder,
        callbacks=[keep, *own, *fields.pop("callbacks", [])],
        **{"learning_rate": 0.0, "logging_steps": 1, **fields},
    ).train()
    found = [{k: v for k, v in logs.items() if k.startswith("moe/")} for logs in keep.logs]
    return [each for each in found if each]


def count(
    probs: list[list[float]], mask: list[bool], *, top_k: int, capacity_factor: float | None
) -> list[float]:
    """Slots of each expert, lost slots, summed entropy and tokens, one token after the other."""
    experts = len(probs[0])
    taken, lost, entropy = [0] * experts, 0, 0.0
    limit = math.inf
    if capacity_factor is not None:
        limit = math.ceil(capacity_factor * sum(mask) * top_k / experts - 1e-4)
    for row, real in zip(probs, mask, strict=True):
        if not real:
            continue
        for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
            lost += taken[expert] >= limit
            taken[expert] += 1
        entropy -= sum(p * math.log(p) for p in row)
    return [*taken, lost, entropy, sum(mask)]


def by_hand(
    model: PeftModel, batches: list[dict[str, Tensor]], *, capacity_factor: float | None = None
) -> dict[str, float]:
    """Every figure, token by token, from what each router reads."""
    oracle = copy.deepcopy(model).train()
    config = model.peft_config["default"]
    sums: dict[str, list[float]] = {}
    losses = []
    for batch in batches:
        with router_inputs(oracle) as inputs:
            oracle(**batch)
        losses.append(expected_mean_loss(oracle, inputs, mask=batch["attention_mask"]).item())
        mask = batch["attention_mask"].flatten().bool().tolist()
        for layer, x in inputs.items():
            weight = oracle.get_submodule(layer).lora_router["default"].weight
            logits = (x @ weight.T).flatten(0, -2) / config.router_temperature
            found = count(
                logits.softmax(-1).tolist(),
                mask,
                top_k=config.top_k_experts,
                capacity_factor=capacity_factor,
            )
            name = layer.removeprefix("base_model.model.")
            if config.router_scope == "layer":
                name = ".".join(name.split(".")[:3])
            before = sums.get(name, [0.0] * len(found))
            sums[name] = [a + b for a, b in zip(before, found, strict=True)]
    return {**figures(sums, config.top_k_experts), "moe/aux_loss": sum(losses) / len(losses)}


def figures(sums: dict[str, list[float]], top_k: int) -> dict[str, float]:
    """The names and values that are to be logged."""
    named: dict[str, float] = {}
    for layer, (*slots, lost, entropy, tokens) in sums.items():
        named[f"moe/entropy/{layer}"] = entropy / tokens
        named[f"moe/dropped/{layer}"] = lost / (tokens * top_k)
        for expert, number in enumerate(slots):
            named[f"moe/load/{layer}/{expert}"] = number / (tokens * top_k)
    for name in ("entropy", "dropped"):
        values = [v for k, v in named.items() if k.startswith(f"moe/{name}/")]
        named[f"moe/{name}"] = sum(values) / len(values)
    named["moe/load_max"] = max(v for k, v in named.items() if k.startswith("moe/load/"))
    return named


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "reentrant": REENTRANT,
    "non_reentrant": NON_REENTRANT,
    "evaluation": EVALUATION,
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": sum_of_squares},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_figures_are_those_of_all_real_tokens_once(setting: str, tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=COEFFICIENT, expert_capacity_factor=1.0)
    (found,) = logged(model, UNEQUAL, tmp_path, **SETTINGS[setting])
    assert found == pytest.approx(by_hand(model, UNEQUAL, capacity_factor=1.0), rel=1e-5)


def test_figures_of_a_router_per_block_carry_the_blocks_name(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"router_scope": "layer", "expert_capacity_factor": None}
    model = mixture(router_aux_loss_coef=COEFFICIENT, **fields)
    (found,) = logged(model, UNEQUAL, tmp_path)
    assert found == pytest.approx(by_hand(model, UNEQUAL), rel=1e-5)


def test_without_an_auxiliary_loss_the_rest_is_logged(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"router_aux_loss_coef": 0.0, "expert_capacity_factor": None}
    model = mixture(**fields)
    (found,) = logged(model, UNEQUAL, tmp_path, **REENTRANT)
    expected = by_hand(model, UNEQUAL)
    del expected["moe/aux_loss"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_each_log_holds_the_steps_since_the_last(tmp_path: Path) -> None:
    model = mixture(expert_capacity_factor=None)
    batches = [micro_batch(seed=seed, padding=seed % 3) for seed in range(6)]
    order: list[dict[str, Tensor]] = []

    class KeepBatches(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            base = kwargs["model"].get_base_model()
            base.register_forward_pre_hook(
                lambda _, args, kwargs: order.append(dict(kwargs)), with_kwargs=True
            )

    fields: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_steps": 6}
    found = logged(model, batches, tmp_path, logging_steps=3, callbacks=[KeepBatches()], **fields)
    assert len(found) == 2
    for each, part in zip(found, (order[:3], order[3:]), strict=True):
        kept = [{k: b[k] for k in ("input_ids", "attention_mask", "labels")} for b in part]
        assert each == pytest.approx(by_hand(model, kept), rel=1e-5)


def test_tensorboard_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = mixture(expert_capacity_factor=None)
    (found,) = logged(model, UNEQUAL, tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = {
        tag.removeprefix("train/"): events.Scalars(tag)[0].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("train/moe/")
    }
    assert written == pytest.approx(found, rel=1e-6)
    assert written == pytest.approx(by_hand(model, UNEQUAL), rel=1e-5)


def test_a_callback_added_after_the_trainer_was_made_reaches_tensorboard_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(mixture(), UNEQUAL, tmp_path, report_to="tensorboard", logging_steps=1)
    trainer.add_callback(MoETrainerCallback())
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert "train/moe/entropy" in events.Tags()["scalars"]


def test_the_overview_is_printed_and_kept_and_the_details_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [MoETrainerCallback()]
    trainer = trainer_of(mixture(), UNEQUAL, tmp_path, callbacks=callbacks, logging_steps=1)
    trainer.train()
    overview = {"moe/entropy", "moe/dropped", "moe/load_max", "moe/aux_loss"}
    kept = {name for name in trainer.state.log_history[0] if name.startswith("moe/")}
    assert kept == overview
    printed = capsys.readouterr().out
    assert all(name in printed for name in overview)
    assert "moe/load/" not in printed


def test_logs_of_evaluation_and_of_ones_own_are_left_alone(tmp_path: Path) -> None:
    keep = KeepLogs()
    callbacks = [MoETrainerCallback(), keep]
    trainer = trainer_of(mixture(), UNEQUAL, tmp_path, callbacks=callbacks, eval_batches=UNEQUAL)
    trainer.train()
    trainer.evaluate()
    trainer.log({"loss": 1.0})
    assert not any(name.startswith("moe/") for logs in keep.logs for name in logs)


def test_it_leaves_nothing_on_the_model(tmp_path: Path) -> None:
    model = mixture()
    trainer_of(model, UNEQUAL, tmp_path, callbacks=[MoETrainerCallback()]).train()
    scope = scope_of(base_of(model))
    assert not scope.observers
    assert scope.aux_loss_scale is None


def test_an_observation_carries_no_graph(tmp_path: Path) -> None:
    model = mixture()
    callback = MoETrainerCallback()
    trainer = trainer_of(model, UNEQUAL, tmp_path, callbacks=[callback], logging_steps=100)
    trainer.train()
    observation = callback._observation
    kept = [*observation._totals.values(), observation._aux_loss]
    assert len(kept) > 1
    assert not any(tensor.requires_grad for tensor in kept)
    copy.deepcopy(model)


def test_a_training_that_raised_is_looked_at_by_nobody_once_its_callback_is_gone(
    tmp_path: Path,
) -> None:
    model = mixture()
    scope = scope_of(base_of(model))

    def broken(items: list[Any]) -> Any:
        raise OSError("no data")

    trainer = trainer_of(model, UNEQUAL, tmp_path, callbacks=[MoETrainerCallback()])
    trainer.data_collator = broken
    with pytest.raises(OSError, match="no data"):
        trainer.train()
    del trainer
    assert not list(scope.observers)


def test_a_plain_lora_model_trains_with_it_as_without(tmp_path: Path) -> None:
    assert logged(two_loras(), UNEQUAL, tmp_path) == []


def test_logging_can_be_left_out(tmp_path: Path) -> None:
    assert logged(mixture(), UNEQUAL, tmp_path, options={"log_routing": False}) == []


# Collapse --------------------------------------------------------------------------------------


def collapsed_mixture(*, collapsed: bool = True) -> PeftModel:
    """Four experts; one router's scores are all 0, and ties go to the first two."""
    model = mixture(num_experts=4, expert_capacity_factor=None)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    if collapsed:
        torch.nn.init.zeros_(layer.lora_router["default"].weight)
    return model


def warned(model: PeftModel, folder: Path, **options: Any) -> list[str]:
    batches = [micro_batch(seed=seed) for seed in range(5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fields: dict[str, Any] = {"gradient_accumulation_steps": 5, "max_steps": 3}
        logged(model, batches, folder, options=options, **fields)
    return [str(w.message) for w in caught if "busiest experts" in str(w.message)]


def test_a_collapsed_router_is_named_once_with_what_to_do(tmp_path: Path) -> None:
    (message,) = warned(collapsed_mixture(), tmp_path)
    assert "model.layers.1.self_attn.v_proj (100%)" in message
    assert message.count("model.layers") == 1
    assert "router_aux_loss_coef" in message
    assert "param_groups" in message


def test_a_balanced_router_is_not_warned_of(tmp_path: Path) -> None:
    assert warned(collapsed_mixture(collapsed=False), tmp_path) == []


def test_a_threshold_of_one_never_warns(tmp_path: Path) -> None:
    assert warned(collapsed_mixture(), tmp_path, collapse_threshold=1) == []


@pytest.mark.parametrize("value", [0, 1.5, -1.0, float("nan")])
def test_a_threshold_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"collapse_threshold must be a number in \(0, 1\]"):
        MoETrainerCallback(collapse_threshold=value)


# The scale -------------------------------------------------------------------------------------


def test_the_last_step_of_a_stream_may_accumulate_fewer_batches(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(UNEQUAL)

    scales = []

    class KeepScale(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            scales.append(scope_of(base_of(kwargs["model"])).aux_loss_scale)

    trainer: Trainer = trainer_of(
        mixture(),
        UNEQUAL,
        tmp_path,
        callbacks=[MoETrainerCallback(), KeepScale()],
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer.train_dataset = Stream()
    trainer.train()
    # the Trainer divides the losses of these steps by 2, 1 and 2
    assert scales == [0.5, 1.0, 0.5]
