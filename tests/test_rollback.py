"""``unchanged_on_error``: a model's structure is put back when the block raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moelora.rollback import unchanged_on_error
from tests.lm import (
    assert_same_snapshot,
    lora_config,
    mixture,
    mixture_config,
    snapshot,
    tiny_llama,
    token_ids,
)
from tests.tolerances import assert_equal


def refuse(model: nn.Module, change: Callable[[], object]) -> None:
    """Make a change whose block then raises."""
    with unchanged_on_error(model):
        change()
        raise OSError("stopped")


def test_a_block_that_ends_well_keeps_its_changes() -> None:
    base = tiny_llama()
    with unchanged_on_error(base):
        model = mixture(base)
    assert model.active_adapters == ["default"]


def test_replaced_modules_are_put_back_as_the_same_objects() -> None:
    base = tiny_llama()
    before = dict(base.named_modules())
    with pytest.raises(OSError, match="stopped"):
        refuse(base, lambda: mixture(base))
    after = dict(base.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


def test_adapters_hooks_and_flags_are_put_back() -> None:
    model = mixture().eval()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    before, logits = snapshot(model), model(token_ids()).logits

    def change() -> None:
        model.add_adapter("second", mixture_config(target_modules=["o_proj"]))
        model.add_adapter("plain", lora_config())
        model.base_model.set_adapter(["second", "plain"])
        model.get_base_model().lm_head.weight.requires_grad_(False)
        model.register_forward_pre_hook(lambda *_: None)
        model.train()

    with pytest.raises(OSError, match="stopped"):
        refuse(model, change)
    assert_same_snapshot(snapshot(model), before)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert not model._forward_pre_hooks
    assert_equal(model(token_ids()).logits, logits)


def test_lists_and_sets_are_put_back_in_place() -> None:
    module = nn.Linear(2, 2)
    module.names, module.seen = ["a"], {1}
    names, seen = module.names, module.seen

    def change() -> None:
        module.names.append("b")
        module.seen.add(2)
        module.names = ["c"]
        module.extra = torch.ones(1)

    with pytest.raises(OSError, match="stopped"):
        refuse(module, change)
    assert module.names is names
    assert module.names == ["a"]
    assert module.seen is seen
    assert module.seen == {1}
    assert not hasattr(module, "extra")


def test_the_error_itself_comes_through() -> None:
    error = OSError("stopped")

    def change() -> None:
        raise error

    with pytest.raises(OSError, match="stopped") as caught:
        refuse(nn.Linear(2, 2), change)
    assert caught.value is error
