"""The ops alone, on one linear's sizes: forward, and with backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Variant, sparse_weights
from benchmarks.cases import Conditions
from benchmarks.correctness import TOLERANCES, WrongResultError, relative_error
from benchmarks.roofline import Ceilings, Work, work_of
from benchmarks.shapes import DTYPES
from benchmarks.timing import Effort, Step, time_steps
from moelora.ops import (
    RouterOptions,
    combine_linear,
    lora_combine,
    lora_combine_reference,
    routed_linear,
    routed_linear_reference,
)

#: Tokens that are checked against the loops of the reference.
_CHECKED = 8


@dataclass(frozen=True)
class Problem:
    """One op's inputs; A, B and the router are float32 parameters, as PEFT makes them."""

    x: Tensor
    base: Tensor
    lora_a: Tensor
    lora_b: Tensor
    weights: Tensor
    router: Tensor

    def leaves(self, kind: str) -> dict[str, Tensor]:
        """The inputs that get gradients, by name."""
        if kind == "linear":
            return {"x": self.x}
        last = {"router": self.router} if kind == "routed" else {"weights": self.weights}
        return {"x": self.x, "A": self.lora_a, "B": self.lora_b, **last}


def make_problem(conditions: Conditions, variant: Variant, device: torch.device) -> Problem:
    """Random inputs for ``d_in x d_out`` in the conditions' shape."""
    d_in, d_out = sizes_of(conditions)
    dtype = DTYPES[conditions.dtype]
    generator = torch.Generator(device=device).manual_seed(4)

    def draw(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * std

    tokens, ranks = conditions.tokens, variant.experts * variant.r
    weights = sparse_weights(1, tokens, variant.experts, variant.top_k, device)[0]
    return Problem(
        x=draw(tokens, d_in, std=1.0).to(dtype).requires_grad_(),
        base=draw(d_out, d_in, std=0.02).to(dtype),
        lora_a=draw(ranks, d_in, std=0.02).requires_grad_(),
        lora_b=draw(d_out, ranks, std=0.1).requires_grad_(),
        weights=weights.requires_grad_(),
        router=draw(variant.experts, d_in, std=0.02).requires_grad_(),
    )


def sizes_of(conditions: Conditions) -> tuple[int, int]:
    """``(d_in, d_out)`` of an op's shape, which is written ``2048x8192``."""
    d_in, d_out = conditions.shape.split("x")
    return int(d_in), int(d_out)


def combine_loop(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """The naive way: PEFT's two products for each expert, in the adapters' float32."""
    experts = weights.shape[-1]
    result: Any = 0
    pairs = zip(lora_a.chunk(experts), lora_b.chunk(experts, dim=1), strict=True)
    for number, (a, b) in enumerate(pairs):
        delta = F.linear(F.linear(x.to(a.dtype), a), b)
        result = result + delta * weights[:, number : number + 1]
    mixed: Tensor = result.to(x.dtype)
    return mixed


def options_of(variant: Variant, *, capacity: float | None) -> RouterOptions:
    """The router of a mixture with default settings and ``lora_alpha = 2 r``."""
    return RouterOptions(
        num_experts=variant.experts,
        top_k=variant.top_k,
        temperature=2.0,
        scaling=2.0,
        capacity_factor=capacity,
        loss_type=None if capacity is None else "aux_loss",
    )


def function_of(
    variant: Variant, problem: Problem, *, capacity: float | None = 1.25
) -> Callable[[], Tensor]:
    """What is timed.

    Raises:
        KeyError: for an unknown kind.
    """
    p = problem
    if variant.kind == "linear":
        return lambda: F.linear(p.x, p.base)
    if variant.kind == "loop":
        return lambda: combine_loop(p.x, p.lora_a, p.lora_b, p.weights)
    if variant.kind == "combine":
        # this one takes parameters of the input's dtype
        return lambda: lora_combine(p.x, p.lora_a.to(p.x), p.lora_b.to(p.x), p.weights)
    if variant.kind == "fused":
        return lambda: combine_linear(p.x, p.base, None, p.lora_a, p.lora_b, p.weights)
    if variant.kind == "routed":
        options = options_of(variant, capacity=capacity)
        inputs = (p.x, p.base, None, p.lora_a, p.lora_b, p.router)
        return lambda: (
            routed_linear(*inputs, options=options, backend=variant.detail or "auto").output
        )
    raise KeyError(variant.kind)


def check_op(variant: Variant, conditions: Conditions, problem: Problem) -> dict[str, float]:
    """Values and gradients of a few tokens against the reference's loops in float64.

    The routed op is checked without a capacity, so that a token does not depend on others.

    Raises:
        WrongResultError: if one is beyond its tolerance.
    """
    tokens = min(_CHECKED, problem.x.shape[0])
    leaves = problem.leaves(variant.kind)
    # an output gradient on these tokens alone: the others take no part in any gradient
    probe = torch.randn(tokens, problem.base.shape[0], device=problem.x.device)
    output = function_of(variant, problem, capacity=None)()[:tokens]
    found = torch.autograd.grad((output.float() * probe).sum(), list(leaves.values()))
    wide = {name: tensor.detach().double() for name, tensor in leaves.items()}
    rows: dict[str, Tensor] = {
        name: wide[name][:tokens] for name in ("x", "weights") if name in wide
    }
    wide.update(rows)
    for tensor in wide.values():
        tensor.requires_grad_()
    expected = _reference(variant, wide, problem.base.double())
    right = torch.autograd.grad((expected * probe.double()).sum(), list(wide.values()))
    errors = {"values": relative_error(output.detach(), expected.detach())}
    for name, fast, slow in zip(wide, found, right, strict=True):
        errors[f"gradient of {name}"] = relative_error(fast[: slow.shape[0]], slow)
    allowed = TOLERANCES[conditions.dtype][0]
    wrong = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise WrongResultError(f"relative error beyond {allowed:.0e}: {'; '.join(wrong)}")
    return errors


def _reference(variant: Variant, inputs: dict[str, Tensor], base: Tensor) -> Tensor:
    if variant.kind == "linear":
        return inputs["x"] @ base.T
    x, lora_a, lora_b, last = inputs.values()
    if variant.kind == "routed":
        options = options_of(variant, capacity=None)
        return routed_linear_reference(x, base, None, lora_a, lora_b, last, options=options)[0]
    update = lora_combine_reference(x, lora_a, lora_b, last)
    return x @ base.T + update if variant.kind == "fused" else update


def work_of_op(variant: Variant, conditions: Conditions, *, training: bool) -> Work:
    """FLOPs and bytes of a variant."""
    d_in, d_out = sizes_of(conditions)
    return work_of(
        conditions.tokens,
        d_in,
        d_out,
        ranks=0 if variant.kind == "linear" else variant.experts * variant.r,
        with_base=variant.kind in {"linear", "fused", "routed"},
        itemsize=DTYPES[conditions.dtype].itemsize,
        training=training,
    )


def measure_op(
    variant: Variant,
    conditions: Conditions,
    device: torch.device,
    *,
    effort: Effort,
    peak: Ceilings,
) -> dict[str, object]:
    """Check an op, then time it with the cache flushed; with its floor and distance from it."""
    problem = make_problem(conditions, variant, device)
    errors = check_op(variant, conditions, problem)
    function = function_of(variant, problem)
    leaves = list(problem.leaves(variant.kind).values())
    gradient = torch.randn_like(function().detach())

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    forward = Step(torch.no_grad()(function))
    both = Step(lambda: function().backward(gradient), prepare=forget)
    metrics: dict[str, object] = {}
    timed = time_steps([forward, both], device, effort, flush=True)
    clock = "events_ms" if device.type == "cuda" else "wall_ms"
    for name, found, training in zip(("forward", "training"), timed, (False, True), strict=True):
        work = work_of_op(variant, conditions, training=training)
        floor = peak.floor_ms(work.flops, work.moved)
        metrics[f"{name}_ms"] = found[clock]
        metrics[f"{name}_host_ms"] = found["host_ms"]
        metrics[f"{name}_flops"], metrics[f"{name}_bytes"] = work.flops, work.moved
        metrics[f"{name}_floor_ms"] = floor
        metrics[f"{name}_over_floor"] = found[clock]["p50"] / floor
    return {"metrics": metrics, "errors": errors}
