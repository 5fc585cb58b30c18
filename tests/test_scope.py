"""The routing of a forward in copies of the model and in recomputed blocks."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from moelora.scope import scope_of
from tests.lm import (
    checkpoint_blocks,
    explicit_weights,
    gradients_of,
    lora_layers,
    mixture,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.tolerances import assert_close, assert_equal

SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])


def frames(model: PeftModel) -> Any:
    scope = scope_of(model.get_base_model())
    assert scope is not None
    return scope.top


def assert_gradients_close(actual: Any, expected: Any) -> None:
    """Compare gradients that passed transformers' norms, which compute in float32."""
    assert_close(actual, expected, dtype=torch.float32)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved_whole,
}


@SCOPES
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_routes_as_its_original(way: str, scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    copied = COPIES[way](model)
    weights = explicit_weights(experts=3)
    assert_equal(copied(token_ids()).logits, model(token_ids()).logits)
    assert_equal(
        copied(token_ids(), routing_weights=weights).logits,
        model(token_ids(), routing_weights=weights).logits,
    )


@SCOPES
@pytest.mark.parametrize("way", COPIES)
def test_a_model_can_be_copied_after_a_training_step_and_trains_on_alike(
    way: str, scope: str
) -> None:
    model = mixture(router_scope=scope).train()
    weights = explicit_weights(experts=3)
    model(token_ids(), routing_weights=weights.requires_grad_())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    model.zero_grad()
    copied = COPIES[way](model)
    for each in (model, copied):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_equal(gradients_of(copied), gradients_of(model))


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_shares_no_state_with_its_original(way: str) -> None:
    model = mixture()
    copied = COPIES[way](model)
    scope = scope_of(copied.get_base_model())
    assert scope is not scope_of(model.get_base_model())
    bindings = [layer.__dict__["_moelora_binding"] for layer in lora_layers(copied).values()]
    assert {id(binding.scope) for binding in bindings} == {id(scope)}


def test_a_checkpointing_model_can_be_copied() -> None:
    model = two_loras().train()
    checkpoint_blocks(model, use_reentrant=False)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        weights = explicit_weights(seed=7)
        each(token_ids(), routing_weights=weights).logits.square().mean().backward()
    assert_equal(gradients_of(copied), gradients_of(model))


def test_a_training_output_can_be_pickled() -> None:
    output = mixture().train()(input_ids=token_ids(), labels=token_ids())
    detached = type(output)(
        **{key: value.detach() for key, value in output.items() if isinstance(value, Tensor)}
    )
    found = pickle.loads(pickle.dumps(detached))
    assert type(found) is type(output)
    assert_equal(found.aux_loss, detached.aux_loss)


# Gradient checkpointing ----------------------------------------------------------------------


REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])
WHEN = pytest.mark.parametrize("when", ["before", "after", "on_the_base"])


def checkpointed_loras(*, use_reentrant: bool, when: str) -> PeftModel:
    base = tiny_llama()
    if when == "before":
        checkpoint_blocks(base, use_reentrant=use_reentrant)
        base.enable_input_require_grads()
    model = two_loras(base)
    if when == "after":
        checkpoint_blocks(model, use_reentrant=use_reentrant)
    elif when == "on_the_base":
        checkpoint_blocks(base, use_reentrant=use_reentrant)
        base.enable_input_require_grads()
    assert all(layer.gradient_checkpointing for layer in base.model.layers)
    return model.train()


@REENTRANT
@WHEN
@pytest.mark.parametrize("form", [(2, 7, 2), (2, 2), (2,), (2, 7, 2, 2)])
def test_recomputation_uses_the_weights_of_its_own_forward(
    form: tuple[int, ...], when: str, use_reentrant: bool
) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when=when)
    plain = two_loras().train()
    found = []
    for each in (model, plain):
        generator = torch.Generator().manual_seed(4)
        weights = torch.randn(*form, generator=generator, dtype=torch.float64).requires_grad_()
        each(token_ids(), routing_weights=weights).logits.square().mean().backward()
        found.append([*gradients_of(each), weights.grad])
    assert_gradients_close(*found)


@REENTRANT
def test_two_forwards_before_one_backward_keep_their_own_weights(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    plain = two_loras().train()
    found = []
    for each in (model, plain):
        first = explicit_weights(seed=5).requires_grad_()
        second = explicit_weights(seed=6).requires_grad_()
        one = each(token_ids(), routing_weights=first).logits.square().mean()
        other = each(token_ids(seed=8), routing_weights=second).logits.square().mean()
        (one + other).backward()
        found.append([*gradients_of(each), first.grad, second.grad])
    assert_gradients_close(*found)


@REENTRANT
def test_a_forward_without_weights_between_keeps_none(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    plain = two_loras().train()
    found = []
    for each in (model, plain):
        weights = explicit_weights().requires_grad_()
        one = each(token_ids(), routing_weights=weights).logits.square().mean()
        other = each(token_ids()).logits.square().mean()
        (one + other).backward()
        found.append([*gradients_of(each), weights.grad])
    assert_gradients_close(*found)


@REENTRANT
def test_backward_in_another_thread_uses_the_weights_of_its_forward(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    plain = two_loras().train()
    found = []
    for each in (model, plain):
        weights = explicit_weights().requires_grad_()
        loss = each(token_ids(), routing_weights=weights).logits.square().mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append([*gradients_of(each), weights.grad])
    assert_gradients_close(*found)


@REENTRANT
def test_weights_without_gradient_are_fine_in_a_recomputation(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    plain = two_loras().train()
    for each in (model, plain):
        each(token_ids(), routing_weights=explicit_weights()).logits.square().mean().backward()
    assert_gradients_close(gradients_of(model), gradients_of(plain))


@SCOPES
@REENTRANT
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "fixed"])
def test_routers_recompute_the_same_decision(
    router_type: str, use_reentrant: bool, scope: str
) -> None:
    fields = {"router_type": router_type, "router_scope": scope, "router_aux_loss_coef": 0.0}
    model = mixture(**fields).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_gradients_close(gradients_of(model), gradients_of(plain))


@SCOPES
@REENTRANT
def test_dropout_is_drawn_once_for_forward_and_recomputation(
    use_reentrant: bool, scope: str
) -> None:
    fields = {
        "lora_dropout": 0.3,
        "expert_dropout": 0.3,
        "router_aux_loss_coef": 0.0,
        "router_scope": scope,
    }
    model = mixture(**fields).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        torch.manual_seed(5)
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_gradients_close(gradients_of(model), gradients_of(plain))


@REENTRANT
def test_after_backward_no_frame_is_left(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    weights = explicit_weights().requires_grad_()
    model(token_ids(), routing_weights=weights).logits.square().mean().backward()
    assert frames(model) is None


@REENTRANT
def test_a_recomputation_that_raised_leaves_no_frame(use_reentrant: bool) -> None:
    model = checkpointed_loras(use_reentrant=use_reentrant, when="after")
    loss = model(token_ids(), routing_weights=explicit_weights()).logits.square().mean()

    def stop(*_: object) -> None:
        raise OSError("stopped")

    projection = model.get_base_model().model.layers[0].mlp.gate_proj
    hook = projection.register_forward_pre_hook(stop)
    with pytest.raises(OSError, match="stopped"):
        loss.backward()
    hook.remove()
    assert frames(model) is None


def test_disabled_checkpointing_changes_nothing() -> None:
    model = checkpointed_loras(use_reentrant=False, when="after")
    model.gradient_checkpointing_disable()
    plain = two_loras().train()
    for each in (model, plain):
        each(token_ids(), routing_weights=explicit_weights()).logits.square().mean().backward()
    assert_gradients_close(gradients_of(model), gradients_of(plain))
