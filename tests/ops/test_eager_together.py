"""Layers that read one input, in PyTorch's operations together, against each layer alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora import record_routing
from moelora.ops import Member, RoutedOutput, routed_linears, routed_linears_inference
from moelora.routed_layer import RoutedPlan
from moelora.shared_input import may_be_recomputed_alone
from tests.lm import checkpoint_blocks, mixture, token_ids
from tests.ops.test_routed_laws import Problem, example, problems, pulled, results
from tests.tolerances import assert_close, assert_equal


def member_of(problem: Problem) -> Member:
    """The layer of a problem."""
    p = problem
    return Member(p.weight, p.bias, p.lora_a, p.lora_b, p.router, p.mature)


@st.composite
def groups(draw: st.DrawFn, **kwargs: Any) -> list[Problem]:
    """Two or three layers of unlike width that read the same input."""
    first: Problem = draw(problems(**kwargs))
    group = [first]
    for _ in range(draw(st.integers(1, 2))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

        def like(tensor: Tensor, *shape: int, generator: torch.Generator = generator) -> Tensor:
            shape = shape or tuple(tensor.shape)
            return torch.randn(*shape, generator=generator, dtype=tensor.dtype)

        d_out, ranks = draw(st.integers(1, 7)), first.lora_a.shape[0]
        mature = None
        if first.mature is not None:
            mature = torch.rand(len(first.mature), generator=generator) > 0.2
        other = replace(
            first,
            weight=like(first.weight, d_out, first.x.shape[1]),
            bias=like(first.weight, d_out) if draw(st.booleans()) else None,
            lora_a=like(first.lora_a),
            lora_b=like(first.lora_b, d_out, ranks),
            router=like(first.router),
            mature=mature,
        )
        group.append(other.requiring_grad())
    return group


def together(group: list[Problem], **changes: Any) -> list[RoutedOutput]:
    """All layers by one call."""
    first = group[0]
    told = {"options": first.options, "token_mask": first.token_mask, "backend": "eager", **changes}
    return routed_linears(first.x, [member_of(problem) for problem in group], **told)


def parts_of(group: list[Problem], found: list[RoutedOutput]) -> list[Tensor]:
    """Whatever has a gradient and a meaning, of all layers."""
    pairs = zip(group, found, strict=True)
    return [part for problem, result in pairs for part in results(problem, result)]


def gradients_of(group: list[Problem], parts: list[Tensor]) -> list[Tensor]:
    """Of the input and of every layer's parameters."""
    leaves = [group[0].x, *(leaf for problem in group for leaf in problem.leaves[1:])]
    total = pulled(parts).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


@settings(max_examples=80)
@given(group=groups())
def test_layers_together_are_to_the_bit_what_each_is_alone(group: list[Problem]) -> None:
    found, alone = together(group), [problem.run() for problem in group]
    for ours, theirs in zip(found, alone, strict=True):
        assert_equal(ours.output, theirs.output)
        assert_equal(ours.router_logits, theirs.router_logits)
        assert_equal(ours.routing_weights, theirs.routing_weights)
    # sums over the tokens, which may be taken in another order
    ours, theirs = parts_of(group, found), parts_of(group, alone)
    assert_close(ours, theirs)
    assert_close(gradients_of(group, ours), gradients_of(group, theirs))


@settings(max_examples=30)
@given(group=groups(capacity=False), record=st.booleans())
def test_inference_together_is_to_the_bit_what_training_is_alone(
    group: list[Problem], record: bool
) -> None:
    options = replace(group[0].options, loss_type=None)
    group = [replace(problem, options=options, token_mask=None) for problem in group]
    members = [member_of(problem) for problem in group]
    with torch.no_grad():
        found = routed_linears_inference(group[0].x, members, options=options, record=record)
    for result, problem in zip(found, group, strict=True):
        alone = problem.run()
        assert_equal(result.output, alone.output)
        assert_equal(result.routing_weights, alone.routing_weights if record else None)
        assert result.statistics is None


@settings(max_examples=20)
@given(group=groups(maturity=False))
def test_who_knows_that_all_are_mature_need_not_look(group: list[Problem]) -> None:
    mature = torch.ones(group[0].options.num_experts, dtype=torch.bool)
    group = [replace(problem, mature=mature) for problem in group]
    looked, knew = together(group), together(group, all_mature=True)
    assert_equal(parts_of(group, knew), parts_of(group, looked))


@pytest.mark.parametrize("used", [0, 1])
def test_a_layer_whose_output_nobody_uses_changes_nothing(used: int) -> None:
    first = example(loss_type=None)
    group = [first, replace(first, lora_b=-first.lora_b.detach()).requiring_grad()]
    leaves = [first.x, *group[used].leaves[1:]]
    actual = torch.autograd.grad(pulled([together(group)[used].output]).sum(), leaves)
    expected = torch.autograd.grad(pulled([group[used].run().output]).sum(), leaves)
    assert_close(list(actual), list(expected))


def test_layers_of_unlike_ranks_or_dtypes_are_served_too() -> None:
    first = example()
    narrow = replace(first, lora_a=first.lora_a[:4].detach(), lora_b=first.lora_b[:, :4].detach())
    single = replace(first, router=first.router.detach().float())
    group = [first, narrow.requiring_grad(), single.requiring_grad()]
    for ours, problem in zip(together(group), group, strict=True):
        assert_equal(ours.output, problem.run().output)
        assert_equal(ours.statistics, problem.run().statistics)


def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each call adds how many other layers it computed."""
    numbers: list[int] = []
    others = RoutedPlan._others

    def counted(self: RoutedPlan, *args: Any) -> Any:
        found = others(self, *args)
        numbers.append(len(found))
        return found

    monkeypatch.setattr(RoutedPlan, "_others", counted)
    return numbers


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_a_model_on_a_cpu_trains_as_if_its_layers_were_alone(
    checkpointing: bool | None, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(target_modules="all-linear", lora_dropout=dropout).train()
    if checkpointing is not None:
        checkpoint_blocks(model, use_reentrant=checkpointing)
        model.enable_input_require_grads()
    ids = token_ids()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]

    # no layer is known to share its input yet
    alone = step()
    numbers = served(monkeypatch)
    assert_close(step(), alone)
    # before torch 2.8 nobody tells whether a block is recomputed alone
    assert sum(numbers) > 0 or (checkpointing is None and may_be_recomputed_alone())


def test_a_model_on_a_cpu_generates_as_if_its_layers_were_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mixture(target_modules="all-linear").eval()
    ids = token_ids()
    with torch.no_grad(), record_routing(model) as record:
        alone = model(input_ids=ids).logits
        first = dict(record.routing)
        numbers = served(monkeypatch)
        assert_equal(model(input_ids=ids).logits, alone)
        assert sum(numbers) > 0
        assert list(record.routing) == list(first)
        for name, routing in record.routing.items():
            assert_equal(routing.routing_weights, first[name].routing_weights)
