"""Two passes: a router over the final hidden states of the model without its adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from moelora import RoutingWeightsError, UnsupportedLayerError, record_routing, top_k_routing
from tests.lm import (
    gradients_of,
    lora_config,
    mixture,
    perturb,
    router_parameters,
    tiny_llama,
    token_ids,
)
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
