"""PEFT's adapter management with mixtures: what is active, trainable, merged, deleted, counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moelora import MergeError, MoELoraConfig, RoutingWeightsError, UnsupportedLayerError
from tests.lm import (
    TARGETS,
    assert_same_snapshot,
    captured_inputs,
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    snapshot,
    tiny_llama,
    token_ids,
    trainable,
)
from tests.tolerances import assert_close, assert_equal


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    output: Tensor = model(token_ids(), **kwargs).logits
    return output


def two_mixtures(**second: Any) -> PeftModel:
    """Mixtures of three and of two experts; the first is active."""
    model = mixture(name="first")
    model.add_adapter("second", mixture_config(**{"num_experts": 2, "r": 3, **second}))
    perturb(model)
    return model.eval()


def with_plain_lora() -> PeftModel:
    """A mixture and a plain LoRA; the mixture is active."""
    model = mixture(name="first")
    model.add_adapter("plain", lora_config(r=3))
    perturb(model)
    return model.eval()


def adapters_with_gradient(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[1].split(".")[1] for name in trainable(model)}


def names_of(model: nn.Module) -> set[str]:
    return {
        name for layer in lora_layers(model).values() for name in (*layer.lora_A, *layer.lora_B)
    }


# Making ----------------------------------------------------------------------------------------


def test_one_config_makes_one_adapter_whatever_its_name() -> None:
    model = get_peft_model(tiny_llama(), mixture_config(num_experts=4), adapter_name="skills")
    assert list(model.peft_config) == ["skills"]
    assert names_of(model) == {"skills"}
    shapes = {tuple(layer.lora_A["skills"].weight.shape) for layer in lora_layers(model).values()}
    assert shapes == {(8, 16), (8, 24)}


def test_a_fresh_mixture_equals_its_base() -> None:
    model = get_peft_model(tiny_llama(), mixture_config()).eval()
    assert_equal(logits(model), logits(tiny_llama().eval()))


def test_the_users_config_is_not_changed_by_making_a_model() -> None:
    config = mixture_config()
    before = config.to_dict()
    get_peft_model(tiny_llama(), config)
    after = config.to_dict()
    # PEFT itself notes the base model and the class of task
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"base_model_name_or_path", "auto_mapping", "target_modules"}


def test_print_trainable_parameters_counts_experts_and_routers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_llama()
    total_of_base = sum(p.numel() for p in base.parameters())
    model = mixture(base)
    rank, experts = 6, 3
    per_block = {"q_proj": (16, 16), "v_proj": (16, 8), "down_proj": (24, 16)}
    expected = 2 * sum(
        rank * (width_in + width_out) + experts * width_in
        for width_in, width_out in per_block.values()
    )
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {expected:,}" in printed
    assert f"all params: {total_of_base + expected:,}" in printed


def test_only_adapter_parameters_are_trainable() -> None:
    model = mixture()
    assert trainable(model).keys() == {n for n, _ in model.named_parameters() if ".lora_" in n}


def test_all_linear_targets_make_a_mixture_everywhere_but_the_head() -> None:
    model = mixture(target_modules="all-linear")
    assert len(lora_layers(model)) == 14
    assert len(router_parameters(model)) == 14


def test_without_routing_one_expert_is_a_plain_lora() -> None:
    config = mixture_config(
        use_moe_routing=False, num_experts=1, router_type="learned_with_maturity", top_k_experts=2
    )
    model = get_peft_model(tiny_llama(), config).eval()
    plain = get_peft_model(tiny_llama(), lora_config()).eval()
    perturb(model)
    perturb(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_equal(logits(model), logits(plain))


# Which adapters are active -------------------------------------------------------------------


def test_set_adapter_makes_one_mixture_active_and_trainable() -> None:
    model = two_mixtures()
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    assert adapters_with_gradient(model) == {"second"}
    assert len(trainable(model)) == 3 * len(lora_layers(model))


def test_a_mixture_beside_the_active_one_changes_nothing() -> None:
    alone, both = mixture(name="first").eval(), mixture(name="first").eval()
    both.add_adapter("second", mixture_config())
    perturb_only(both, "second")
    assert_equal(logits(both), logits(alone))


def perturb_only(model: nn.Module, adapter: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.normal_(std=0.3)


def test_switching_there_and_back_changes_nothing() -> None:
    model = two_mixtures()
    before = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), before)
    model.set_adapter("first")
    assert_equal(logits(model), before)


def test_several_mixtures_are_set_on_the_tuner_and_all_are_trainable() -> None:
    model = two_mixtures()
    model.base_model.set_adapter(["first", "second"])
    assert model.active_adapters == ["first", "second"]
    assert adapters_with_gradient(model) == {"first", "second"}


def by_hand(model: PeftModel, adapters: list[str], shared: tuple[str, ...] = ()) -> PeftModel:
    """A model whose layers route by a float64 loop over tokens and experts of ``adapters``."""
    copied = copy.deepcopy(model)
    for layer in lora_layers(copied).values():
        layer.forward = _loop(layer, adapters, shared)
    return copied


def _loop(layer: LoraLayer, adapters: list[str], shared: tuple[str, ...]) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = layer.base_layer(x)
        for name in shared:
            result = result + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        rows = []
        for row, out in zip(x.flatten(0, -2), result.flatten(0, -2), strict=True):
            scores, experts = [], []
            for name in adapters:
                router = layer.lora_router[name]
                scores.extend(router.weight @ row / 2.0)
                rank = layer.lora_A[name].weight.shape[0] // router.num_experts
                for index in range(router.num_experts):
                    part = slice(index * rank, (index + 1) * rank)
                    a = layer.lora_A[name].weight[part]
                    b = layer.lora_B[name].weight[:, part]
                    experts.append(layer.scaling[name] * (b @ (a @ row)))
            best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:2]
            total = sum(scores[i].exp() for i in best)
            rows.append(out + sum(scores[i].exp() / total * experts[i] for i in best))
        return torch.stack(rows).reshape(result.shape)

    return forward


def test_one_mixture_equals_a_loop_over_tokens_and_experts() -> None:
    model = two_mixtures()
    assert_close(logits(model), logits(by_hand(model, ["first"])), dtype=torch.float32)


@pytest.mark.parametrize("order", [["first", "second"], ["second", "first"]])
def test_active_mixtures_compete_for_tokens_together(order: list[str]) -> None:
    model = two_mixtures()
    model.base_model.set_adapter(order)
    # the output passes norms that compute in float32
    assert_close(logits(model), logits(by_hand(model, order)), dtype=torch.float32)


def test_the_order_of_active_mixtures_changes_no_output() -> None:
    model = two_mixtures()
    model.base_model.set_adapter(["first", "second"])
    before = logits(model)
    model.base_model.set_adapter(["second", "first"])
    assert_close(logits(model), before, dtype=torch.float32)


@pytest.mark.parametrize("order", [["first", "plain"], ["plain", "first"]])
def test_a_plain_lora_beside_a_mixture_is_a_shared_expert(order: list[str]) -> None:
    model = with_plain_lora()
    model.base_model.set_adapter(order)
    expected = logits(by_hand(model, ["first"], shared=("plain",)))
    assert_close(logits(model), expected, dtype=torch.float32)


def test_an_active_plain_lora_alone_is_pefts_own_to_the_bit() -> None:
    model = with_plain_lora()
    model.set_adapter("plain")
    alone = get_peft_model(tiny_llama(), lora_config(r=3), adapter_name="plain").eval()
    state = {k: v for k, v in model.state_dict().items() if ".first." not in k}
    alone.load_state_dict(state)
    assert_equal(logits(model), logits(alone))


def test_a_mixture_that_targets_other_layers_leaves_the_rest_alone() -> None:
    model = mixture(name="first")
    model.add_adapter("second", mixture_config(target_modules=["o_proj", "q_proj"]))
    perturb(model)
    model.eval().base_model.set_adapter(["first", "second"])
    expected = copy.deepcopy(model)
    for name, layer in lora_layers(expected).items():
        own = [adapter for adapter in ("first", "second") if adapter in layer.lora_A]
        layer.forward = _loop(layer, own, ())
        assert own == (["first", "second"] if "q_proj" in name else own)
    assert_close(logits(model), logits(expected), dtype=torch.float32)


def test_explicit_weights_count_the_experts_of_all_active_adapters() -> None:
    model = two_mixtures()
    model.base_model.set_adapter(["second", "first"])
    with pytest.raises(RoutingWeightsError, match="E=5"):
        logits(model, routing_weights=torch.ones(4))


def test_explicit_weights_skip_columns_of_adapters_that_a_layer_lacks() -> None:
    model = mixture(name="first", target_modules=["q_proj"])
    model.add_adapter("second", lora_config(target_modules=["v_proj"]))
    perturb(model)
    model.eval().base_model.set_adapter(["first", "second"])
    weights = torch.tensor([0.0, 0.0, 0.0, 0.7], dtype=torch.float64)
    with_weights = logits(model, routing_weights=weights)
    model.set_adapter("second")
    single = logits(model, routing_weights=torch.tensor([0.7], dtype=torch.float64))
    assert_equal(with_weights, single)


def test_adapter_names_with_a_mixture_are_refused() -> None:
    with pytest.raises(RoutingWeightsError, match="adapter_names"):
        logits(two_mixtures(), adapter_names=["first", "second"])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_mixture_of_another_scope_beside_the_active_one_changes_nothing(scope: str) -> None:
    alone, both = mixture(name="first").eval(), mixture(name="first").eval()
    both.add_adapter("second", mixture_config(router_scope=scope))
    perturb_only(both, "second")
    assert_equal(logits(both), logits(alone))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_switching_to_a_mixture_of_another_scope_equals_that_mixture_alone(scope: str) -> None:
    both = mixture(name="first").eval()
    both.add_adapter("second", mixture_config(router_scope=scope))
    perturb_only(both, "second")
    both.set_adapter("second")
    alone = mixture(name="second", router_scope=scope).eval()
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if ".first." not in k})
    assert_equal(logits(both), logits(alone))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_shared_mixtures_of_one_scope_compete_in_any_order(scope: str) -> None:
    model = mixture(name="first", router_scope=scope).eval()
    model.add_adapter(
        "second",
        mixture_config(router_scope=scope, num_experts=2, target_modules=["o_proj", "down_proj"]),
    )
    perturb_only(model, "second")
    model.base_model.set_adapter(["first", "second"])
    before = logits(model)
    model.base_model.set_adapter(["second", "first"])
    assert_close(logits(model), before, dtype=torch.float32)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_deleting_a_shared_mixture_leaves_the_other_as_it_was(scope: str) -> None:
    model = mixture(name="first", router_scope=scope).eval()
    before = logits(model)
    model.add_adapter("second", mixture_config(router_scope=scope))
    model.delete_adapter("second")
    assert_equal(logits(model), before)
    model.add_adapter("third", mixture_config(router_scope=scope))
    assert_equal(logits(model), before)


def test_a_plain_lora_beside_a_mixture_routed_by_block_is_a_shared_expert() -> None:
    model = mixture(name="first", router_scope="layer").eval()
    model.add_adapter("plain", lora_config())
    perturb_only(model, "plain")
    model.base_model.set_adapter(["first", "plain"])
    found, state = logits(model), model.state_dict()
    model.set_adapter("plain")
    merged = model.merge_and_unload()
    expected = mixture(merged, name="first", router_scope="layer").eval()
    expected.load_state_dict({k: v for k, v in state.items() if ".first." in k}, strict=False)
    assert_close(found, logits(expected), dtype=torch.float32)


# Disabling -------------------------------------------------------------------------------------


def test_disable_adapter_gives_the_base_and_returns() -> None:
    model = mixture().eval()
    before = logits(model)
    with model.disable_adapter():
        assert_equal(logits(model), logits(tiny_llama().eval()))
    assert_equal(logits(model), before)


def test_disabling_freezes_experts_and_routers_alike_until_enabled_again() -> None:
    model = mixture()
    names = set(trainable(model))
    model.base_model.disable_adapter_layers()
    assert not trainable(model)
    model.base_model.enable_adapter_layers()
    assert set(trainable(model)) == names


# Adding and deleting ---------------------------------------------------------------------------


def test_adding_a_second_mixture_leaves_the_first_untouched_to_the_bit() -> None:
    model = mixture(name="first").eval()
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model)
    model.add_adapter("second", mixture_config())
    assert_equal(logits(model), before)
    for key, tensor in tensors.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_an_added_mixture_is_neither_active_nor_trainable() -> None:
    model = two_mixtures()
    assert model.active_adapters == ["first"]
    assert adapters_with_gradient(model) == {"first"}


def test_a_mixture_added_to_a_model_in_eval_is_in_eval_too() -> None:
    model = mixture(name="first").eval()
    model.add_adapter("second", mixture_config(target_modules=["o_proj"]))
    perturb(model)
    model.set_adapter("second")
    before = logits(model)
    assert_equal(logits(model.eval()), before)


def test_deleting_a_mixture_leaves_nothing_of_it() -> None:
    model = two_mixtures()
    model.delete_adapter("second")
    assert list(model.peft_config) == ["first"]
    assert not [key for key in model.state_dict() if ".second." in key]
    for layer in lora_layers(model).values():
        assert "second" not in layer.moe_mixtures
        assert "second" not in layer.lora_router


def test_deleting_a_mixture_gives_back_the_model_before_it_was_added() -> None:
    model = mixture(name="first").eval()
    before, logits_before = snapshot(model), logits(model)
    model.add_adapter("second", mixture_config())
    model.delete_adapter("second")
    after = snapshot(model)
    # a new adapter's parts are made in training mode, none of them is left
    assert_same_snapshot(after, before)
    assert_equal(logits(model), logits_before)


def test_deleting_the_active_mixture_activates_the_other() -> None:
    model = two_mixtures()
    with pytest.warns(UserWarning, match="first was active"):
        model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    expected = copy.deepcopy(model)
    for layer in lora_layers(expected).values():
        layer.forward = _loop(layer, ["second"], ())
    assert_close(logits(model), logits(expected), dtype=torch.float32)


def test_a_deleted_name_can_be_used_again_with_another_number_of_experts() -> None:
    model = two_mixtures()
    model.delete_adapter("second")
    model.add_adapter("second", mixture_config(num_experts=4))
    perturb(model)
    model.set_adapter("second")
    weights = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    assert logits(model, routing_weights=weights).isfinite().all()
    with pytest.raises(RoutingWeightsError, match="E=4"):
        logits(model, routing_weights=torch.ones(2))


def test_a_plain_lora_may_take_the_name_of_a_deleted_mixture() -> None:
    model = two_mixtures()
    model.delete_adapter("second")
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["second"])
    perturb(model)
    assert logits(model, routing_weights=torch.ones(1)).isfinite().all()
    alone = get_peft_model(tiny_llama(), lora_config(), adapter_name="second").eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if ".first." not in k})
    assert_equal(logits(model), logits(alone))


# Unloading and merging -------------------------------------------------------------------------


def test_unload_returns_the_original_model() -> None:
    base = tiny_llama().eval()
    expected = logits(base)
    before = snapshot(base)
    unloaded = mixture(base).unload()
    assert unloaded is base
    after = {**snapshot(base), "requires_grad": before["requires_grad"]}
    assert_same_snapshot(after, before)
    assert_equal(logits(base), expected)


def test_unload_takes_several_adapters_away() -> None:
    model = two_mixtures()
    model.add_adapter("plain", lora_config())
    assert not lora_layers(model.unload())


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_learned_routing_is_not_merged_and_the_reason_is_given(method: str) -> None:
    model = mixture().eval()
    before, logits_before = snapshot(model), logits(model)
    with pytest.raises(MergeError, match="depends on the token"):
        getattr(model, method)()
    assert_same_snapshot(snapshot(model), before)
    assert_equal(logits(model), logits_before)


def test_a_mixture_named_among_those_to_merge_is_refused_before_any_is_merged() -> None:
    model = with_plain_lora()
    before = snapshot(model)
    with pytest.raises(MergeError, match="'first'"):
        model.merge_adapter(adapter_names=["plain", "first"])
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 2.0]])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens"]}])
def test_fixed_routing_merges_exactly(fields: dict[str, Any], weights: list[float] | None) -> None:
    model = mixture(router_type="fixed", fixed_routing_weights=weights, **fields).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not lora_layers(merged)
    assert_close(logits(merged), expected, dtype=torch.float32)


def test_the_merged_weight_is_the_base_plus_the_weighted_experts() -> None:
    weights = [0.5, -1.0, 2.0]
    model = mixture(router_type="fixed", fixed_routing_weights=weights)
    layer = next(iter(lora_layers(model).values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.clone()
    for index, weight in enumerate(weights):
        part = slice(2 * index, 2 * index + 2)
        # alpha / r = 2
        expected = expected + weight * 2.0 * b[:, part] @ a[part]
    model.merge_adapter()
    assert_close(layer.base_layer.weight, expected)


def test_merging_and_unmerging_fixed_routing_is_the_identity() -> None:
    model = mixture(router_type="fixed", fixed_routing_weights=[0.5, -1.0, 2.0]).eval()
    before, tensors = logits(model), snapshot(model)["tensors"]
    model.merge_adapter()
    assert_close(logits(model), before, dtype=torch.float32)
    model.unmerge_adapter()
    for key, tensor in model.state_dict().items():
        assert_close(tensor, tensors[key])


def test_a_plain_lora_is_merged_while_a_mixture_is_only_loaded() -> None:
    model = with_plain_lora()
    model.set_adapter("plain")
    expected = logits(model)
    assert_close(logits(model.merge_and_unload()), expected, dtype=torch.float32)


def test_a_mixture_cannot_be_blended_into_a_weighted_adapter() -> None:
    model = with_plain_lora()
    with pytest.raises(MergeError, match="'first'"):
        model.add_weighted_adapter(["first", "plain"], [0.5, 0.5], "blend")
    assert "blend" not in model.peft_config


# Other models ----------------------------------------------------------------------------------


def test_a_mixed_model_refuses_a_mixture_and_leaves_the_base_alone() -> None:
    base = tiny_llama()
    with pytest.raises(UnsupportedLayerError, match="PeftMixedModel"):
        get_peft_model(base, mixture_config(), mixed=True)
    assert not lora_layers(base)


def test_a_model_without_task_type_routes_a_mixture() -> None:
    model = mixture(task_type=None).eval()
    assert type(model) is PeftModel
    assert_equal(logits(model), logits(mixture().eval()))


def test_training_only_the_active_mixture_leaves_the_other_untouched_to_the_bit() -> None:
    model = two_mixtures().train()
    before = {k: v.clone() for k, v in model.state_dict().items() if ".second." in k}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in before.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_every_layer_of_an_active_mixture_reads_its_own_input() -> None:
    model = mixture().eval()
    with captured_inputs(model) as inputs:
        logits(model)
    assert {name.rsplit(".", 1)[1] for name in inputs} == set(TARGETS)


def test_the_config_stays_a_lora_config_for_those_who_ask() -> None:
    model = mixture()
    config = model.peft_config["default"]
    assert isinstance(config, MoELoraConfig)
    assert config.peft_type == "LORA"
    assert config.r == 2
