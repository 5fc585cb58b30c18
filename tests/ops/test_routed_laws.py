"""Laws of the routed op, over sizes, options and inputs that nobody chose by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.ops import (
    Member,
    RoutedOutput,
    RouterOptions,
    routed_linear,
    routed_linear_reference,
    routed_linears,
    routed_linears_inference,
)
from tests.models import gradients
from tests.tolerances import assert_close, assert_equal


@dataclass(frozen=True)
class Problem:
    """A small routed layer.

    Attributes:
        x: ``(tokens, d_in)``.
        weight: ``(d_out, d_in)`` of the frozen base.
        bias: ``(d_out,)`` or None.
        lora_a: ``(experts * r, d_in)``.
        lora_b: ``(d_out, experts * r)``.
        router: ``(experts, d_in)``.
        options: how it decides.
        token_mask: ``(tokens,)`` or None.
        mature: ``(experts,)`` or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    router: Tensor
    options: RouterOptions
    token_mask: Tensor | None
    mature: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.x, self.lora_a, self.lora_b, self.router]

    def told(self) -> dict[str, Any]:
        """The keywords that op and reference share."""
        return {
            "options": self.options, "token_mask": self.token_mask, "mature": self.mature,
        }  # fmt: skip

    def run(self, x: Tensor | None = None, **changes: Any) -> RoutedOutput:
        """By the op."""
        x = self.x if x is None else x
        tensors = (x, self.weight, self.bias, self.lora_a, self.lora_b, self.router)
        return routed_linear(*tensors, **{**self.told(), "backend": "eager", **changes})

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """By the definition."""
        tensors = (self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.router)
        return routed_linear_reference(*tensors, **self.told())

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same in another dtype, with new leaves."""
        names = ("x", "weight", "bias", "lora_a", "lora_b", "router")
        tensors = {name: getattr(self, name) for name in names}
        cast = {name: None if t is None else t.detach().to(dtype) for name, t in tensors.items()}
        return replace(self, **cast).requiring_grad()

    def requiring_grad(self) -> Problem:
        """The same; gradients are wanted."""
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self


@st.composite
def problems(draw: st.DrawFn, *, capacity: bool = True, maturity: bool = True) -> Problem:
    """Sizes, options and a seed are drawn, so failures shrink and replay."""
    experts = draw(st.integers(1, 6))
    tokens, rank = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options = RouterOptions(
        num_experts=experts,
        top_k=draw(st.integers(1, experts)),
        temperature=draw(st.sampled_from([0.5, 2.0])),
        scaling=draw(st.sampled_from([1.0, 1.7, 0.0])),
        capacity_factor=draw(st.sampled_from([None, 0.3, 1.0, 1.25])) if capacity else None,
        loss_type=draw(st.sampled_from([None, "aux_loss", "switch", "z_loss"])),
    )
    is_padded, has_flags = draw(st.booleans()), maturity and draw(st.booleans())
    mature = torch.rand(experts, generator=generator) > 1 / (1 + experts)
    return Problem(
        normal(tokens, d_in),
        normal(d_out, d_in),
        normal(d_out) if draw(st.booleans()) else None,
        normal(experts * rank, d_in),
        normal(d_out, experts * rank),
        normal(experts, d_in),
        options,
        torch.rand(tokens, generator=generator) > 0.3 if is_padded else None,
        mature if has_flags else None,
    ).requiring_grad()


def results(problem: Problem, result: RoutedOutput) -> list[Tensor]:
    """Whatever of the op's result has a gradient and a meaning."""
    if result.statistics is None:
        return [result.output]
    width, experts = (len(result.statistics) - 2) // 3, problem.options.num_experts
    parts = {
        "aux_loss": [result.statistics[:experts], result.statistics[width : width + experts]],
        "switch": [
            result.statistics[:experts],
            result.statistics[2 * width : 2 * width + experts],
        ],
        "z_loss": [result.statistics[3 * width]],
    }
    return [result.output, *parts[str(problem.options.loss_type)], result.statistics[-1]]


def definitions(problem: Problem) -> list[Tensor]:
    """The same by the definition."""
    output, sums = problem.expected()
    names = {
        None: [],
        "aux_loss": ["mean_probs", "slot_share", "tokens"],
        "switch": ["mean_probs", "first_share", "tokens"],
        "z_loss": ["mean_squared_logsumexp", "tokens"],
    }[problem.options.loss_type]
    return [output, *(sums[name].to(output.dtype) for name in names)]


def pulled(parts: list[Tensor]) -> Tensor:
    """One number that depends on every part, and differently on each of its entries."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return flat * torch.arange(1.0, len(flat) + 1, dtype=flat.dtype).cos()


def gradients_of(problem: Problem, parts: list[Tensor]) -> list[Tensor]:
    """Of all leaves; zeros where nothing depends on one (no tokens)."""
    total = pulled(parts)
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in problem.leaves]
    return gradients(total, problem.leaves)


@settings(max_examples=150)
@given(problem=problems())
def test_the_op_is_its_definition_with_all_gradients(problem: Problem) -> None:
    result = problem.run()
    assert_close(results(problem, result), definitions(problem))
    assert_close(result.routing_weights, problem.expected()[1]["weights"])
    actual = gradients_of(problem, results(problem, result))
    assert_close(actual, gradients_of(problem, definitions(problem)))


@settings(max_examples=10)
@given(problem=problems())
def test_the_definition_can_be_asked_for_by_name(problem: Problem) -> None:
    named, eager = problem.run(backend="reference"), problem.run()
    assert_close(results(problem, named), results(problem, eager))
    ours = [named.router_logits, named.routing_weights]
    assert_close(ours, [eager.router_logits, eager.routing_weights])
    half = problem.cast(torch.bfloat16)
    assert half.run(backend="reference").output.dtype == torch.bfloat16


@settings(max_examples=25)
@given(problem=problems())
def test_gradcheck(problem: Problem) -> None:
    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, lora_a, lora_b, router = leaves
        changed = replace(problem, x=x, lora_a=lora_a, lora_b=lora_b, router=router)
        result = changed.run()
        return tuple(part for part in results(changed, result)[:2] if part.requires_grad)

    if len(problem.x):
        assert torch.autograd.gradcheck(function, problem.leaves)


@settings(max_examples=40)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_renaming_the_experts_changes_nothing(problem: Problem, seed: int) -> None:
    experts = problem.options.num_experts
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    renamed = replace(
        problem,
        lora_a=problem.lora_a.unflatten(0, (experts, -1))[order].flatten(0, 1),
        lora_b=problem.lora_b.unflatten(1, (experts, -1))[:, order].flatten(1),
        router=problem.router[order],
        mature=None if problem.mature is None else problem.mature[order],
    )
    ours, theirs = problem.run(), renamed.run()
    assert_close(theirs.output, ours.output)
    assert ours.routing_weights is not None
    assert_close(theirs.routing_weights, ours.routing_weights[:, order])
    actual = gradients_of(problem, [theirs.output])
    assert_close(actual, gradients_of(problem, [ours.output]))


@settings(max_examples=40)
@given(problem=problems(capacity=False), seed=st.integers(0, 1000))
def test_without_capacity_no_token_depends_on_another(problem: Problem, seed: int) -> None:
    order = torch.randperm(len(problem.x), generator=torch.Generator().manual_seed(seed))
    mask = None if problem.token_mask is None else problem.token_mask[order]
    permuted = problem.run(problem.x[order], token_mask=mask)
    assert_close(permuted.output, problem.run().output[order])


@settings(max_examples=40)
@given(problem=problems())
def test_an_expert_that_nobody_chose_gets_no_gradient_at_all(problem: Problem) -> None:
    result = problem.run()
    assert result.routing_weights is not None
    _, grad_a, grad_b, _ = gradients_of(problem, [result.output])
    experts = problem.options.num_experts
    unchosen = (result.routing_weights == 0).all(dim=0)
    rows = grad_a.unflatten(0, (experts, -1))[unchosen]
    columns = grad_b.unflatten(1, (experts, -1))[:, unchosen]
    assert_equal([rows, columns], [torch.zeros_like(rows), torch.zeros_like(columns)])


@settings(max_examples=40)
@given(problem=problems(capacity=False))
def test_weights_of_a_token_are_shares(problem: Problem) -> None:
    weights = problem.run().routing_weights
    assert weights is not None
    assert bool((weights >= 0).all())
    is_shared = problem.mature is not None and not bool(problem.mature.all())
    if problem.options.top_k > 1 or is_shared:
        assert_close(weights.sum(dim=-1), torch.ones(len(weights), dtype=weights.dtype))
    if not is_shared:
        assert bool(((weights > 0).sum(dim=-1) <= problem.options.top_k).all())


@settings(max_examples=30)
@given(problem=problems(capacity=False, maturity=False))
def test_a_single_expert_is_one_lora(problem: Problem) -> None:
    options = replace(problem.options, num_experts=1, top_k=1)
    alone = replace(problem, router=problem.router[:1].detach(), options=options)
    x, scaling = problem.x, options.scaling
    expected = x @ problem.weight.T + scaling * (x @ problem.lora_a.T @ problem.lora_b.T)
    expected = expected if problem.bias is None else expected + problem.bias
    assert_close(alone.run().output, expected)


@settings(max_examples=40)
@given(
    problem=problems(),
    lead=st.sampled_from([(), (1,), (2, 3), (3, 1, 2), (0,), (2, 0), (5, 1)]),
    layout=st.sampled_from(["transposed", "every other", "slice", "repeated"]),
)
def test_any_shape_and_layout_of_the_input_gives_the_same(
    problem: Problem, lead: tuple[int, ...], layout: str
) -> None:
    width = problem.x.shape[-1]
    x = torch.randn(*lead, width, dtype=torch.float64)
    if layout == "repeated":
        x = torch.randn(width, dtype=torch.float64).expand(*lead, width)
    strided = {
        "transposed": lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
        "every other": lambda: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
        "slice": lambda: torch.cat([x, x, x], dim=-1)[..., width : 2 * width],
        "repeated": lambda: x,
    }[layout]()
    assert_equal(strided, x)
    mask = None if problem.token_mask is None else torch.ones(x[..., 0].numel()).bool()
    plain = replace(problem, x=x.reshape(-1, width), token_mask=mask)
    expected = plain.expected()[0]
    inputs = strided.detach().requires_grad_()
    output = plain.run(inputs).output
    assert output.shape == (*lead, problem.weight.shape[0])
    assert_close(output, expected.reshape(output.shape))
    assert gradients(output, [inputs])[0].shape == x.shape


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_a_gradient_is_the_same_whichever_others_are_wanted(wanted: tuple[bool, ...]) -> None:
    problem = example()
    expected = gradients_of(problem, results(problem, problem.run()))
    asking = problem.cast(torch.float64)
    for leaf, is_wanted in zip(asking.leaves, wanted, strict=True):
        leaf.requires_grad_(is_wanted)
    total = pulled(results(asking, asking.run()))
    assert total.requires_grad == any(wanted)
    if any(wanted):
        leaves = [leaf for leaf in asking.leaves if leaf.requires_grad]
        chosen = [grad for grad, is_wanted in zip(expected, wanted, strict=True) if is_wanted]
        assert_close(gradients(total, leaves), chosen)


def example(tokens: int = 7, *, loss_type: Any = "aux_loss", top_k: int = 2) -> Problem:
    """One problem with everything in it."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Problem(
        normal(tokens, 6), normal(5, 6), normal(5), normal(8, 6), normal(5, 8), normal(4, 6),
        RouterOptions(4, top_k, 2.0, 1.7, 1.0, loss_type), torch.arange(tokens) % 5 != 3, None,
    ).requiring_grad()  # fmt: skip


def test_only_the_loss_or_only_the_output_may_be_used() -> None:
    problem = example()

    def pull(start: int, end: int) -> list[Tensor]:
        parts = results(problem, problem.run())[start:end]
        total = sum((part.sin().sum() for part in parts), torch.zeros(()).double())
        return list(torch.autograd.grad(total, problem.leaves, materialize_grads=True))

    both = zip(pull(0, 1), pull(1, 2), strict=True)
    assert_close([a + b for a, b in both], pull(0, 2))
    of_loss = dict(zip(["x", "a", "b", "router"], pull(1, 2), strict=True))
    assert not bool(of_loss["a"].any())
    assert not bool(of_loss["b"].any())
    assert bool(of_loss["router"].any())


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    problem = example()
    total = pulled(results(problem, problem.run())).sum()
    first = torch.autograd.grad(total, problem.leaves, retain_graph=True)
    subset = torch.autograd.grad(total, problem.leaves[2:], retain_graph=True)
    assert_equal(list(subset), list(first[2:]))
    assert_equal(list(torch.autograd.grad(total, problem.leaves)), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, problem.leaves)


def test_arguments_are_not_written_to() -> None:
    problem = example()
    tensors = [*problem.leaves, problem.weight, problem.bias, problem.token_mask]
    before = [tensor.detach().clone() for tensor in tensors if tensor is not None]
    pulled(results(problem, problem.run())).sum().backward()
    assert_equal([tensor.detach() for tensor in tensors if tensor is not None], before)


def test_a_parameter_that_changes_before_backward_is_noticed() -> None:
    problem = example()
    output = problem.run().output
    with torch.no_grad():
        problem.lora_b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("lead", [(7,), (1, 7)], ids=str)
@pytest.mark.parametrize("loss_type", [None, "aux_loss"])
def test_the_output_may_be_written_to(loss_type: Any, lead: tuple[int, ...]) -> None:
    problem = example(loss_type=loss_type)
    x = problem.x.detach().reshape(*lead, 6).requires_grad_()
    expected = gradients(problem.run(x).output.relu(), [x])
    output = problem.run(x).output
    torch.nn.functional.relu(output, inplace=True)
    assert_close(gradients(output, [x]), expected)


def test_results_without_a_gradient_may_be_written_to_with_one() -> None:
    problem = example(loss_type=None)
    with torch.no_grad():
        output = problem.run().output
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    output.mul_(scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["same", "wide parameters"])
def test_other_dtypes_are_close_to_float64(dtype: torch.dtype, case: str) -> None:
    problem = example(loss_type="z_loss").cast(dtype)
    if case == "wide parameters":
        wide = {n: getattr(problem, n).detach().float() for n in ("lora_a", "lora_b", "router")}
        problem = replace(problem, **wide).requiring_grad()
    exact = problem.cast(torch.float64)
    result = problem.run()
    assert result.output.dtype == dtype
    assert result.statistics is not None
    assert result.statistics.dtype == torch.float32
    # the same rounded inputs, so that both choose the same experts; sums of up to 8 terms of size 5
    assert relative(result.output, exact.expected()[0]) < 4 * torch.finfo(dtype).eps
    actual = gradients_of(problem, results(problem, result))
    for gradient, leaf, wanted in zip(
        actual, problem.leaves, gradients_of(exact, definitions(exact)), strict=True
    ):
        assert gradient.dtype == leaf.dtype
        assert relative(gradient, wanted) < 6 * torch.finfo(dtype).eps


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_scores_choose_so_many_different_experts(top_k: int) -> None:
    problem = replace(example(loss_type="aux_loss", top_k=top_k), token_mask=None)
    problem = replace(problem, router=torch.zeros_like(problem.router), x=problem.x.detach())
    unlimited = replace(problem, options=replace(problem.options, capacity_factor=None))
    weights = unlimited.run().routing_weights
    assert weights is not None
    assert_equal((weights > 0).sum(dim=-1), torch.full((7,), top_k))
    share = 0.25 if top_k == 1 else 1 / top_k
    assert_close(weights[weights > 0], torch.full((7 * top_k,), share, dtype=torch.float64))


def test_scores_far_apart_give_finite_results() -> None:
    problem = example(loss_type="aux_loss")
    huge = replace(problem, router=(problem.router * 1e6).detach()).requiring_grad()
    result = huge.run()
    assert_close(result.output, huge.expected()[0])
    actual = gradients_of(huge, results(huge, result))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in actual)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_spoils_no_other(value: float) -> None:
    problem = replace(example(loss_type=None), token_mask=None)
    problem = replace(problem, options=replace(problem.options, capacity_factor=None))
    x = problem.x.detach().clone()
    x[3, 2] = value
    x.requires_grad_()
    output = problem.run(x).output
    others = torch.arange(7) != 3
    assert_equal(output[others], problem.run().output[others])
    assert not bool(torch.isfinite(output[3]).all())
    (grad,) = torch.autograd.grad(output[others].sum(), [x])
    (expected,) = torch.autograd.grad(problem.run().output[others].sum(), [problem.x])
    assert_close(grad[others], expected[others])


def test_a_layer_of_conv1d_is_the_same_with_its_weight_turned() -> None:
    problem = example()
    turned = replace(problem, weight=problem.weight.T.contiguous())
    ours, theirs = problem.run(), turned.run(is_conv1d=True)
    assert_close(theirs.output, ours.output)
    actual = gradients_of(problem, results(problem, theirs))
    assert_close(actual, gradients_of(problem, results(problem, ours)))


def test_several_layers_of_one_input_are_each_as_alone() -> None:
    first, second = example(loss_type="aux_loss"), example(loss_type="aux_loss")
    second = replace(second, lora_b=-second.lora_b.detach(), router=-second.router.detach())
    members = [
        Member(p.weight, p.bias, p.lora_a, p.lora_b, p.router, None) for p in (first, second)
    ]
    told = {"options": first.options, "token_mask": first.token_mask}
    both = routed_linears(first.x, members, **told)
    for found, problem in zip(both, (first, second), strict=True):
        assert_equal(found.output, problem.run(first.x).output)
        assert_close(found.statistics, problem.run(first.x).statistics)


@settings(max_examples=30)
@given(problem=problems(capacity=False))
def test_inference_gives_what_training_gives(problem: Problem) -> None:
    plain = replace(problem, options=replace(problem.options, loss_type=None), token_mask=None)
    member = Member(
        plain.weight, plain.bias, plain.lora_a, plain.lora_b, plain.router, plain.mature
    )
    with torch.inference_mode():
        (result,) = routed_linears_inference(plain.x, [member], options=plain.options, record=True)
        assert_equal(result.output, plain.run().output)
        assert_equal(result.routing_weights, plain.run().routing_weights)
    assert result.statistics is None


@pytest.mark.parametrize("top_k", [0, 4])
def test_more_experts_per_token_than_there_are_is_refused(top_k: int) -> None:
    with pytest.raises(
        ValueError, match=rf"top_k must be between 1 and num_experts=3, got {top_k}"
    ):
        RouterOptions(3, top_k, 1.0, 1.0)


def test_ranks_that_cannot_be_split_are_refused() -> None:
    problem = example()
    odd = replace(problem, lora_a=problem.lora_a[:7], lora_b=problem.lora_b[:, :7])
    with pytest.raises(ValueError, match="ranks=7 cannot be split evenly over experts=4"):
        odd.run()
