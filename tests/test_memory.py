"""Nothing stays behind: no tensor more after many steps, in any way a mixture is used."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from moelora import Router, record_routing
from tests.lm import checkpoint_blocks, explicit_weights, mixture, token_ids, two_loras

#: Steps after which all that is made once is there, and those in which nothing may grow.
SETTLING, STEPS = 3, 50


def live_tensors() -> tuple[int, int]:
    """How many tensors are alive, and their bytes, each storage once."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    # sparse tensors of other tests have no storage of their own
    tensors = [item for item in found if item.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


@contextmanager
def nothing_grows(step: Callable[[], Any]) -> Iterator[None]:
    """Run the step many times, then the block's body; the same tensors must be alive after."""
    for _ in range(SETTLING):
        step()
    before = live_tensors()
    for _ in range(STEPS):
        step()
    yield
    assert live_tensors() == before


def train_step(model: PeftModel, **kwargs: Any) -> Callable[[], None]:
    """Forward, backward and an optimiser's step."""
    model.train()
    ids = token_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(input_ids=ids, labels=ids, **kwargs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_training_keeps_nothing_behind(scope: str) -> None:
    step = train_step(mixture(router_scope=scope))
    with nothing_grows(step):
        pass


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_with_checkpointing_keeps_nothing_behind(use_reentrant: bool) -> None:
    model = mixture()
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    model.enable_input_require_grads()
    with nothing_grows(train_step(model)):
        pass


def test_training_with_a_frozen_router_and_dropout_keeps_nothing_behind() -> None:
    model = mixture(lora_dropout=0.5, expert_dropout=0.5)
    for name, parameter in model.named_parameters():
        if ".lora_router." in name:
            parameter.requires_grad_(False)
    with nothing_grows(train_step(model, attention_mask=torch.ones(2, 7).long())):
        pass


def test_training_under_explicit_weights_keeps_nothing_behind() -> None:
    model = two_loras()
    weights = explicit_weights().requires_grad_()
    with nothing_grows(train_step(model, routing_weights=weights)):
        # a leaf's own gradient is the caller's
        weights.grad = None
    assert weights.grad is None


def test_training_with_an_attached_router_keeps_nothing_behind() -> None:
    from moelora import MoELoraConfig

    model = two_loras()
    model.attach_router(
        Router(16, num_experts=2, top_k=1).double(), MoELoraConfig(num_experts=2, top_k_experts=1)
    )
    with nothing_grows(train_step(model)):
        pass


def test_forwards_that_are_never_taken_back_keep_nothing_behind() -> None:
    model = mixture().train()
    ids = token_ids()
    # with a graph, which dies with the output
    with nothing_grows(lambda: model(input_ids=ids, labels=ids)):
        pass


def test_evaluation_and_generation_keep_nothing_behind() -> None:
    model = mixture().eval()
    ids = token_ids()

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)

    with nothing_grows(step):
        pass


def test_a_forward_that_raises_keeps_nothing_behind() -> None:
    model = mixture().train()
    ids = token_ids()

    def refuse(*_: object) -> None:
        raise ArithmeticError("after all layers have routed")

    model.get_base_model().lm_head.register_forward_pre_hook(refuse)

    def step() -> None:
        with pytest.raises(ArithmeticError, match="after all layers"):
            model(input_ids=ids, labels=ids)

    with nothing_grows(step):
        pass


def test_two_hundred_steps_of_every_kind_leave_as_many_objects_as_there_were() -> None:
    model = mixture(expert_capacity_factor=1.0)
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(training, lr=1e-3)

    def train(ids: Tensor) -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(ids: Tensor) -> None:
        model.eval()(input_ids=ids)

    def generate(ids: Tensor) -> None:
        mask = torch.ones_like(ids)
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)

    def record(ids: Tensor) -> None:
        with record_routing(model):
            model.train()(input_ids=ids, labels=ids)

    kinds = [train, evaluate, generate, record]
    batches = [token_ids(length=length) for length in (3, 7, 8)]
    # every kind meets every length, many times
    steps = [(kinds[n % 4], batches[n % 3]) for n in range(200)]
    for step, ids in steps[:24]:
        step(ids)
    tensors, objects = live_tensors(), len(gc.get_objects())
    for step, ids in steps:
        step(ids)
    assert live_tensors() == tensors
    # less than one more for each step
    assert len(gc.get_objects()) - objects < len(steps) // 2


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_record_holds_one_forward_however_many_there_were(keep_graph: bool) -> None:
    model = mixture().train()
    ids = token_ids()
    with record_routing(model, keep_graph=keep_graph) as record:
        with nothing_grows(lambda: model(input_ids=ids, labels=ids)):
            pass
        held = len(record.routing)
    assert held == len({name for name, m in model.named_modules() if hasattr(m, "lora_router")})
    before = live_tensors()
    record.routing.clear()
    # four tensors of each layer's decision were the record's alone
    assert live_tensors()[0] <= before[0] - 4 * held


def test_loading_swapping_and_deleting_adapters_keeps_nothing_behind() -> None:
    model = mixture()

    def step() -> None:
        model.add_adapter("other", mixture_config_of(model))
        model.base_model.set_adapter(["default", "other"])
        model(input_ids=token_ids())
        model.base_model.set_adapter("default")
        model.delete_adapter("other")

    with nothing_grows(step):
        pass


def mixture_config_of(model: PeftModel) -> Any:
    """The config of the model's mixture, for a second one like it."""
    return model.peft_config["default"]


def test_a_model_that_is_gone_is_gone() -> None:
    """Registries and patches hold no model."""
    mixture()
    before = live_tensors()
    for _ in range(3):
        model = mixture().train()
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        del model, ids
    assert live_tensors()[0] <= before[0]
