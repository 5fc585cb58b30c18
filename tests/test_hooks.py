"""Around a forward of the base model: nothing of it is left for the next one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from moelora import RoutingWeightsError
from moelora.scope import scope_of
from tests.lm import (
    explicit_weights,
    mixture,
    token_ids,
    two_loras,
)
from tests.tolerances import assert_equal

SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])


def frames(model: PeftModel) -> Any:
    scope = scope_of(model.get_base_model())
    assert scope is not None
    return scope.top


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_forward_that_raised_leaves_no_frame(error: type[BaseException]) -> None:
    model = two_loras().train()

    def stop(*_: object) -> None:
        raise error("stopped")

    hook = model.get_base_model().lm_head.register_forward_pre_hook(stop)
    with pytest.raises(error, match="stopped"):
        model(token_ids(), routing_weights=explicit_weights())
    hook.remove()
    assert frames(model) is None


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_a_forward_that_raised_the_next_one_is_as_if_it_were_the_first(
    error: type[BaseException],
) -> None:
    model = two_loras().train()
    expected = model(token_ids()).logits

    def stop(*_: object) -> None:
        raise error("stopped")

    hook = model.get_base_model().lm_head.register_forward_pre_hook(stop)
    with pytest.raises(error, match="stopped"):
        model(token_ids(), routing_weights=explicit_weights())
    hook.remove()
    assert_equal(model(token_ids()).logits, expected)


def test_a_hook_of_the_users_that_raises_first_leaves_no_frame() -> None:
    model = two_loras()

    def stop(*_: object) -> None:
        raise OSError("stopped")

    model.get_base_model().register_forward_pre_hook(stop, prepend=True)
    with pytest.raises(OSError, match="stopped"):
        model(token_ids(), routing_weights=explicit_weights())
    assert frames(model) is None


@pytest.mark.parametrize(
    "weights", [torch.ones(2, 3), torch.full((2,), float("inf")), torch.ones(5, 2), "half"]
)
def test_refused_weights_leave_no_frame(weights: Any) -> None:
    model = two_loras()
    with pytest.raises(RoutingWeightsError, match="routing_weights"):
        model(token_ids(), routing_weights=weights)
    assert frames(model) is None
    assert_equal(model(token_ids()).logits, two_loras()(token_ids()).logits)


@SCOPES
def test_a_forward_leaves_no_frame_and_no_graph(scope: str) -> None:
    model = mixture(router_scope=scope).train()
    model(input_ids=token_ids(), labels=token_ids())
    assert frames(model) is None
    tensors = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    assert not tensors


def test_a_forward_within_a_forward_has_its_own_weights() -> None:
    model = two_loras().eval()
    inner, outer = explicit_weights(seed=5), explicit_weights(seed=6)
    expected_inner = model(token_ids(), routing_weights=inner).logits
    expected_outer = model(token_ids(), routing_weights=outer).logits
    found: list[Tensor] = []

    def nested(*_: object) -> None:
        if not found:
            found.append(torch.empty(0))
            found[0] = model(token_ids(), routing_weights=inner).logits

    block = model.get_base_model().model.layers[1]
    hook = block.register_forward_pre_hook(nested)
    outer_logits = model(token_ids(), routing_weights=outer).logits
    hook.remove()
    assert_equal([found[0], outer_logits], [expected_inner, expected_outer])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_threads_do_not_see_each_others_shared_routing(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    cases = [token_ids(seed=seed) for seed in range(4)]
    expected = [model(ids).logits for ids in cases]
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = model(cases[index]).logits

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal([found[index] for index in range(4)], expected)


def test_threads_do_not_see_each_others_weights() -> None:
    model = two_loras().eval()
    cases = [explicit_weights(seed=seed) for seed in range(4)]
    expected = [model(token_ids(), routing_weights=weights).logits for weights in cases]
    found: dict[int, Tensor] = {}
    barrier = threading.Barrier(4)

    def meet(*_: object) -> None:
        # all four are in the middle of their forwards
        barrier.wait(timeout=60)

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(meet)

    def run(index: int) -> None:
        with torch.no_grad():
            found[index] = model(token_ids(), routing_weights=cases[index]).logits

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert_equal([found[index] for index in range(4)], expected)
