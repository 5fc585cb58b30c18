"""A mixture as one PEFT adapter: its tensors, and what PEFT's methods do with it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from moelora import (
    MergeError,
    RoutingWeightsError,
    UnsupportedLayerError,
)
from tests.mixtures import (
    NOT_GROUPED,
    by_hand,
    draw_input,
    moe_config,
    moe_model,
    routed_by_hand,
)
from tests.models import (
    Block,
    activate,
    adapter_parameters,
    llama_config,
    lora_config,
    lora_layers,
    one_layer,
    randomise,
)
from tests.tolerances import assert_close, assert_equal

# Fixed routing and merging ---------------------------------------------------------------------

FIXED = {"router_type": "fixed", "fixed_routing_weights": [0.5, -1.25, 0.0]}


@pytest.mark.parametrize("given_weights", [None, [0.5, -1.25, 0.0]])
def test_fixed_routing_uses_the_given_or_uniform_weights(given_weights: Any) -> None:
    config = moe_config(router_type="fixed", fixed_routing_weights=given_weights)
    model = moe_model(config)
    assert not hasattr(one_layer(model), "lora_router")
    x = draw_input()
    row = torch.tensor(given_weights or [1 / 3] * 3, dtype=torch.float64)
    assert_close(model(x), by_hand(model, x, [config], row.expand(2, 3, 3)))


class MadeTensors(TorchDispatchMode):
    """Counts tensors made of Python's numbers; on a GPU each is a copy that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_fixed_weights_are_made_once_and_serve_training_after_inference() -> None:
    config = moe_config(**FIXED)
    model = moe_model(config)
    x = draw_input()
    with torch.inference_mode():
        first = model(x)
    with MadeTensors() as made:
        second = model(x)
    assert made.number == 0
    assert_equal(first, second)
    second.sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model))
    # other weights, and a copy of the model with its own
    mixtures = one_layer(model).moe_mixtures
    for name, spec in mixtures.items():
        mixtures[name] = replace(spec, fixed_weights=(1.0, 2.0, 3.0))
    row = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for other in (model, copy.deepcopy(model)):
        assert_close(other(x), by_hand(model, x, [config], row.expand(2, 3, 3)))


def test_fixed_weights_are_not_kept_from_transforms() -> None:
    model = moe_model(moe_config(**FIXED))
    x = draw_input()
    mapped = torch.func.vmap(lambda row: model(row[None])[0])(x)
    assert_close(mapped, model(x))
    (slope,) = torch.func.jacrev(lambda x: model(x).sum(), argnums=(0,))(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert_close(slope, x.grad)


@pytest.mark.parametrize("kind", NOT_GROUPED)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_fixed_routing_merges_exactly_and_back(kind: str, safe_merge: bool) -> None:
    model = moe_model(moe_config(**FIXED), kind=kind)
    x = draw_input(kind)
    routed = model(x)
    base = one_layer(model).base_layer.weight.detach().clone()
    tensors = [parameter.detach().clone() for parameter in adapter_parameters(model)]
    model.merge_adapter(safe_merge=safe_merge)
    assert_close(model(x), routed)
    model.unmerge_adapter()
    assert_close(one_layer(model).base_layer.weight, base)
    assert_equal([p.detach() for p in adapter_parameters(model)], tensors)
    assert all(p.requires_grad for p in adapter_parameters(model))
    assert_close(model(x), routed)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not list(lora_layers(merged))
    assert_close(merged(x), routed)


def test_explicit_weights_are_refused_while_a_fixed_mixture_is_merged() -> None:
    model = moe_model(moe_config(**FIXED))
    model.merge_adapter()
    x = draw_input()
    before = model(x)
    with pytest.raises(RoutingWeightsError, match=r"while adapters \['e0'\] are merged"):
        model(x, routing_weights=torch.rand(3))
    assert_equal(model(x), before)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(["e1", "e0"]),
        lambda model: model.merge_and_unload(),
        lambda model: model.base_model.merge_and_unload(safe_merge=True),
        lambda model: one_layer(model).merge(),
        lambda model: one_layer(model).get_delta_weight("e0"),
    ],
    ids=["merge_adapter", "with names", "merge_and_unload", "safe", "layer", "delta"],
)
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
def test_learned_routing_refuses_to_merge_and_changes_nothing(merge: Any, router_type: str) -> None:
    model = moe_model(moe_config(router_type=router_type), lora_config())
    x = draw_input()
    before = model(x)
    with pytest.raises(MergeError, match=r"'e0'.* no single merged weight.*router_type='fixed'"):
        merge(model)
    assert_equal(model(x), before)
    assert not one_layer(model).merged


def test_a_plain_adapter_beside_a_learned_mixture_still_merges() -> None:
    model = moe_model(moe_config(), lora_config())
    x = draw_input()
    activate(model, ["e1"])
    plain = model(x)
    assert_close(model.merge_and_unload(adapter_names=["e1"])(x), plain)


def test_mixtures_are_not_combined_by_add_weighted_adapter() -> None:
    model = moe_model(moe_config(), lora_config(), lora_config())
    with pytest.raises(MergeError, match=r"\['e0'\] are mixtures .* set_adapter\(\[\.\.\.\]\)"):
        model.add_weighted_adapter(["e0", "e1"], [0.5, 0.5], "sum", combination_type="linear")
    assert "sum" not in model.peft_config
    model.add_weighted_adapter(["e1", "e2"], [0.5, 0.5], "sum", combination_type="linear")
    assert "sum" in model.peft_config


# One adapter in PEFT's sense -------------------------------------------------------------------


def test_a_mixture_has_the_tensors_of_one_lora_of_all_ranks_and_a_router() -> None:
    model = moe_model(moe_config(router_type="learned_with_maturity", router_hidden_size=4))
    shapes = {
        key.split(".layer.")[1]: tuple(value.shape)
        for key, value in model.state_dict().items()
        if "lora_" in key
    }
    assert shapes == {
        "lora_A.e0.weight": (6, 6),
        "lora_B.e0.weight": (5, 6),
        "lora_router.e0.weight": (3, 4),
        "lora_router.e0.hidden_weight": (4, 6),
        "lora_router.e0.mature": (3,),
    }


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"r": 4, "lora_alpha": 6}, 6 / 4),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(4)),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"layer": 2}}, 6 / 2),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"layer": 10}}, 10 / 4),
        (
            {
                "r": 4,
                "rank_pattern": {"layer": 3},
                "alpha_pattern": {"layer": 7},
                "use_rslora": True,
            },
            7 / math.sqrt(3),
        ),
    ],
)
def test_rank_and_alpha_are_those_of_each_expert(changes: dict[str, Any], scaling: float) -> None:
    config = moe_config(**changes)
    model = moe_model(config)
    layer = one_layer(model)
    rank = changes.get("rank_pattern", {}).get("layer", changes["r"])
    assert layer.scaling["e0"] == pytest.approx(scaling)
    assert layer.lora_A["e0"].weight.shape == (3 * rank, 6)
    # the caller's config is not changed by it
    assert (config.r, config.num_experts) == (changes["r"], 3)
    x = draw_input()
    assert_close(model(x), routed_by_hand(model, x, config))


def test_the_config_kept_by_the_model_is_the_one_given() -> None:
    config = moe_config(rank_pattern={"layer": 1})
    before = config.to_dict()
    model = get_peft_model(Block(nn.Linear(6, 5)), config)
    kept = model.peft_config["default"].to_dict()
    assert {name: kept[name] for name in ("r", "lora_alpha", "rank_pattern", "num_experts")} == {
        name: before[name] for name in ("r", "lora_alpha", "rank_pattern", "num_experts")
    }


def test_gaussian_initialisation_spreads_as_for_one_experts_rank() -> None:
    config = moe_config(r=4, init_lora_weights="gaussian")
    model = get_peft_model(Block(nn.Linear(2000, 5)), config)
    weight = one_layer(model).lora_A["default"].weight
    assert float(weight.detach().std()) == pytest.approx(1 / 4, rel=0.05)
    assert float(one_layer(model).lora_B["default"].weight.detach().abs().max()) == 0


def test_routers_of_different_layers_start_different() -> None:
    model = get_peft_model(
        LlamaForCausalLM(llama_config()), moe_config(target_modules=["q_proj", "k_proj"])
    )
    rows = [layer.lora_router["default"].weight.detach().flatten() for layer in lora_layers(model)]
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert all(0 < float(row.abs().max()) < 0.1 for row in rows)


def test_exactly_the_mixtures_tensors_train() -> None:
    model = get_peft_model(Block(nn.Linear(6, 5)), moe_config(router_hidden_size=4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".layer.")[1] for name in trainable} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_router.default.weight",
        "lora_router.default.hidden_weight",
    }
    number = 6 * 6 + 5 * 6 + 3 * 4 + 4 * 6
    assert model.get_nb_trainable_parameters() == (number, number + 6 * 5 + 5)


def test_print_trainable_parameters_counts_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(Block(nn.Linear(6, 5)), moe_config())
    model.print_trainable_parameters()
    assert "trainable params: 84 " in capsys.readouterr().out


def test_setting_an_adapter_freezes_and_frees_its_router() -> None:
    model = moe_model(moe_config(), moe_config(num_experts=2))
    routers = one_layer(model).lora_router
    model.set_adapter("e1")
    assert not routers["e0"].weight.requires_grad
    assert routers["e1"].weight.requires_grad
    model.set_adapter("e0")
    assert routers["e0"].weight.requires_grad
    assert not routers["e1"].weight.requires_grad


def test_a_mixture_for_inference_does_not_train() -> None:
    model = get_peft_model(Block(nn.Linear(6, 5)), moe_config(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_a_mixture_leaves_nothing_of_it_and_the_others_as_they_were() -> None:
    model = moe_model(moe_config(), moe_config(num_experts=2), lora_config())
    x = draw_input()
    model.set_adapter("e1")
    activate(model, ["e1", "e2"])
    before = model(x)
    model.delete_adapter("e0")
    assert not any(".e0." in key for key in model.state_dict())
    assert "e0" not in one_layer(model).moe_mixtures
    assert_equal(model(x), before)
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    model(x, routing_weights=weights)


def test_a_second_mixture_leaves_the_first_as_it_was() -> None:
    model = get_peft_model(Block(nn.Linear(6, 5)).double(), moe_config(), "e0")
    randomise(model)
    x = draw_input()
    before = model(x)
    model.add_adapter("e1", moe_config(num_experts=2))
    assert list(model.base_model.active_adapters) == ["e0"]
    assert_equal(model(x), before)


def test_a_deleted_name_can_be_used_again_for_a_plain_lora() -> None:
    model = moe_model(moe_config(), lora_config())
    model.delete_adapter("e0")
    model.add_adapter("e0", lora_config())
    activate(model, ["e0", "e1"])
    x = draw_input()
    ones = torch.ones(2, dtype=torch.float64)
    assert_close(model(x, routing_weights=ones), model(x))


def test_copies_route_alike_and_apart() -> None:
    model = moe_model(moe_config())
    x = draw_input()
    model(x)
    copied = copy.deepcopy(model)
    assert_equal(copied(x), model(x))
    copied.base_model.model.layer.lora_router["e0"].weight.data.neg_()
    assert not torch.equal(copied(x), model(x))


# Layers that cannot hold a mixture -------------------------------------------------------------


class Mixed(nn.Module):
    """A linear layer before one that cannot be routed."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = second


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (nn.MultiheadAttention(4, 2), "'second': nn.MultiheadAttention uses its whole weight"),
        (nn.Conv2d(4, 4, 1, groups=2), "'second': a convolution with groups=2"),
    ],
)
@pytest.mark.parametrize("router_type", ["learned", "fixed"])
def test_a_layer_that_cannot_hold_a_mixture_is_refused_before_anything_changes(
    second: nn.Module, match: str, router_type: str
) -> None:
    base = Mixed(second)
    types = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(UnsupportedLayerError, match=match):
        get_peft_model(
            base, moe_config(target_modules=["first", "second"], router_type=router_type)
        )
    assert {name: type(module) for name, module in base.named_modules()} == types
