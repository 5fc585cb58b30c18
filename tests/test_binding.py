"""What a base model gets with its first adapter and loses with its last."""

from __future__ import annotations

import pytest
from torch import nn

from moelora.scope import scope_of
from tests.lm import (
    assert_same_snapshot,
    checkpoint_blocks,
    explicit_weights,
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    snapshot,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.tolerances import assert_equal

SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])


def hook_count(base: nn.Module) -> int:
    return len(base._forward_hooks) + len(base._forward_pre_hooks)


def test_a_base_model_gets_its_hooks_once() -> None:
    model = mixture()
    before = hook_count(model.get_base_model())
    model.add_adapter("second", mixture_config())
    model.add_adapter("third", lora_config())
    model(token_ids())
    assert hook_count(model.get_base_model()) == before == 2


def test_layers_get_their_hook_once() -> None:
    model = two_loras()
    for _ in range(3):
        model(token_ids(), routing_weights=explicit_weights())
    counts = {len(layer._forward_pre_hooks) for layer in lora_layers(model).values()}
    assert counts == {1}


@SCOPES
def test_unload_takes_all_hooks_along_and_returns_the_original_model(scope: str) -> None:
    base = tiny_llama()
    before = snapshot(base)
    model = mixture(base, router_scope=scope)
    model(token_ids(), routing_weights=explicit_weights(experts=3))
    unloaded = model.unload()
    assert unloaded is base
    assert sum(map(hook_count, base.modules())) == 0
    assert scope_of(base) is None
    assert not [key for module in base.modules() for key in vars(module) if "moelora" in key]
    unloaded_state = snapshot(unloaded)
    # PEFT leaves the base frozen
    unloaded_state["requires_grad"] = before["requires_grad"]
    assert_same_snapshot(unloaded_state, before)
    assert_equal(base(token_ids()).logits, tiny_llama()(token_ids()).logits)


def test_unload_gives_checkpointing_back_to_the_base() -> None:
    base = tiny_llama()
    model = mixture(base)
    checkpoint_blocks(model, use_reentrant=False)
    unloaded = model.unload()
    functions = {
        type(module._gradient_checkpointing_func).__module__
        for module in unloaded.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    }
    assert functions == {"functools"}


def test_after_unload_a_new_mixture_can_be_made() -> None:
    unloaded = mixture().unload()
    again = mixture(unloaded).eval()
    assert_equal(again(token_ids()).logits, mixture().eval()(token_ids()).logits)
