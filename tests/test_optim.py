"""Parameter groups: every trainable parameter once, with the rate and decay of its kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from moelora import ConfigError, MoEOptimizer, Router, param_groups
from tests.lm import (
    lora_config,
    mixture,
    router_parameters,
    tiny_llama,
    trainable,
    two_loras,
)
from tests.test_trainer import PADDED, arguments, micro_batch


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The parameters of each group, by name."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {name_of[id(p)] for p in group["params"]} for group in groups}


def rate_of(groups: list[dict[str, Any]], key: str = "lr") -> dict[str, float]:
    return {group["name"]: group[key] for group in groups}


@pytest.mark.parametrize(
    "model",
    [
        mixture(router_hidden_size=3),
        mixture(router_scope="layer"),
        mixture(target_modules=["embed_tokens", "q_proj"]),
        mixture(modules_to_save=["lm_head"], bias="all"),
        two_loras(),
    ],
    ids=["hidden", "layer", "embedding", "saved_modules", "plain"],
)
def test_every_trainable_parameter_is_in_one_group(model: PeftModel) -> None:
    groups = param_groups(model, lr=1e-3)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in trainable(model).values()}


def test_groups_hold_what_their_names_say() -> None:
    model = mixture(modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"])
    found = names_of(model, param_groups(model, lr=1e-3))
    assert found["routers"] == set(router_parameters(model))
    assert found["experts_b"] == {name for name in trainable(model) if ".lora_B." in name}
    assert found["experts_a"] == {
        name for name in trainable(model) if ".lora_A." in name or ".lora_embedding_" in name
    }
    assert found["other"] == {name for name in trainable(model) if "modules_to_save" in name}


def test_rates_and_decays_are_those_asked_for() -> None:
    groups = param_groups(
        mixture(modules_to_save=["lm_head"], bias="lora_only"),
        lr=1e-3,
        router_lr=5e-3,
        weight_decay=0.1,
        router_weight_decay=0.2,
        loraplus_lr_ratio=16,
    )
    assert rate_of(groups) == {
        "experts_a": 1e-3,
        "experts_b": 1.6e-2,
        "routers": 5e-3,
        "other": 1e-3,
    }
    assert rate_of(groups, "weight_decay") == {
        "experts_a": 0.1,
        "experts_b": 0.1,
        "routers": 0.2,
        "other": 0.1,
    }


def test_the_defaults_are_one_rate_and_one_decay() -> None:
    groups = param_groups(mixture(), lr=1e-3, weight_decay=0.1)
    assert set(rate_of(groups).values()) == {1e-3}
    assert set(rate_of(groups, "weight_decay").values()) == {0.1}


def test_vectors_are_never_decayed() -> None:
    config = lora_config(use_dora=True, target_modules=["q_proj"])
    groups = param_groups(get_peft_model(tiny_llama(), config), lr=1e-3, weight_decay=0.1)
    assert rate_of(groups, "weight_decay")["other_no_decay"] == 0.0


def test_an_attached_router_is_a_router() -> None:
    model = two_loras()
    model.attach_router(Router(input_size=16, num_experts=2, top_k=1))
    groups = param_groups(model, lr=1e-3, router_lr=1e-2)
    assert names_of(model, groups)["routers"] == {
        name for name in trainable(model) if name.startswith("base_model.router.")
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number > 0, got nan"),
        ({"router_lr": -1.0}, "router_lr must be a finite number > 0, got -1.0"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio must be a finite number > 0, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"router_weight_decay": -1}, "router_weight_decay must be a finite number >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        param_groups(mixture(), **{"lr": 1e-3, **fields})


def test_a_rate_that_nobody_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="router_lr given, but the model has no trainable"):
        param_groups(two_loras(), lr=1e-3, router_lr=1e-2)
    frozen = mixture()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(".lora_A." in name)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio given, but the model has no"):
        param_groups(frozen, lr=1e-3, loraplus_lr_ratio=4)


def test_nothing_to_train_is_refused() -> None:
    model = mixture()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter to optimise"):
        param_groups(model, lr=1e-3)


def test_what_is_not_about_groups_reaches_the_optimiser() -> None:
    made = MoEOptimizer()(
        mixture(), lr=1e-3, router_lr=1e-2, optimizer_class=torch.optim.SGD, momentum=0.5
    )
    assert isinstance(made, torch.optim.SGD)
    assert {group["momentum"] for group in made.param_groups} == {0.5}
    assert rate_of(made.param_groups)["routers"] == 1e-2


def one_step(model: PeftModel, folder: Path, **kwargs: Any) -> tuple[PeftModel, Trainer]:
    """A copy of ``model`` after one step of gradient descent with these groups."""
    trained = copy.deepcopy(model)
    trainer = Trainer(
        model=trained,
        args=arguments(folder, lr_scheduler_type="constant"),
        train_dataset=PADDED,
        data_collator=lambda items: dict(items[0]),
        optimizer_cls_and_kwargs=(MoEOptimizer, {"optimizer_class": torch.optim.SGD, **kwargs}),
    )
    trainer.train()
    return trained, trainer


def test_the_trainer_steps_each_group_by_its_own_rate(tmp_path: Path) -> None:
    model = mixture(router_aux_loss_coef=1.0)
    slow, _ = one_step(model, tmp_path, lr=1e-3)
    fast, _ = one_step(model, tmp_path, lr=1e-3, router_lr=4e-3, loraplus_lr_ratio=2)
    before = trainable(model)
    for name, parameter in trainable(fast).items():
        moved = parameter - before[name]
        factor = 4 if ".lora_router." in name else 2 if ".lora_B." in name else 1
        expected = factor * (trainable(slow)[name] - before[name])
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-9)


def test_a_schedule_keeps_the_ratio_of_the_rates_and_resuming_restores_them(
    tmp_path: Path,
) -> None:
    def trainer_for(model: PeftModel) -> Trainer:
        fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return Trainer(
            model=model,
            args=arguments(tmp_path, **fields),
            train_dataset=[micro_batch(seed=seed) for seed in range(4)],
            data_collator=lambda items: dict(items[0]),
            optimizer_cls_and_kwargs=(MoEOptimizer, {"lr": 1e-3, "router_lr": 1e-2}),
        )

    through, resumed = mixture(), mixture()
    trainer_for(through).train()
    trainer = trainer_for(resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in trainable(resumed).items():
        assert torch.equal(parameter, trainable(through)[name]), name
    rates = rate_of(trainer.optimizer.param_groups, "initial_lr")
    assert rates == {"experts_a": 1e-3, "experts_b": 1e-3, "routers": 1e-2}


def test_a_plain_lora_model_has_groups_of_its_own() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert set(rate_of(param_groups(model, lr=1e-3))) == {"experts_a", "experts_b"}
