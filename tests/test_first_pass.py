"""Two passes: a router over the final hidden states of the model without its adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from moelora import (
    MergeError,
    Router,
    RoutingWeightsError,
    UnsupportedLayerError,
    record_routing,
    top_k_routing,
)
from tests.lm import (
    checkpoint_blocks,
    gradients_of,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    tiny_llama,
    tiny_t5,
    token_ids,
    two_loras,
)
from tests.test_attached import AUTOMATIC, Linear, Returning, automatic, hidden_states
from tests.test_generation import generated, left_padded
from tests.tolerances import assert_close, assert_equal


def model_wide(**fields: Any) -> PeftModel:
    return mixture(router_scope="model", **fields)


def weights_by_hand(model: PeftModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """The routing weights from a base model of its own."""
    base = tiny_llama().eval().model
    with torch.no_grad():
        hidden = base(ids, **kwargs).last_hidden_state
    (rows,) = router_parameters(model).values()
    probs = (hidden @ rows.T / 2.0).softmax(-1)
    best = probs.argsort(dim=-1, descending=True)[..., :2]
    kept = torch.zeros_like(probs).scatter(-1, best, probs.gather(-1, best))
    return kept / kept.sum(-1, keepdim=True)


def calls_of(model: PeftModel) -> list[int]:
    """Counts the passes through the backbone; read its length."""
    calls: list[int] = []
    model.get_base_model().model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_two_passes_equal_explicit_weights_from_the_bare_bases_hidden_states() -> None:
    model = model_wide().eval()
    weights = weights_by_hand(model, token_ids())
    expected = model(token_ids(), routing_weights=weights).logits
    assert_close(model(token_ids()).logits, expected)


def test_gradients_equal_those_of_explicit_weights_from_a_router_outside() -> None:
    model = model_wide(router_aux_loss_coef=0.0, expert_capacity_factor=None).train()
    other = copy.deepcopy(model)
    model(token_ids()).logits.square().mean().backward()
    weights = weights_by_hand(other, token_ids())
    other(token_ids(), routing_weights=weights).logits.square().mean().backward()
    assert_close(gradients_of(model), gradients_of(other), dtype=torch.float32)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_pass_sees_the_padding_mask(side: str) -> None:
    model = model_wide().eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    weights = weights_by_hand(model, token_ids(), attention_mask=mask)
    expected = model(token_ids(), attention_mask=mask, routing_weights=weights).logits
    assert_close(model(token_ids(), attention_mask=mask).logits, expected)


def test_a_mask_by_position_means_the_same_as_by_name() -> None:
    model = model_wide().eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    assert_equal(model(token_ids(), mask).logits, model(token_ids(), attention_mask=mask).logits)


def test_a_plain_lora_beside_it_is_off_in_the_first_pass() -> None:
    model = model_wide().eval()
    model.add_adapter("plain", lora_config())
    perturb(model)
    model.base_model.set_adapter(["default", "plain"])
    weights = weights_by_hand(model, token_ids())
    with_shared = torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1)
    expected = model(token_ids(), routing_weights=with_shared).logits
    assert_close(model(token_ids()).logits, expected)


def test_labels_cost_the_first_pass_no_loss() -> None:
    model = model_wide(router_aux_loss_coef=2.0).train()
    output = model(input_ids=token_ids(), labels=token_ids())
    with torch.no_grad():
        task = model(input_ids=token_ids(), labels=token_ids()).loss
    assert_close((output.loss - 2.0 * output.aux_loss).float(), task)


def test_there_are_two_passes_and_one_where_weights_are_known() -> None:
    model = model_wide().eval()
    calls = calls_of(model)
    model(token_ids())
    assert len(calls) == 2
    model(token_ids(), routing_weights=torch.ones(3))
    assert len(calls) == 3
    with model.disable_adapter():
        model(token_ids())
    assert len(calls) == 4


def test_a_decoding_step_costs_one_token_twice() -> None:
    model = model_wide().eval()
    lengths: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    model.generate(
        input_ids=token_ids(),
        attention_mask=torch.ones(2, 7, dtype=torch.long),
        max_new_tokens=3,
        do_sample=False,
    )
    assert lengths == [7, 7, 1, 1, 1, 1]


def test_the_first_pass_has_no_gradient() -> None:
    model = model_wide().train()
    flags: list[bool] = []
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda _, __, output: flags.append(output.requires_grad))
    model(input_ids=token_ids(), labels=token_ids())
    assert flags == [False, True]


def test_the_first_pass_is_not_recorded() -> None:
    model = model_wide().eval()
    with record_routing(model) as record:
        model(token_ids())
    weights = record.routing["model"].routing_weights
    assert_close(weights, weights_by_hand(model, token_ids()).flatten(0, 1).detach())


def test_the_recorded_routing_is_that_of_its_logits() -> None:
    model = model_wide().eval()
    with record_routing(model) as record:
        model(token_ids())
    routing = record.routing["model"]
    expected = top_k_routing(routing.router_logits, top_k=2)
    assert_equal(routing.routing_weights, expected.routing_weights)


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_of_the_callers_own_goes_on_as_if_the_prompt_were_whole(given: bool) -> None:
    model = model_wide().eval()
    ids = token_ids(2, 7)
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache() if given else None
    first = model(ids[:, :4], past_key_values=cache, use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    found = torch.cat([first.logits, second.logits], dim=1)
    # transformers' norms compute in float32
    assert_close(found, whole, dtype=torch.float32)


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself() -> None:
    model = model_wide().eval()
    ids = token_ids(2, 7)
    whole = model(ids, use_cache=False).logits
    prefix = model(ids[:, :4], use_cache=True).past_key_values
    for _ in range(2):
        copied = copy.deepcopy(prefix)
        found = model(ids[:, 4:], past_key_values=copied, use_cache=True).logits
        assert_close(found, whole[:, 4:], dtype=torch.float32)


def test_a_cropped_cache_goes_on_from_there() -> None:
    model = model_wide().eval()
    ids = token_ids(2, 7)
    whole = model(ids, use_cache=False).logits
    other_end = torch.cat([ids[:, :4], token_ids(2, 3, seed=9)], dim=1)
    cache = model(other_end, use_cache=True).past_key_values
    cache.crop(-3)
    found = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
    assert_close(found, whole[:, 4:], dtype=torch.float32)


def test_a_cache_filled_without_the_first_pass_is_refused() -> None:
    model = model_wide().eval()
    with model.disable_adapter():
        cache = model(token_ids(), use_cache=True).past_key_values
    with pytest.raises(RoutingWeightsError, match="KV cache"):
        model(token_ids(2, 1), past_key_values=cache)


def test_a_cache_that_missed_steps_is_refused() -> None:
    model = model_wide().eval()
    ids = token_ids(2, 7)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    # these two positions are filled with explicit weights: no first pass sees them
    model(ids[:, 3:5], past_key_values=cache, routing_weights=torch.ones(3))
    with pytest.raises(RoutingWeightsError, match="KV cache"):
        model(ids[:, 5:], past_key_values=cache)


def test_embeddings_instead_of_tokens_route_the_same() -> None:
    model = model_wide().eval()
    embeds = model.get_input_embeddings()(token_ids())
    assert_equal(model(inputs_embeds=embeds).logits, model(token_ids()).logits)


def test_a_tuple_output_comes_from_the_same_two_passes() -> None:
    model = model_wide().eval()
    assert_equal(model(token_ids(), return_dict=False)[0], model(token_ids()).logits)


def test_only_the_last_logits_may_be_asked_for() -> None:
    model = model_wide().eval()
    assert_close(model(token_ids(), logits_to_keep=1).logits, model(token_ids()).logits[:, -1:])


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_pass_that_raised_leaves_nothing_to_the_next_forward(where: str) -> None:
    model = model_wide().eval()
    expected = model(token_ids()).logits
    calls: list[int] = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == (1 if where == "first" else 2):
            raise OSError("stopped")

    hook = model.get_base_model().model.norm.register_forward_pre_hook(stop)
    with pytest.raises(OSError, match="stopped"):
        model(token_ids())
    hook.remove()
    assert_equal(model(token_ids()).logits, expected)


def test_a_model_without_final_hidden_states_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.linear(x)
            return output

    base = Odd()
    base.config = type("Config", (), {"hidden_size": 4, "model_type": "odd"})()
    with pytest.raises(UnsupportedLayerError, match="last_hidden_state|hidden"):
        mixture(base, target_modules=["linear"], task_type=None, router_scope="model")(
            torch.randn(2, 3, 4)
        )


# By an attached router ------------------------------------------------------------------------


def by_hand(model: PeftModel, router: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits with explicit weights that ``router`` gives for a base model of its own."""
    with torch.no_grad():
        hidden = tiny_llama().eval().model(ids, **kwargs).last_hidden_state
    weights = router(hidden)
    plain = copy.deepcopy(model)
    plain.detach_router()
    logits: Tensor = plain(ids, routing_weights=weights, **kwargs).logits
    return logits


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

    def merge_and_call() -> None:
        model.merge_adapter()
        model(token_ids())

    with pytest.raises((MergeError, RoutingWeightsError), match="merge"):
        merge_and_call()


def test_merging_for_good_does_not_drop_the_routing_in_silence() -> None:
    model = automatic()
    with pytest.raises(MergeError, match="rout"):
        model.merge_and_unload()


def test_a_router_that_only_answers_lets_adapters_merge_as_ever() -> None:
    model, expected = two_loras().eval(), two_loras().eval()
    model.attach_router(Linear())
    for each in (model, expected):
        each.merge_adapter()
    assert_equal(model(token_ids()).logits, expected(token_ids()).logits)


def test_status_reports_count_the_router_as_no_adapter() -> None:
    model, expected = automatic(), two_loras()
    assert model.get_model_status().available_adapters == ["first", "second"]
    assert len(model.get_layer_status()) == len(expected.get_layer_status())


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


# Generation by an attached router --------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_kv_cache_changes_no_token_of_an_attached_router(strategy: str) -> None:
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


def test_a_decoding_step_with_an_attached_router_costs_one_token_twice() -> None:
    model = automatic()
    lengths: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    generated(model, token_ids(), max_new_tokens=3)
    assert lengths == [7, 7, 1, 1, 1, 1]


def test_the_pass_for_an_attached_router_has_no_gradient_and_no_adapters() -> None:
    model = automatic().train()
    flags: list[bool] = []
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda _, __, output: flags.append(output.requires_grad))
    seen: list[Tensor] = []
    model.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(token_ids())
    assert flags == [False, True]
    assert_equal(seen[0], tiny_llama().model(token_ids()).last_hidden_state.detach())


def test_a_cache_filled_before_the_router_was_attached_is_refused() -> None:
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
