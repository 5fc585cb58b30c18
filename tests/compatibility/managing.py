"""Adapters: made, added, activated, disabled, counted, deleted."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from tests.compatibility.registry import (
    EXPLICIT,
    MIXTURE,
    Area,
    Kind,
    both,
    of_model,
    of_tuner,
)
from tests.lm import lora_layers, perturb, tiny_llama, token_ids, trainable
from tests.tolerances import assert_close, assert_equal

AREA = Area("Adapters")


@AREA.works(
    "`get_peft_model`",
    "one adapter per config; a fresh one equals the base",
    covers=of_model("peft_config", "active_peft_config", "active_adapters")
    + of_tuner("active_adapters", "tuner_layer_cls"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = get_peft_model(tiny_llama(), kind.config(), adapter_name="skill").eval()
    assert list(model.peft_config) == ["skill"]
    assert model.active_adapters == model.base_model.active_adapters == ["skill"]
    assert model.active_peft_config is model.peft_config["skill"]
    assert type(model.active_peft_config) is type(kind.config())
    assert issubclass(model.base_model.tuner_layer_cls, LoraLayer)
    assert_equal(kind.logits(model, experts=1), tiny_llama()(token_ids()).logits)


@AREA.works(
    "`add_adapter`",
    "the new adapter is inactive, the others unchanged to the bit",
    covers=of_model("add_adapter"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    model.add_adapter("third", kind.config(target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".third." in name:
                parameter.fill_(0.3)
    assert model.active_adapters == kind.adapters
    assert_equal(kind.logits(model), before)


@AREA.works(
    "`add_adapter(low_cpu_mem_usage=True)`",
    "tensors are empty until they are loaded",
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    model.add_adapter("third", kind.config(), low_cpu_mem_usage=True)
    new = [p for name, p in model.named_parameters() if ".third." in name]
    assert new
    assert all(parameter.is_meta for parameter in new)
    assert not any(p.is_meta for name, p in model.named_parameters() if ".third." not in name)


@AREA.works("`delete_adapter`", "nothing of the adapter is left", covers=both("delete_adapter"))
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before, keys = kind.logits(model), list(model.state_dict())
    for owner in (model, model.base_model):
        model.add_adapter("third", kind.config())
        owner.delete_adapter("third")
        assert list(model.state_dict()) == keys
        assert "third" not in model.peft_config
        assert_equal(kind.logits(model), before)


@AREA.works(
    "`set_adapter`, one name",
    "that adapter alone is active and trainable, its router with it",
    covers=both("set_adapter"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    model.add_adapter("third", kind.config())
    perturb(model)
    for owner, name in ((model, "third"), (model.base_model, "default"), (model, "third")):
        owner.set_adapter(name)
        assert model.active_adapters == [name]
        assert {key.split(".lora_")[1].split(".")[1] for key in trainable(model)} == {name}
    alone = get_peft_model(tiny_llama(), kind.config(), adapter_name="third").eval()
    own = {k: v for k, v in model.state_dict().items() if k in alone.state_dict()}
    alone.load_state_dict(own)
    assert_equal(kind.logits(model, experts=1), kind.logits(alone, experts=1))


@AREA.works(
    "`set_adapter`, several names",
    "on the tuner; the experts of all of them compete for each token, in that order",
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    model.add_adapter("other", kind.config(num_experts=2, r=3))
    perturb(model)
    model.eval().base_model.set_adapter(["default", "other"])
    together = kind.logits(model)
    # the other mixture's rows alone, of a router that always loses: it takes no part
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_router["other"].weight.mul_(0)
            layer.lora_B["other"].weight.mul_(0)
    assert not torch.equal(kind.logits(model), together)
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    first = model(token_ids(), routing_weights=weights).logits
    model.base_model.set_adapter(["other", "default"])
    assert_equal(model(token_ids(), routing_weights=weights.roll(2)).logits, first)


@AREA.works(
    "`set_adapter`, several names",
    "on the tuner; the i-th weight belongs to the i-th name",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    weights = kind.arguments()["routing_weights"]
    before = model(token_ids(), routing_weights=weights).logits
    model.base_model.set_adapter(["second", "default"])
    swapped = model(token_ids(), routing_weights=weights.flip(-1)).logits
    assert_close(swapped, before, dtype=torch.float32)


@AREA.works(
    "`set_requires_grad`",
    "experts and routers of the named adapters alike",
    covers=both("set_requires_grad"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    for owner in (model, model.base_model):
        owner.set_requires_grad(kind.adapters, requires_grad=False)
        assert not trainable(model)
        owner.set_requires_grad("default")
        expected = {n for n, _ in model.named_parameters() if ".lora_" in n and ".default" in n}
        assert set(trainable(model)) == expected


@AREA.works(
    "`disable_adapter`",
    "the base model's output to the bit, and back",
    covers=of_model("disable_adapter", "has_active_enabled_adapter"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert_equal(kind.logits(model), tiny_llama()(token_ids()).logits)
        assert not model.has_active_enabled_adapter
    assert_equal(kind.logits(model), before)


@AREA.works(
    "`disable_adapter_layers`, `enable_adapter_layers`",
    "the base model's output, nothing trainable; and back",
    covers=of_tuner("disable_adapter_layers", "enable_adapter_layers"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before, names = kind.logits(model), set(trainable(model))
    model.base_model.disable_adapter_layers()
    assert not trainable(model)
    assert_equal(kind.logits(model), tiny_llama()(token_ids()).logits)
    model.base_model.enable_adapter_layers()
    assert set(trainable(model)) == names
    assert_equal(kind.logits(model), before)


@AREA.works(
    "`get_layer_status`",
    "active adapters, gradients and devices of each layer, routers included",
    covers=of_model("get_layer_status"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    names = [name.removeprefix("model.") for name in model.base_model.model.state_dict()]
    assert names
    status = model.get_layer_status()
    assert len(status) == len(lora_layers(model)) == 6
    for layer in status:
        assert layer.module_type == "lora.Linear"
        assert layer.enabled
        assert layer.active_adapters == kind.adapters
        assert layer.available_adapters == kind.adapters
        assert layer.merged_adapters == []
        assert layer.requires_grad == dict.fromkeys(kind.adapters, True)
        assert layer.devices == {name: ["cpu"] for name in kind.adapters}
    for name, parameter in model.named_parameters():
        if kind is MIXTURE and ".lora_router." in name:
            parameter.requires_grad_(False)
    if kind is MIXTURE:
        flags = {
            flag for layer in model.get_layer_status() for flag in layer.requires_grad.values()
        }
        assert flags == {"irregular"}


@AREA.works(
    "`get_model_status`",
    "the counts of parameters and layers",
    covers=of_model("get_model_status"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "LoraModel"
    assert status.peft_types == dict.fromkeys(kind.adapters, "LORA")
    assert status.num_adapter_layers == 6
    assert status.trainable_params == sum(p.numel() for p in trainable(model).values())
    assert status.total_params == sum(p.numel() for p in model.parameters())
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == kind.adapters
    assert status.merged_adapters == []
    assert status.requires_grad == dict.fromkeys(kind.adapters, True)


@AREA.works(
    "`get_nb_trainable_parameters`, `print_trainable_parameters`",
    "experts and routers are counted once",
    covers=of_model("get_nb_trainable_parameters", "print_trainable_parameters"),
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    size = sum(p.numel() for p in base.parameters())
    model = kind.model(base)
    widths = [(16, 16), (16, 8), (24, 16)]
    ranks = 4 if kind is EXPLICIT else 6
    rows = 0 if kind is EXPLICIT else 3
    own = 2 * sum(ranks * (into + out) + rows * into for into, out in widths)
    assert model.get_nb_trainable_parameters() == (own, size + own)
    model.print_trainable_parameters()


@AREA.works("`copy.deepcopy`", "an independent model with equal logits")
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    copied = copy.deepcopy(model)
    assert_equal(kind.logits(copied), before)
    perturb(copied, seed=7)
    assert_equal(kind.logits(model), before)
