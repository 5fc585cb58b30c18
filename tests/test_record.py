"""``record_routing``: what the routers of the last forward decided."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from moelora import UnsupportedLayerError, record_routing
from tests.lm import (
    captured_inputs,
    checkpoint_blocks,
    gradients_of,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    tiny_llama,
    token_ids,
)
from tests.tolerances import assert_close, assert_equal

PREFIX = "base_model.model."


def test_the_record_names_each_routed_layer_as_the_base_model_does() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model(token_ids())
    base = model.get_base_model()
    assert len(record.routing) == 6
    assert all(hasattr(base.get_submodule(name), "lora_router") for name in record.routing)


def test_the_record_holds_what_a_router_computes_from_its_layers_input() -> None:
    model = mixture().eval()
    with captured_inputs(model) as inputs, record_routing(model) as record:
        model(token_ids())
    for name, routing in record.routing.items():
        x = inputs[PREFIX + name]
        router = model.get_base_model().get_submodule(name).lora_router["default"]
        logits = (x @ router.weight.T / 2.0).flatten(0, 1)
        probs = logits.softmax(-1)
        best = logits.argsort(dim=-1, descending=True)[:, :2]
        kept = torch.zeros_like(probs).scatter(-1, best, probs.gather(-1, best))
        assert_close(
            [routing.router_logits, routing.router_probs, routing.routing_weights],
            [logits, probs, kept / kept.sum(-1, keepdim=True)],
        )
        assert_equal(routing.selected_experts, best)


@pytest.mark.parametrize(
    ("scope", "names"), [("layer", {"model.layers.0", "model.layers.1"}), ("model", {"model"})]
)
def test_shared_routers_are_recorded_once_by_the_name_of_what_they_serve(
    scope: str, names: set[str]
) -> None:
    model = mixture(router_scope=scope).eval()
    with record_routing(model) as record:
        model(token_ids())
    assert record.routing.keys() == names
    assert {routing.router_probs.shape for routing in record.routing.values()} == {(14, 3)}


def test_weights_of_a_token_sum_to_one_and_name_the_selected_experts() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model(token_ids())
    for routing in record.routing.values():
        weights = routing.routing_weights
        assert_close(weights.sum(-1), torch.ones(14, dtype=torch.float64))
        chosen = weights.gather(-1, routing.selected_experts)
        assert (chosen > 0).all()
        assert weights.count_nonzero() == chosen.numel()


def test_a_forward_replaces_the_record_of_the_one_before() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model(token_ids())
        first = dict(record.routing)
        model(token_ids(3, 5))
    assert {len(routing.router_probs) for routing in first.values()} == {14}
    assert {len(routing.router_probs) for routing in record.routing.values()} == {15}


def test_the_record_stays_readable_after_the_block_and_takes_no_more() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model(token_ids())
    before = dict(record.routing)
    model(token_ids(3, 5))
    assert record.routing == before


def test_recording_changes_no_output_and_no_gradient() -> None:
    model = mixture().train()
    other = copy.deepcopy(model)
    with record_routing(model) as record:
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
    expected = other(input_ids=token_ids(), labels=token_ids()).loss
    expected.backward()
    assert_equal(loss, expected)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert record.routing


def test_the_record_holds_no_graph() -> None:
    model = mixture().train()
    with record_routing(model) as record:
        model(input_ids=token_ids(), labels=token_ids())
    for routing in record.routing.values():
        tensors = vars(routing).values()
        assert not any(tensor.requires_grad for tensor in tensors)


def test_a_recording_ends_when_its_block_raises() -> None:
    model = mixture().eval()
    with pytest.raises(OSError, match="stopped"), record_routing(model) as record:
        raise OSError("stopped")
    model(token_ids())
    assert record.routing == {}


def test_two_recordings_at_once_see_the_same_and_end_by_themselves() -> None:
    model = mixture().eval()
    with record_routing(model) as outer:
        with record_routing(model) as inner:
            model(token_ids())
        model(token_ids(3, 5))
    assert {len(routing.router_probs) for routing in inner.routing.values()} == {14}
    assert {len(routing.router_probs) for routing in outer.routing.values()} == {15}


def test_generation_records_its_last_step() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        model.generate(
            input_ids=token_ids(),
            attention_mask=torch.ones(2, 7, dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
        )
    assert {len(routing.router_probs) for routing in record.routing.values()} == {2}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_records_the_same(use_reentrant: bool) -> None:
    model = mixture().train()
    with record_routing(model) as plain:
        model(input_ids=token_ids(), labels=token_ids())
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    with record_routing(model) as record:
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert record.routing.keys() == plain.routing.keys()
    for name, routing in plain.routing.items():
        assert_close(record.routing[name].routing_weights, routing.routing_weights)


def test_layers_without_an_active_router_are_not_recorded() -> None:
    model = mixture().eval()
    model.add_adapter("plain", lora_config())
    model.set_adapter("plain")
    with record_routing(model) as record:
        model(token_ids())
    assert record.routing == {}


def test_disabled_adapters_record_nothing() -> None:
    model = mixture().eval()
    with record_routing(model) as record, model.disable_adapter():
        model(token_ids())
    assert record.routing == {}


def test_active_mixtures_record_one_decision_over_all_their_experts() -> None:
    model = mixture().eval()
    model.add_adapter("second", mixture_config(num_experts=2))
    model.base_model.set_adapter(["default", "second"])
    with record_routing(model) as record:
        model(token_ids())
    assert {routing.router_probs.shape for routing in record.routing.values()} == {(14, 5)}


def test_the_base_model_may_be_named_instead() -> None:
    model = mixture().eval()
    with record_routing(model.get_base_model()) as record:
        model(token_ids())
    assert len(record.routing) == 6


def test_an_injected_mixture_is_recorded() -> None:
    base = tiny_llama().eval()
    inject_adapter_in_model(mixture_config(), base)
    with record_routing(base) as record:
        base(token_ids())
    assert len(record.routing) == 6


def test_a_copy_of_a_recorded_model_is_not_recorded() -> None:
    model = mixture().eval()
    with record_routing(model) as record:
        copied = copy.deepcopy(model)
        model(token_ids())
        before = dict(record.routing)
        copied(token_ids(3, 5))
    assert record.routing == before


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "unloaded"])
def test_a_model_without_lora_adapters_is_refused(model: nn.Module | str) -> None:
    if model == "unloaded":
        model = mixture().unload()
    with pytest.raises(UnsupportedLayerError, match="no LoRA adapters"), record_routing(model):
        pass


def test_plain_loras_record_nothing_and_are_not_refused() -> None:
    model = get_peft_model(tiny_llama(), lora_config()).eval()
    perturb(model)
    with record_routing(model) as record:
        model(token_ids())
    assert record.routing == {}


def test_the_graph_is_kept_only_when_asked_for() -> None:
    model = mixture().train()
    with record_routing(model) as plain, record_routing(model, keep_graph=True) as graph:
        model(token_ids())
    assert not any(routing.router_probs.requires_grad for routing in plain.routing.values())
    sum(routing.router_probs.square().sum() for routing in graph.routing.values()).backward()
    routers = [p for name, p in model.named_parameters() if "lora_router" in name]
    assert all(p.grad is not None and bool(p.grad.any()) for p in routers)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_blocks_are_recomputed_as_they_ran_when_the_recorder_is_gone(use_reentrant: bool) -> None:
    model = mixture(target_modules="all-linear").train()
    ids = token_ids()
    step = {"input_ids": ids, "labels": ids}
    model(**step).loss.backward()
    expected = gradients_of(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    model.zero_grad()
    with record_routing(model, keep_graph=True):
        loss = model(**step).loss
    loss.backward()
    assert_close(gradients_of(model), expected)
