"""The routed mixture in a layer: laws first, then what training, dtypes and neighbours change."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import (
    ConfigError,
    MoELoraConfig,
    RoutingWeightsError,
    UnsupportedLayerError,
    mark_mature,
    record_routing,
)
from tests.mixtures import (
    NOT_GROUPED,
    by_hand,
    draw_input,
    logits_by_hand,
    moe_config,
    moe_model,
    routed_by_hand,
)
from tests.models import (
    LAYER_KINDS,
    Block,
    activate,
    adapter_parameters,
    gradients,
    llama_config,
    lora_config,
    lora_layers,
    one_layer,
    randomise,
    token_ids,
)
from tests.reference import experts_of, mixture_reference, routing_reference
from tests.tolerances import assert_close, assert_equal


@st.composite
def mixtures(draw: st.DrawFn, kind: str = "Linear") -> tuple[PeftModel, Tensor, MoELoraConfig]:
    """A layer with one mixture, an input, and the config."""
    experts = draw(st.integers(2, 5))
    config = moe_config(
        num_experts=experts,
        top_k_experts=draw(st.integers(1, experts)),
        r=draw(st.integers(1, 3)),
        lora_alpha=draw(st.integers(1, 9)),
        router_temperature=draw(st.sampled_from([0.25, 1.0, 2.0])),
        router_hidden_size=draw(st.none() | st.integers(1, 4)),
        router_type=draw(st.sampled_from(["learned", "learned_with_maturity"])),
    )
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    least = 0 if kind == "Linear" else 1
    x = draw_input(kind, draw(st.integers(least, 3)), draw(st.integers(least, 4)))
    return moe_model(config, kind=kind), x, config


Mixture = tuple[PeftModel, Tensor, MoELoraConfig]


# Laws ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(mixture=mixtures())
def test_a_mixture_equals_the_formula_with_all_gradients(mixture: Mixture) -> None:
    model, x, config = mixture
    output, expected = model(x), routed_by_hand(model, x, config)
    assert_close(output, expected)
    inputs = [x, *adapter_parameters(model)]
    assert_close(gradients(output, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("kind", NOT_GROUPED)
@settings(max_examples=6)
@given(data=st.data())
def test_every_kind_of_layer_routes_by_the_formula(kind: str, data: st.DataObject) -> None:
    model, x, config = data.draw(mixtures(kind))
    output, expected = model(x), routed_by_hand(model, x, config)
    assert_close(output, expected)
    inputs = [*adapter_parameters(model), *([x] if x.is_floating_point() else [])]
    assert_close(gradients(output, inputs), gradients(expected, inputs))


@settings(max_examples=15)
@given(mixture=mixtures(), seed=st.integers(0, 99))
def test_renaming_the_experts_changes_nothing(mixture: Mixture, seed: int) -> None:
    model, x, config = mixture
    before = model(x)
    order = torch.randperm(config.num_experts, generator=torch.Generator().manual_seed(seed))
    layer = one_layer(model)
    a, b, router = layer.lora_A["e0"], layer.lora_B["e0"], layer.lora_router["e0"]
    with torch.no_grad():
        a.weight.copy_(a.weight.unflatten(0, (config.num_experts, -1))[order].flatten(0, 1))
        b.weight.copy_(b.weight.unflatten(1, (config.num_experts, -1))[:, order].flatten(1, 2))
        router.weight.copy_(router.weight[order])
    assert_close(model(x), before)


@settings(max_examples=15)
@given(mixture=mixtures())
def test_no_row_or_token_depends_on_another(mixture: Mixture) -> None:
    model, x, _ = mixture
    whole = model(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            alone = model(x[row : row + 1, token : token + 1])
            assert_close(alone[0, 0], whole[row, token])


@settings(max_examples=15)
@given(mixture=mixtures())
def test_equal_experts_make_routing_irrelevant(mixture: Mixture) -> None:
    model, x, config = mixture
    layer = one_layer(model)
    with torch.no_grad():
        for weight, axis in ((layer.lora_A["e0"].weight, 0), (layer.lora_B["e0"].weight, 1)):
            first = weight.chunk(config.num_experts, dim=axis)[0]
            weight.copy_(torch.cat([first] * config.num_experts, dim=axis))
    (expert, *_) = experts_of(layer, ["e0"], [config.num_experts])
    update = expert.scaling * (x @ expert.a.T @ expert.b.T)
    if config.top_k_experts == 1:
        logits = logits_by_hand(layer, "e0", x, config.router_temperature)
        update = update * logits.softmax(dim=-1).max(dim=-1, keepdim=True).values
    assert_close(model(x), layer.base_layer(x) + update)


@settings(max_examples=15)
@given(mixture=mixtures())
def test_one_hot_explicit_weights_equal_the_one_expert(mixture: Mixture) -> None:
    model, x, config = mixture
    layer = one_layer(model)
    experts = experts_of(layer, ["e0"], [config.num_experts])
    for index, expert in enumerate(experts):
        weights = torch.eye(config.num_experts, dtype=torch.float64)[index]
        expected = layer.base_layer(x) + expert.scaling * (x @ expert.a.T @ expert.b.T)
        assert_close(model(x, routing_weights=weights), expected)


@pytest.mark.parametrize("kind", NOT_GROUPED)
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "fixed"])
def test_a_fresh_mixture_equals_the_base_to_the_bit(kind: str, router_type: str) -> None:
    base = Block(LAYER_KINDS[kind].make())
    x = LAYER_KINDS[kind].draw(2, 3)
    before = base(x)
    model = get_peft_model(base, moe_config(router_type=router_type))
    assert_equal(model(x), before)
    assert_equal(model.eval()(x), before)


@pytest.mark.parametrize("kind", NOT_GROUPED)
def test_a_disabled_or_unloaded_mixture_is_the_base_to_the_bit(kind: str) -> None:
    torch.manual_seed(0)
    base = Block(LAYER_KINDS[kind].make()).double()
    x = draw_input(kind)
    before = base(x)
    modules = {name: type(module) for name, module in base.named_modules()}
    state = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, moe_config())
    randomise(model)
    with model.disable_adapter():
        assert_equal(model(x), before)
    assert not torch.equal(model(x), before)
    unloaded = model.unload()
    assert {name: type(module) for name, module in unloaded.named_modules()} == modules
    assert_equal(list(unloaded.state_dict().values()), list(state.values()))
    assert_equal(unloaded(x), before)


# One expert per token, maturity ----------------------------------------------------------------


def test_one_expert_per_token_weighs_by_its_probability_and_trains_the_router() -> None:
    config = moe_config(top_k_experts=1)
    model = moe_model(config)
    x = draw_input()
    (gradient,) = gradients(model(x), [one_layer(model).lora_router["e0"].weight])
    assert float(gradient.abs().min()) > 0
    assert_close(model(x), routed_by_hand(model, x, config))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("capacity", [None, 0.1])
def test_one_immature_expert_makes_all_share_every_token(
    training: bool, capacity: float | None
) -> None:
    config = moe_config(
        router_type="learned_with_maturity", top_k_experts=1, expert_capacity_factor=capacity
    )
    model = moe_model(config).train(training)
    x = draw_input()
    mark_mature(model, "e0", experts=[1], mature=False)
    logits = logits_by_hand(one_layer(model), "e0", x, config.router_temperature)
    assert_close(model(x), by_hand(model, x, [config], logits.softmax(dim=-1)))
    mark_mature(model, "e0")
    assert_close(model.eval()(x), routed_by_hand(model, x, config))


def test_maturity_is_a_saved_buffer_that_training_does_not_touch() -> None:
    model = moe_model(moe_config(router_type="learned_with_maturity"))
    mark_mature(model, "e0", experts=[0, 2], mature=False)
    (key,) = [key for key in model.state_dict() if key.endswith("mature")]
    assert model.state_dict()[key].tolist() == [False, True, False]
    model.train()(draw_input()).sum().backward()
    assert model.state_dict()[key].tolist() == [False, True, False]


def test_marking_refuses_unknown_experts_and_changes_nothing() -> None:
    model = moe_model(moe_config(router_type="learned_with_maturity"))
    with pytest.raises(ConfigError, match=r"experts must be in \[0, 3\), got 3"):
        mark_mature(model, "e0", experts=[0, 3], mature=False)
    with pytest.raises(ConfigError, match=r"got -1"):
        mark_mature(model, "e0", experts=[-1], mature=False)
    assert bool(one_layer(model).lora_router["e0"].mature.all())


@pytest.mark.parametrize("name", ["e0", "other"])
def test_marking_refuses_a_mixture_that_has_no_maturity(name: str) -> None:
    model = moe_model(moe_config(router_type="learned"))
    with pytest.raises(
        ConfigError, match=f"No mixture '{name}' with router_type='learned_with_mat"
    ):
        mark_mature(model, name)


# Capacity and dropout: training only -----------------------------------------------------------


def test_capacity_acts_in_training_only_and_keeps_the_base_path() -> None:
    config = moe_config(expert_capacity_factor=0.01, top_k_experts=1)
    model = moe_model(config)
    x = draw_input(tokens=4)
    evaluated = model(x)
    assert_close(evaluated, routed_by_hand(model, x, config))
    trained = model.train()(x).flatten(0, 1)
    base = one_layer(model).base_layer(x).flatten(0, 1)
    logits = logits_by_hand(one_layer(model), "e0", x, 2.0).flatten(0, 1)
    seen: set[int] = set()
    for token, expert in enumerate(logits.argmax(dim=-1).tolist()):
        # the capacity is one token per expert
        expected = base[token] if expert in seen else evaluated.flatten(0, 1)[token]
        assert_close(trained[token], expected)
        seen.add(expert)


def test_capacity_is_causal_in_a_layer() -> None:
    model = moe_model(moe_config(expert_capacity_factor=0.5)).train()
    x = draw_input(rows=1, tokens=6).detach()
    other = x.clone()
    other[:, 3:] = torch.randn_like(other[:, 3:])
    assert_close(model(x)[:, :3], model(other)[:, :3])


def test_padding_takes_no_capacity_in_a_model() -> None:
    torch.manual_seed(0)
    config = MoELoraConfig(
        num_experts=2,
        top_k_experts=1,
        router_type="learned",
        expert_capacity_factor=0.6,
        target_modules=["q_proj"],
        router_aux_loss_coef=0.0,
    )
    model = get_peft_model(LlamaForCausalLM(llama_config()).double(), config)
    randomise(model)
    model.train()
    ids = token_ids(1, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    padded = model(input_ids=ids, attention_mask=mask).logits[:, :3]
    alone = model(input_ids=ids[:, :3]).logits
    # Llama's normalisation is float32 whatever the model's dtype
    assert_close(padded, alone, dtype=torch.float32)


def test_expert_dropout_acts_in_training_only() -> None:
    config = moe_config(expert_dropout=0.5)
    model = moe_model(config)
    x = draw_input(tokens=8)
    evaluated = model(x)
    assert_close(evaluated, routed_by_hand(model, x, config))
    torch.manual_seed(1)
    trained = model.train()(x)
    assert not torch.allclose(trained, evaluated)
    torch.manual_seed(1)
    assert_equal(model(x), trained)


def test_explicit_weights_are_used_as_given_in_training_too() -> None:
    config = moe_config(expert_dropout=0.5, expert_capacity_factor=0.1)
    model = moe_model(config).train()
    x = draw_input()
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    assert_close(model(x, routing_weights=weights), by_hand(model, x, [config], weights))


def test_lora_dropout_draws_one_mask_for_all_experts() -> None:
    model = moe_model(moe_config(lora_dropout=0.5)).train()
    layer, x = one_layer(model), draw_input()
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    experts = experts_of(layer, ["e0"], [3])
    expected = layer.base_layer(x)
    for index, expert in enumerate(experts):
        update = expert.scaling * (dropped @ expert.a.T @ expert.b.T)
        expected = expected + weights[..., index : index + 1] * update
    torch.manual_seed(5)
    assert_close(model(x, routing_weights=weights), expected)


def test_the_router_reads_the_input_without_dropout() -> None:
    model = moe_model(moe_config(lora_dropout=0.5))
    x = draw_input()
    with record_routing(model) as record:
        model(x)
        evaluated = record.routing["layer"].routing_weights
        model.train()(x)
        assert_equal(record.routing["layer"].routing_weights, evaluated)


# Several adapters ------------------------------------------------------------------------------


def test_two_mixtures_decide_together_over_all_their_experts() -> None:
    configs = [
        moe_config(top_k_experts=2, router_temperature=0.5),
        moe_config(num_experts=2, r=1, lora_alpha=7, top_k_experts=1, router_temperature=2.0),
    ]
    model = moe_model(*configs)
    x, layer = draw_input(), one_layer(model)
    logits = torch.cat(
        [
            logits_by_hand(layer, name, x, config.router_temperature)
            for name, config in zip(("e0", "e1"), configs, strict=True)
        ],
        dim=-1,
    )
    weights = routing_reference(logits.flatten(0, 1), top_k=2).reshape(logits.shape)
    expected = by_hand(model, x, configs, weights)
    inputs = [x, *adapter_parameters(model)]
    assert_close(model(x), expected)
    assert_close(gradients(model(x), inputs), gradients(expected, inputs))


def test_a_plain_lora_beside_a_mixture_is_a_shared_expert_of_weight_one() -> None:
    configs = [moe_config(), lora_config(r=4)]
    model = moe_model(*configs)
    x = draw_input()
    logits = logits_by_hand(one_layer(model), "e0", x, 2.0)
    weights = routing_reference(logits.flatten(0, 1), top_k=2).reshape(logits.shape)
    weights = torch.cat([weights, torch.ones(2, 3, 1, dtype=torch.float64)], dim=-1)
    assert_close(model(x), by_hand(model, x, configs, weights))


def test_a_dora_adapter_beside_a_mixture_is_a_shared_expert_too() -> None:
    model = moe_model(moe_config(), lora_config(use_dora=True))
    x = draw_input()
    together, base = model(x), one_layer(model).base_layer(x)
    activate(model, ["e0"])
    mixture = model(x)
    activate(model, ["e1"])
    assert_close(together, mixture + model(x) - base)


def test_an_input_of_one_axis_is_one_token() -> None:
    model = moe_model(moe_config())
    x = draw_input()[0, 0]
    assert_close(model(x), model(x[None, None])[0, 0])
    weights = torch.randn(3, dtype=torch.float64)
    assert_close(
        model(x, routing_weights=weights), model(x[None, None], routing_weights=weights)[0, 0]
    )


def test_a_fixed_mixture_beside_a_learned_one_keeps_its_weights() -> None:
    configs = [
        moe_config(),
        moe_config(num_experts=2, router_type="fixed", fixed_routing_weights=[2.0, -1.0]),
    ]
    model = moe_model(*configs)
    x = draw_input()
    logits = logits_by_hand(one_layer(model), "e0", x, 2.0)
    weights = routing_reference(logits.flatten(0, 1), top_k=2).reshape(logits.shape)
    constant = torch.tensor([2.0, -1.0], dtype=torch.float64).expand(2, 3, 2)
    weights = torch.cat([weights, constant], dim=-1)
    assert_close(model(x), by_hand(model, x, configs, weights))


def test_explicit_weights_cover_the_experts_of_all_active_adapters() -> None:
    configs = [moe_config(), lora_config(r=4), moe_config(num_experts=2)]
    model = moe_model(*configs)
    x = draw_input()
    weights = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_close(model(x, routing_weights=weights), by_hand(model, x, configs, weights))
    with pytest.raises(RoutingWeightsError, match=r"E=6 experts .*\['e0', 'e1', 'e2'\]"):
        model(x, routing_weights=torch.rand(2, 3, 3))


def test_explicit_weights_follow_the_order_of_active_mixtures() -> None:
    configs = [moe_config(), moe_config(num_experts=2)]
    model = moe_model(*configs)
    x = draw_input()
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = by_hand(model, x, configs, weights)
    activate(model, ["e1", "e0"])
    swapped = torch.cat([weights[..., 3:], weights[..., :3]], dim=-1)
    assert_close(model(x, routing_weights=swapped), expected)


def test_a_mixture_that_lacks_a_layer_keeps_its_columns() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    configs = [moe_config(target_modules=["0"]), moe_config(target_modules=["1"], num_experts=2)]
    model = get_peft_model(base, configs[0], "e0")
    model.add_adapter("e1", configs[1])
    activate(model, ["e0", "e1"])
    randomise(model)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    first, second = lora_layers(model)
    hidden = mixture_reference(
        first.base_layer, experts_of(first, ["e0"], [3]), x, weights[..., :3]
    )
    expected = mixture_reference(
        second.base_layer, experts_of(second, ["e1"], [2]), hidden, weights[..., 3:]
    )
    # nn.Sequential's forward takes no keyword: the hook on it takes the argument out
    assert_close(model(x, routing_weights=weights), expected)


def test_one_mixture_alone_among_several_routes_by_itself() -> None:
    configs = [moe_config(), moe_config(num_experts=2, top_k_experts=1)]
    model = moe_model(*configs)
    x = draw_input()
    activate(model, ["e1"])
    logits = logits_by_hand(one_layer(model), "e1", x, 2.0)
    weights = routing_reference(logits.flatten(0, 1), top_k=1).reshape(logits.shape)
    full = torch.cat([torch.zeros(2, 3, 3, dtype=torch.float64), weights], dim=-1)
    assert_close(model(x), by_hand(model, x, configs, full))


@pytest.mark.parametrize("experts", [1, 3])
def test_without_routing_all_experts_are_always_on(experts: int) -> None:
    config = MoELoraConfig(
        use_moe_routing=False, num_experts=experts, r=2, lora_alpha=3, target_modules=["layer"]
    )
    model = moe_model(config)
    assert not hasattr(one_layer(model), "lora_router")
    x = draw_input()
    ones = torch.ones(2, 3, experts, dtype=torch.float64)
    assert_close(model(x), by_hand(model, x, [config], ones))
    weights = torch.randn(2, 3, experts, dtype=torch.float64)
    assert_close(model(x, routing_weights=weights), by_hand(model, x, [config], weights))


def test_one_unrouted_expert_is_a_plain_lora_to_the_bit() -> None:
    def output(config: LoraConfig) -> tuple[Tensor, list[str]]:
        torch.manual_seed(0)
        model = get_peft_model(Block(nn.Linear(6, 5)), config)
        return model(torch.randn(2, 6)), sorted(model.state_dict())

    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], "init_lora_weights": False}
    plain = output(LoraConfig(**fields))
    ours = output(MoELoraConfig(use_moe_routing=False, num_experts=1, **fields))
    assert_equal(ours[0], plain[0])
    assert ours[1] == plain[1]


def test_adapter_names_with_a_routed_mixture_are_refused() -> None:
    model = moe_model(moe_config(), moe_config())
    x = draw_input()
    layer = one_layer(model)
    with pytest.raises(
        RoutingWeightsError, match="adapter_names cannot be combined with a routed m"
    ):
        layer(x, adapter_names=["e0", "e1"])


# Dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
def test_half_precision_models_route_in_float32_and_keep_their_dtype(
    kind: str, dtype: torch.dtype
) -> None:
    config = moe_config()
    model = moe_model(config, kind=kind, dtype=dtype)
    layer = one_layer(model)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    x = LAYER_KINDS[kind].draw(2, 3)
    x = x.to(dtype) if x.is_floating_point() else x
    with record_routing(model) as record:
        output = model(x)
    routing = record.routing["layer"]
    assert output.dtype == dtype
    assert routing.router_logits.dtype == routing.routing_weights.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    expected = routed_by_hand(exact, x.double() if x.is_floating_point() else x, config)
    assert_close(output, expected, dtype=dtype, check_dtype=False)
    assert layer.lora_router["e0"].weight.dtype == torch.float32


def test_autocast_changes_no_routing_decision() -> None:
    model = moe_model(moe_config(), dtype=torch.float32)
    x = torch.randn(2, 3, 6)
    with record_routing(model) as record:
        model(x)
        full = record.routing["layer"].routing_weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        assert_equal(record.routing["layer"].routing_weights, full)
    assert output.dtype == torch.bfloat16


# Recording -------------------------------------------------------------------------------------


def test_recording_shows_what_was_decided_by_layer() -> None:
    model = get_peft_model(
        LlamaForCausalLM(llama_config()), moe_config(target_modules=["q_proj", "v_proj"])
    )
    ids = token_ids(2, 5)
    with record_routing(model) as record:
        model(input_ids=ids)
        first = dict(record.routing)
        model(input_ids=ids[:1])
    assert sorted(first) == [
        f"model.layers.{block}.self_attn.{name}"
        for block in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    assert {routing.routing_weights.shape for routing in first.values()} == {(10, 3)}
    assert {routing.selected_experts.shape for routing in record.routing.values()} == {(5, 2)}
    assert not any(routing.router_logits.requires_grad for routing in first.values())
    model(input_ids=ids)
    assert {routing.routing_weights.shape for routing in record.routing.values()} == {(5, 3)}


def test_recording_ends_also_after_an_error() -> None:
    model = moe_model(moe_config())
    with pytest.raises(RuntimeError), record_routing(model) as record:
        model(torch.randn(2, 3, 7, dtype=torch.float64))
    model(draw_input())
    assert record.routing == {}


def test_recording_a_model_without_adapters_is_refused() -> None:
    recording = record_routing(nn.Linear(2, 2))
    with pytest.raises(UnsupportedLayerError, match="Linear has no LoRA adapters whose routing"):
        recording.__enter__()


def test_an_uninstalled_plugin_refuses_to_run_a_mixture_as_a_plain_lora() -> None:
    model = moe_model(moe_config())
    x = draw_input()
    moelora.uninstall()
    try:
        with pytest.raises(UnsupportedLayerError, match="moelora is uninstalled"):
            model(x)
    finally:
        moelora.install()
    model(x)


def test_a_mixture_in_a_mixed_model_is_refused_before_anything_changes() -> None:
    base = Block(nn.Linear(6, 5))
    with pytest.raises(UnsupportedLayerError, match=r"part of a PeftMixedModel .*mixed=False"):
        get_peft_model(base, moe_config(), mixed=True)
    assert type(base.layer) is nn.Linear
