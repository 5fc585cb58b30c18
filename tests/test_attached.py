"""A router of the user's own on any LoRA model: attach, ask, route by it, keep it in state dicts."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import DynamicCache, Trainer, TrainingArguments

import moelora
from moelora import (
    MergeError,
    MoELoraConfig,
    Router,
    RoutingWeightsError,
    UnsupportedLayerError,
)
from tests.lm import (
    assert_same_snapshot,
    captured_inputs,
    checkpoint_blocks,
    gradients_of,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    snapshot,
    tiny_llama,
    tiny_t5,
    token_ids,
    trainable,
    two_loras,
)
from tests.models import unchecked_types
from tests.test_generation import generated, left_padded
from tests.tolerances import assert_close, assert_equal

AUTOMATIC = mixture_config(num_experts=2, top_k_experts=1)


class Linear(nn.Module):
    """A router that knows nothing of moelora: one linear map and a softmax."""

    def __init__(self, experts: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, experts).to(torch.float64)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights: Tensor = self.map(hidden_states).softmax(-1)
        return weights


class Returning(nn.Module):
    """Returns whatever the given function makes of the hidden states."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden_states: Tensor) -> Any:
        return self.make(hidden_states)


class Buffered(nn.Module):
    """A router whose only tensor is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16, 2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.table


def automatic(router: nn.Module | None = None) -> PeftModel:
    """Two plain LoRA adapters routed by an attached router in every forward."""
    model = two_loras().eval()
    model.attach_router(router or Linear(), AUTOMATIC)
    return model


def by_hand(model: PeftModel, router: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits with explicit weights that ``router`` gives for a base model of its own."""
    with torch.no_grad():
        hidden = tiny_llama().eval().model(ids, **kwargs).last_hidden_state
    weights = router(hidden)
    plain = copy.deepcopy(model)
    plain.detach_router()
    logits: Tensor = plain(ids, routing_weights=weights, **kwargs).logits
    return logits


def hidden_states() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)


# Attaching and detaching -----------------------------------------------------------------------


@pytest.mark.parametrize("owner", [LoraModel, PeftModel])
@pytest.mark.parametrize(
    "name", ["attach_router", "detach_router", "get_routing_weights", "router", "moe_config"]
)
def test_every_lora_model_has_the_router_api(owner: type, name: str) -> None:
    assert hasattr(owner, name)


def test_a_model_starts_without_a_router() -> None:
    model = two_loras()
    assert model.router is None
    assert model.moe_config is None
    assert model.get_routing_weights(hidden_states()) is None
    assert model.detach_router() is None


@pytest.mark.parametrize("outer", [True, False])
def test_model_and_tuner_show_the_same_router(outer: bool) -> None:
    model = two_loras()
    router = Linear()
    (model if outer else model.base_model).attach_router(router, AUTOMATIC)
    assert model.router is router
    assert model.base_model.router is router
    assert model.moe_config is AUTOMATIC
    assert model.base_model.moe_config is AUTOMATIC


def test_detaching_returns_the_router_and_leaves_none() -> None:
    model = two_loras()
    router = Linear()
    model.attach_router(router, AUTOMATIC)
    assert model.detach_router() is router
    assert model.router is None
    assert model.moe_config is None
    assert not [key for key in model.state_dict() if "router" in key]


def test_attached_and_detached_a_model_is_as_before() -> None:
    model = two_loras()
    before, expected = snapshot(model), model(token_ids()).logits
    model.attach_router(Linear(), AUTOMATIC)
    model.detach_router()
    assert_same_snapshot(snapshot(model), before)
    assert_equal(model(token_ids()).logits, expected)


def test_a_second_router_replaces_the_first_with_a_warning() -> None:
    model = automatic(Linear())
    second = Linear()
    with pytest.warns(UserWarning, match="already has a router"):
        model.attach_router(second)
    assert model.router is second
    assert model.moe_config is None


def test_a_replaced_router_routes_no_longer() -> None:
    model = automatic(Linear())
    second = Linear()
    with pytest.warns(UserWarning, match="router"):
        model.attach_router(second, AUTOMATIC)
    assert_close(model(token_ids()).logits, by_hand(model, second, token_ids()))


def test_a_router_without_config_routes_no_forward() -> None:
    model = two_loras().eval()
    expected = model(token_ids()).logits
    model.attach_router(Linear())
    assert_equal(model(token_ids()).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_router_takes_the_models_mode_and_follows_it(training: bool) -> None:
    model = two_loras().train(training)
    router = Linear().train(not training)
    model.attach_router(router)
    assert router.training is training
    model.train(not training)
    assert router.training is not training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_router_moves_with_the_model(dtype: torch.dtype) -> None:
    model = automatic()
    model.to(dtype)
    assert {p.dtype for p in model.router.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("move", "dtype"),
    [("half", torch.float16), ("double", torch.float64), ("bfloat16", torch.bfloat16)],
)
def test_a_router_follows_half_and_double(move: str, dtype: torch.dtype) -> None:
    model = automatic()
    getattr(model, move)()
    assert {p.dtype for p in model.router.parameters()} == {dtype}


@pytest.mark.parametrize("router", [None, 3, "linear", torch.zeros(2), lambda x: x, Linear])
def test_what_is_no_module_is_refused(router: Any) -> None:
    model = two_loras()
    before = snapshot(model)
    with unchecked_types(), pytest.raises(TypeError, match="router_module"):
        model.attach_router(router)
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("config", [True, {}, "auto", MoELoraConfig, lora_config()])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    model = two_loras()
    before = snapshot(model)
    with unchecked_types(), pytest.raises(TypeError, match="moe_config"):
        model.attach_router(Linear(), config)
    assert model.router is None
    assert_same_snapshot(snapshot(model), before)


def test_a_tuner_that_is_no_lora_takes_no_router() -> None:
    model = get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    for method in (lambda: model.attach_router(Linear()), model.detach_router):
        with pytest.raises(UnsupportedLayerError, match="LoHa"):
            method()


# Asking it -------------------------------------------------------------------------------------


def test_weights_are_those_of_the_router() -> None:
    model, router = two_loras(), Linear()
    model.attach_router(router)
    assert_equal(model.get_routing_weights(hidden_states()), router(hidden_states()))


def test_our_router_gives_the_renormalised_top_k_of_a_softmax() -> None:
    model = two_loras().eval()
    router = Router(16, 4, top_k=2, temperature=0.5).double()
    model.attach_router(router)
    probs = (hidden_states() @ router.weight.T / 0.5).softmax(-1)
    best = probs.topk(2, dim=-1)
    expected = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
    expected = expected / expected.sum(-1, keepdim=True)
    assert_close(model.get_routing_weights(hidden_states()), expected)


def test_weights_given_back_route_the_model_with_a_gradient_for_the_router() -> None:
    model, router = two_loras(), Linear()
    model.attach_router(router)
    weights = model.get_routing_weights(hidden_states())
    model(token_ids(), routing_weights=weights).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("router", [Linear, Buffered, lambda: Router(16, 2)])
def test_hidden_states_of_another_dtype_are_converted(
    router: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = two_loras()
    model.attach_router(router())
    weights = model.get_routing_weights(hidden_states().to(dtype))
    assert weights.shape == (2, 7, 2)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", [Linear, Buffered, lambda: Router(16, 2).half()])
def test_a_router_of_another_dtype_routes_the_model(
    router: Callable[[], nn.Module], base: torch.dtype
) -> None:
    model = two_loras(tiny_llama(dtype=base)).eval()
    model.attach_router(router(), AUTOMATIC)
    logits = model(token_ids()).logits
    assert logits.dtype == base
    assert bool(logits.isfinite().all())


BAD: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda x: (x[..., :2],),
    "None": lambda x: None,
    "integers": lambda x: x[..., :2].long(),
    "other tokens": lambda x: x[:, 1:, :2],
    "other rows": lambda x: x[1:, :, :2],
    "no axis": lambda x: x.sum(),
    "one axis too many": lambda x: x[..., None, :2],
    "flattened": lambda x: x.flatten(0, 1)[:, :2],
}
BAD_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "three experts": lambda x: x[..., :3],
    "no experts": lambda x: x[..., :0],
    "NaN": lambda x: x[..., :2] * float("nan"),
    "infinity": lambda x: x[..., :2] / 0.0,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_router_that_answers_wrongly_is_named_when_asked(bad: str) -> None:
    model = two_loras()
    model.attach_router(Returning(BAD[bad]))
    with pytest.raises(RoutingWeightsError, match="Returning"):
        model.get_routing_weights(hidden_states())


@pytest.mark.parametrize("bad", {**BAD, **BAD_VALUES})
def test_a_router_that_answers_wrongly_stops_the_forward_and_leaves_nothing(bad: str) -> None:
    model = two_loras().eval()
    expected = model(token_ids()).logits
    model.attach_router(Returning({**BAD, **BAD_VALUES}[bad]), AUTOMATIC)
    with pytest.raises(RoutingWeightsError):
        model(token_ids())
    model.detach_router()
    assert_equal(model(token_ids()).logits, expected)


def test_a_router_of_another_width_is_refused_with_a_name() -> None:
    model = automatic(Router(12, 2))
    with pytest.raises(ValueError, match=r"(?i)router|hidden|12"):
        model(token_ids())


# Automatic routing -----------------------------------------------------------------------------

ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "of the user": Linear,
    "ours": lambda: Router(16, 2, top_k=1).double(),
    "ours, deep": lambda: Router(16, 2, hidden_size=5).double(),
    "per sample": lambda: Returning(lambda x: x.mean(1)[:, :2]),
    "of any sign": lambda: Returning(lambda x: x[..., :2]),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_automatic_routing_equals_weights_from_the_bare_base(kind: str) -> None:
    router = ROUTERS[kind]()
    model = automatic(router)
    assert_close(model(token_ids()).logits, by_hand(model, router, token_ids()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_automatic_routing_sees_the_padding_mask(side: str) -> None:
    router = Linear()
    model = automatic(router)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    expected = by_hand(model, router, token_ids(), attention_mask=mask)
    assert_close(model(token_ids(), attention_mask=mask).logits, expected)


def test_automatic_routing_gives_the_router_the_gradient_of_explicit_weights() -> None:
    model = two_loras().train()
    router = Linear()
    model.attach_router(router, AUTOMATIC)
    expected = copy.deepcopy(model)
    model(token_ids()).logits.square().mean().backward()
    by_hand_logits = _training_by_hand(expected)
    by_hand_logits.square().mean().backward()
    assert_close(gradients_of(model), gradients_of(expected))
    assert router.map.weight.grad is not None


def _training_by_hand(model: PeftModel) -> Tensor:
    with torch.no_grad():
        hidden = tiny_llama().model(token_ids()).last_hidden_state
    logits: Tensor = model(token_ids(), routing_weights=model.get_routing_weights(hidden)).logits
    return logits


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_automatic_routing_has_the_same_gradients_under_checkpointing(use_reentrant: bool) -> None:
    model = two_loras().train()
    model.attach_router(Linear(), AUTOMATIC)
    other = copy.deepcopy(model)
    other.enable_input_require_grads()
    checkpoint_blocks(other, use_reentrant=use_reentrant)
    for each in (model, other):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_close(gradients_of(other), gradients_of(model))


def test_the_users_weights_win() -> None:
    model = automatic()
    weights = torch.randn(2, 7, 2, dtype=torch.float64)
    expected = two_loras().eval()(token_ids(), routing_weights=weights).logits
    calls: list[int] = []
    model.router.register_forward_hook(lambda *_: calls.append(1))
    assert_equal(model(token_ids(), routing_weights=weights).logits, expected)
    assert not calls


def test_the_users_weights_win_in_generation() -> None:
    model = automatic()
    weights = torch.tensor([3.0, -2.0], dtype=torch.float64)
    plain = two_loras().eval()
    assert_equal(
        generated(model, token_ids(), routing_weights=weights),
        generated(plain, token_ids(), routing_weights=weights),
    )


def test_an_attached_router_comes_before_the_routers_of_a_mixture() -> None:
    model = mixture().eval()
    router = Linear(3)
    model.attach_router(router, mixture_config())
    assert_close(model(token_ids()).logits, by_hand(model, router, token_ids()))


def test_disabled_adapters_give_the_base_in_one_pass() -> None:
    model = automatic()
    calls: list[int] = []
    model.router.register_forward_hook(lambda *_: calls.append(1))
    with model.disable_adapter():
        found = model(token_ids()).logits
    assert_equal(found, tiny_llama().eval()(token_ids()).logits)
    assert not calls


def test_other_active_adapters_than_the_router_knows_are_refused_by_name() -> None:
    model = automatic()
    model.set_adapter("first")
    with pytest.raises(RoutingWeightsError, match="E=1.*first"):
        model(token_ids())


def test_the_weights_follow_the_order_of_active_adapters() -> None:
    router = Linear()
    model = automatic(router)
    expected = model(token_ids()).logits
    with torch.no_grad():
        router.map.weight.copy_(router.map.weight.flip(0))
        router.map.bias.copy_(router.map.bias.flip(0))
    model.base_model.set_adapter(["second", "first"])
    assert_close(model(token_ids()).logits, expected)


def test_merged_adapters_are_not_routed_in_silence() -> None:
    model = automatic()
    with pytest.raises((MergeError, RoutingWeightsError), match="merge"):
        model.merge_adapter()
        model(token_ids())


def test_merging_for_good_does_not_drop_the_routing_in_silence() -> None:
    model = automatic()
    with pytest.raises(MergeError, match="rout"):
        model.merge_and_unload()


def test_adapter_names_and_automatic_routing_together_are_refused() -> None:
    model = automatic()
    with pytest.raises(RoutingWeightsError, match="adapter_names"):
        model(input_ids=token_ids(), adapter_names=["first", "second"])


def test_an_encoder_decoder_is_refused_with_a_reason_and_takes_what_the_router_gives() -> None:
    config = lora_config(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(tiny_t5(), config).eval()
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 3)}
    model.attach_router(Returning(lambda x: x[:, 0, :1]), AUTOMATIC)
    with pytest.raises((RoutingWeightsError, UnsupportedLayerError), match="hidden|encoder"):
        model(**inputs)
    weights = model.get_routing_weights(hidden_states())
    assert model(**inputs, routing_weights=weights).logits.shape[:2] == (2, 3)


# Generation ------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_kv_cache_changes_no_token(strategy: str) -> None:
    model = automatic(Returning(lambda x: x[..., :2]))
    options = STRATEGIES[strategy]
    cached = generated(model, token_ids(), use_cache=True, **options)
    assert_equal(cached, generated(model, token_ids(), use_cache=False, **options))


def test_a_static_cache_changes_no_token() -> None:
    model = automatic(Returning(lambda x: x[..., :2]))
    expected = generated(model, token_ids(), use_cache=False)
    for _ in range(2):
        assert_equal(generated(model, token_ids(), cache_implementation="static"), expected)


def test_left_padded_rows_generate_as_they_do_alone() -> None:
    model = automatic(Returning(lambda x: x[..., :2]))
    ids, mask = left_padded([7, 4])
    found = generated(model, ids, attention_mask=mask)
    for row, length in enumerate([7, 4]):
        alone = generated(model, ids[row : row + 1, -length:])
        assert_equal(found[row : row + 1, -alone.shape[1] :], alone)


def test_routing_changes_what_is_generated() -> None:
    model = automatic(Returning(lambda x: x[..., :2] * 3))
    assert not torch.equal(generated(model, token_ids()), generated(two_loras(), token_ids()))


def test_a_decoding_step_costs_one_token_twice() -> None:
    model = automatic()
    lengths: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    generated(model, token_ids(), max_new_tokens=3)
    assert lengths == [7, 7, 1, 1, 1, 1]


def test_the_first_pass_has_no_gradient_and_no_adapters() -> None:
    model = automatic().train()
    flags: list[bool] = []
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda _, __, output: flags.append(output.requires_grad))
    seen: list[Tensor] = []
    model.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(token_ids())
    assert flags == [False, True]
    assert_equal(seen[0], tiny_llama().model(token_ids()).last_hidden_state.detach())


def test_a_cache_filled_without_the_router_is_refused() -> None:
    model = two_loras().eval()
    cache = model(token_ids(), past_key_values=DynamicCache()).past_key_values
    model.attach_router(Linear(), AUTOMATIC)
    with pytest.raises(RoutingWeightsError, match="KV cache"):
        model(token_ids(2, 1), past_key_values=cache)


def test_chunks_of_a_prompt_equal_the_whole() -> None:
    model, ids = automatic(), token_ids()
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], 1), whole, dtype=torch.float32)


# State dicts -----------------------------------------------------------------------------------


def test_the_router_lies_under_its_name_in_the_state_dict() -> None:
    model = two_loras()
    before = set(model.state_dict())
    model.attach_router(Linear())
    names = {f"base_model.router.{name}" for name in ("map.weight", "map.bias")}
    assert set(model.state_dict()) - before == names
    assert {"router.map.weight", "router.map.bias"} <= set(model.base_model.state_dict())


@pytest.mark.parametrize("level", ["model", "tuner"])
def test_a_state_dict_restores_the_router(level: str) -> None:
    model, other = automatic(Linear()), automatic(Linear())
    source, target = (m if level == "model" else m.base_model for m in (model, other))
    target.load_state_dict(source.state_dict())
    assert_equal(list(other.router.parameters()), list(model.router.parameters()))
    assert_equal(other(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("level", ["model", "tuner"])
def test_a_state_dict_without_a_router_loads_strictly_with_a_warning(level: str) -> None:
    old, model = two_loras(), automatic()
    kept = [p.clone() for p in model.router.parameters()]
    perturb(old, seed=9)
    source, target = (m if level == "model" else m.base_model for m in (old, model))
    with pytest.warns(UserWarning, match="older checkpoint"):
        target.load_state_dict(source.state_dict(), strict=True)
    assert_equal(list(model.router.parameters()), kept)
    assert_equal(list(old.state_dict().values())[0], list(model.state_dict().values())[0])


def test_a_state_dict_with_half_a_router_is_refused() -> None:
    model = automatic()
    state = model.state_dict()
    del state["base_model.router.map.bias"]
    with pytest.raises(RuntimeError, match=r"router\.map\.bias"):
        model.load_state_dict(state)


def test_a_state_dict_with_more_than_the_router_is_refused() -> None:
    model = automatic()
    state = {**model.state_dict(), "base_model.router.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"router\.other"):
        model.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_routers_tensors_wait_for_the_router(strict: bool) -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="kept for attach_router"):
        model.load_state_dict(source.state_dict(), strict=strict)
    router = Linear()
    model.attach_router(router)
    assert_equal(list(router.parameters()), list(source.router.parameters()))


def test_a_loading_keeps_the_given_state_dict_whole() -> None:
    source, model = automatic(), two_loras()
    state = source.state_dict()
    keys = list(state)
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(state)
    assert list(state) == keys


def test_kept_tensors_go_to_one_router_only() -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(source.state_dict())
    model.attach_router(Linear())
    model.detach_router()
    third = Linear()
    before = [p.clone() for p in third.parameters()]
    model.attach_router(third)
    assert_equal(list(third.parameters()), before)


def test_kept_tensors_that_do_not_fit_leave_model_and_tensors_alone() -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(source.state_dict())
    with pytest.raises((RuntimeError, ValueError), match="map"):
        model.attach_router(Linear(5))
    assert model.router is None
    right = Linear()
    model.attach_router(right)
    assert_equal(list(right.parameters()), list(source.router.parameters()))


@pytest.mark.parametrize("name", ["first", "second"])
def test_no_adapters_state_dict_holds_the_router(name: str) -> None:
    model = automatic()
    for target in (model, model.base_model):
        keys = get_peft_model_state_dict(target, adapter_name=name)
        assert keys
        assert not [key for key in keys if "router" in key or "map" in key]


def test_a_base_with_a_part_named_router_loses_no_adapter_tensor() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.router(x)
            return output

    config = lora_config(target_modules=["router"], task_type=None)
    base = inject_adapter_in_model(config, Base())
    keys = set(get_peft_model_state_dict(base))
    assert keys == {"router.lora_A.weight", "router.lora_B.weight"}


# Training, copies, unloading -------------------------------------------------------------------


def test_a_trainer_trains_router_and_adapters(tmp_path: Any) -> None:
    model = two_loras(tiny_llama(dtype=torch.float32))
    model.attach_router(Linear().float(), AUTOMATIC)
    before = {name: p.clone() for name, p in trainable(model).items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=0.1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert "base_model.router.map.weight" in before
    assert [n for n, p in trainable(model).items() if torch.equal(p, before[n])] == []


def test_adding_an_adapter_leaves_the_router_trainable() -> None:
    model = automatic()
    model.add_adapter("third", lora_config())
    model.base_model.set_adapter(["first", "second"])
    assert all(p.requires_grad for p in model.router.parameters())


def _reloaded(model: PeftModel) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _reloaded])
def test_a_copy_routes_by_its_own_copy_of_the_router(copied: Callable[[Any], Any]) -> None:
    model = automatic()
    expected = model(token_ids()).logits
    other = copied(model)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.normal_(std=3)
    assert other.router is not model.router
    assert_equal(other(token_ids()).logits, expected)
    assert other.moe_config.num_experts == 2
    other.detach_router()
    assert_equal(other(token_ids()).logits, two_loras().eval()(token_ids()).logits)


def test_unload_returns_the_base_without_a_router() -> None:
    model = automatic()
    base = model.unload()
    assert not [key for key in base.state_dict() if "router" in key]
    assert_equal(base(token_ids()).logits, tiny_llama().eval()(token_ids()).logits)


def test_after_unload_new_adapters_are_not_routed_by_the_old_router() -> None:
    base = automatic().unload()
    found = two_loras(base).eval()
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    assert found.router is None
    assert_equal(found(token_ids()).logits, two_loras().eval()(token_ids()).logits)


def test_uninstalled_automatic_routing_is_refused_instead_of_summed() -> None:
    model = automatic()
    moelora.uninstall()
    try:
        with pytest.raises(UnsupportedLayerError, match="uninstalled"):
            model(token_ids())
    finally:
        moelora.install()


def test_no_forward_writes_to_the_hidden_states() -> None:
    model = two_loras()
    model.attach_router(Linear().float())
    given = hidden_states()
    before = given.clone()
    model.get_routing_weights(given)
    assert_equal(given, before)


def test_layers_of_an_attached_model_see_no_graph_of_the_first_pass() -> None:
    model = automatic().train()
    with captured_inputs(model) as inputs:
        model(token_ids()).logits.sum().backward()
    assert inputs
    assert not router_parameters(model)


def test_attaching_warns_of_nothing() -> None:
    model = two_loras()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.attach_router(Linear(), AUTOMATIC)
