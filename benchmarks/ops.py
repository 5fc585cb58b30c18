"""The op alone: ``lora_combine`` on one linear's sizes, forward and with backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Variant, sparse_weights
from benchmarks.cases import Conditions
from benchmarks.correctness import TOLERANCES, WrongResultError, relative_error
from benchmarks.roofline import Ceilings, Work, combine_work, linear_work
from benchmarks.shapes import DTYPES
from benchmarks.timing import Effort, Step, time_steps
from moelora.ops import lora_combine, lora_combine_reference

#: Tokens that are checked against the loops of the reference.
_CHECKED = 8


@dataclass(frozen=True)
class Problem:
    """One op's inputs; A and B are float32 parameters, as PEFT makes them."""

    x: Tensor
    lora_a: Tensor
    lora_b: Tensor
    weights: Tensor
    base: Tensor


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
        lora_a=draw(ranks, d_in, std=0.02).requires_grad_(),
        lora_b=draw(d_out, ranks, std=0.1).requires_grad_(),
        weights=weights.requires_grad_(),
        base=draw(d_out, d_in, std=0.02).to(dtype),
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
    return result.to(x.dtype)  # type: ignore[no-any-return]


def function_of(variant: Variant, problem: Problem) -> Callable[[], Tensor]:
    """What is timed."""
    p = problem
    if variant.kind == "linear":
        return lambda: F.linear(p.x, p.base)
    if variant.kind == "loop":
        return lambda: combine_loop(p.x, p.lora_a, p.lora_b, p.weights)
    if variant.kind != "combine":
        raise KeyError(variant.kind)
    options = {"backend": variant.detail} if variant.detail else {}
    if "backend" not in inspect.signature(lora_combine).parameters:
        # parameters of another dtype than x are the op's business once it has backends
        return lambda: lora_combine(p.x, p.lora_a.to(p.x), p.lora_b.to(p.x), p.weights)
    return lambda: lora_combine(p.x, p.lora_a, p.lora_b, p.weights, **options)


def check_op(variant: Variant, conditions: Conditions, problem: Problem) -> dict[str, float]:
    """Values and gradients of a few tokens against the reference's loops in float64.

    Raises:
        WrongResultError: if one is beyond its tolerance.
    """
    if variant.kind == "linear":
        return {}
    tokens = min(_CHECKED, problem.x.shape[0])
    # an output gradient on these tokens alone: the others take no part in any gradient
    probe = torch.randn(tokens, problem.base.shape[0], device=problem.x.device)
    inputs = [problem.x, problem.lora_a, problem.lora_b, problem.weights]
    output = function_of(variant, problem)()
    probed = (output[:tokens].float() * probe).sum()
    gradients = torch.autograd.grad(probed, inputs)
    wide = [t.detach()[:tokens].double() if t is problem.x else t.detach().double() for t in inputs]
    wide[3] = wide[3][:tokens]
    wide = [tensor.requires_grad_() for tensor in wide]
    expected = lora_combine_reference(*wide)
    expected_gradients = torch.autograd.grad((expected * probe.double()).sum(), wide)
    errors = {"values": relative_error(output[:tokens].detach(), expected.detach())}
    names = ("x", "A", "B", "weights")
    for name, found, right in zip(names, gradients, expected_gradients, strict=True):
        rows = found[:tokens] if name in {"x", "weights"} else found
        errors[f"gradient of {name}"] = relative_error(rows, right)
    allowed = TOLERANCES[conditions.dtype][0]
    wrong = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise WrongResultError(f"relative error beyond {allowed:.0e}: {'; '.join(wrong)}")
    return errors


def work_of(variant: Variant, conditions: Conditions, *, training: bool) -> Work:
    """FLOPs and bytes of a variant with all experts computed; sparse ways may stay below them."""
    d_in, d_out = sizes_of(conditions)
    itemsize = DTYPES[conditions.dtype].itemsize
    if variant.kind == "linear":
        return linear_work(conditions.tokens, d_in, d_out, itemsize=itemsize, training=training)
    ranks = variant.experts * variant.r
    return combine_work(conditions.tokens, d_in, d_out, ranks, itemsize=itemsize, training=training)


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
    leaves = [problem.x, problem.lora_a, problem.lora_b, problem.weights]
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
        work = work_of(variant, conditions, training=training)
        floor = peak.floor_ms(work.flops, work.moved)
        metrics[f"{name}_ms"] = found[clock]
        metrics[f"{name}_host_ms"] = found["host_ms"]
        metrics[f"{name}_flops"], metrics[f"{name}_bytes"] = work.flops, work.moved
        metrics[f"{name}_floor_ms"] = floor
        metrics[f"{name}_over_floor"] = found[clock]["p50"] / floor
    return {"metrics": metrics, "errors": errors}
