"""Is a variant right? Asked before it is timed, of the very step that is timed.

The loss or the logits, and the gradients of all adapter tensors by kind, are held against the slow
way (:mod:`benchmarks.slow`) by ``||fast - slow|| / ||slow||``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import Built, Variant
from benchmarks.cases import COMPILED, Conditions
from benchmarks.slow import slow_layers, slow_loss
from benchmarks.steps import checkpoint, loss_scale, make_step, training_inputs
from benchmarks.timing import Step, capture
from moelora import Routing, record_routing

#: Allowed relative errors by dtype of the base model: of logits, and of gradients. Rounding of the
#: base model's own activations through all blocks is most of it; PEFT's one LoRA has the same:
#: 5.1e-2 was measured for its logits with bfloat16 adapters through 16 blocks of random weights.
TOLERANCES = {"fp32": (1e-4, 1e-3), "fp16": (1e-2, 4e-2), "bf16": (8e-2, 2e-1)}
#: Where experts are chosen anew in the slow run, from activations rounded otherwise, a few tokens
#: go elsewhere. So with these variants. In float32 none does.
_CHOOSES_ANEW = {"arrow", "npasses", "xlora"}
_ANEW_FACTOR = 6
#: The slow way does not see what a router of a whole block or model reads, so no gradient passes
#: through its weights there: not to the router, and with one per block not to the layers before.
_NOT_COMPARED = {"layer": ("lora_A", "lora_B", "lora_router"), "model": ("lora_router",)}


INFINITE = float("inf")


class WrongResultError(AssertionError):
    """A variant computes something else than it should."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; infinite for NaN.

    Example:
        >>> relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
        0.8
    """
    difference = (actual.double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp(min=1e-300)).item()
    return error if error == error else INFINITE


def kind_of(parameter_name: str) -> str:
    """``lora_A``, ``lora_B``, ``lora_router`` ...: what a parameter is, from its name."""
    parts = [part for part in parameter_name.split(".") if part.startswith(("lora_", "internal_"))]
    return parts[-1] if parts else parameter_name.rsplit(".", 1)[-1]


def gradient_errors(built: Built, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the gradients by kind of parameter, over all layers.

    Raises:
        WrongResultError: if a parameter has a gradient in one way only.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, parameter in built.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if (parameter.grad is None) != (name not in expected):
            raise WrongResultError(f"{name} has {'no' if parameter.grad is None else 'a'} gradient")
        if parameter.grad is not None:
            pairs.setdefault(kind_of(name), []).append((parameter.grad, expected[name]))
    return {
        kind: relative_error(
            *(torch.cat([t.flatten().double() for t in ts]) for ts in zip(*found, strict=True))
        )
        for kind, found in pairs.items()
    }


def is_routed(variant: Variant) -> bool:
    """Whether routers of moelora choose experts for it."""
    return variant.kind == "moelora" and variant.detail not in {"given", "fixed"}


def is_judged_in_float32(variant: Variant, conditions: Conditions) -> bool:
    """Whether a step's result cannot be told from a wrong one in the model's own dtype.

    Where scores are nearly equal, rounding chooses the expert, and everything after it differs:

    - what a compiled model chose is not told, and it rounds otherwise than the same model that is
      not compiled;
    - attention over a static cache rounds otherwise in each run (logits of the model without any
      adapter were up to 5e-3 apart when one CUDA graph was replayed), and of few decoded tokens one
      that went elsewhere is a large part.
    """
    by_chance = conditions.mode in COMPILED or conditions.kind == "decode"
    told = conditions.kind == "generate" or conditions.dtype == "fp32"
    return is_routed(variant) and by_chance and not told


class Record(NamedTuple):
    """The routing of one forward by layer, and its output if that is a tensor."""

    routing: dict[str, Routing]
    output: Tensor | None


def record_of(variant: Variant, built: Built, step: Step, conditions: Conditions) -> Record:
    """The routing of one forward, and what it gave; empty where moelora does not route.

    Args:
        variant: what is built.
        built: its model.
        step: runs one forward as it is.
        conditions: of the step that the record is for. Recorded in a CUDA graph, matrix products
            and attention may round otherwise than launched one by one, so the record is made in
            one.
    """
    if not is_routed(variant):
        return Record({}, None)
    with record_routing(built.model) as record:
        if conditions.mode == "graph":
            step = capture(step)
        step.prepare()
        output = step.run()
    # what lies in a graph's memory goes with it
    routing = {
        name: Routing(*(getattr(routing, part.name).clone() for part in fields(routing)))
        for name, routing in record.routing.items()
    }
    return Record(routing, output.clone() if isinstance(output, Tensor) else None)


@dataclass(frozen=True)
class Expected:
    """What a step has to give.

    Attributes:
        value: the loss or the logits; None where only a finite value is asked for.
        gradients: by parameter name.
        recorded: the error of a run whose decisions the slow way took over, where that cannot be
            asked of the step itself.
    """

    value: Tensor | None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    recorded: float | None = None


def expected_of(variant: Variant, built: Built, conditions: Conditions) -> Expected:
    """Compute a step's result the slow way. Call it before the step is recorded or compiled."""
    if variant.kind == "base" or conditions.kind == "generate":
        return Expected(None)
    in_float32 = is_judged_in_float32(variant, conditions)
    if in_float32 and conditions.mode in COMPILED:
        return Expected(None)
    if conditions.kind in {"train", "leak"}:
        return _expected_training(variant, built, conditions)
    plain = Conditions(conditions.kind, conditions.shape, conditions.batch, conditions.tokens)
    eager = make_step(built, plain)
    eager.prepare()
    # once as it is: Arrow makes its prototypes in its first forward
    eager.run()
    eager.prepare()
    record = record_of(variant, built, eager, conditions)
    with slow_layers(variant, built, record.routing):
        eager.prepare()
        slow = eager.run().clone()
    if in_float32 and record.output is not None:
        return Expected(None, recorded=relative_error(record.output, slow))
    return Expected(slow)


def _expected_training(variant: Variant, built: Built, conditions: Conditions) -> Expected:
    inputs = training_inputs(built, conditions, next(built.model.parameters()).device)
    record = record_of(variant, built, Step(lambda: built.call(**inputs)), conditions)
    if conditions.checkpointing:
        built.model.gradient_checkpointing_disable()
    _forget_gradients(built)
    with slow_layers(variant, built, record.routing) as run:
        loss = slow_loss(run, built.call(**inputs).loss)
        (loss * loss_scale(conditions)).backward()
    expected = {
        name: parameter.grad
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    _forget_gradients(built)
    if conditions.checkpointing:
        checkpoint(built, conditions)
    return Expected(loss.detach(), expected)


def _forget_gradients(built: Built) -> None:
    for parameter in built.trainable:
        parameter.grad = None


def check(
    variant: Variant, built: Built, conditions: Conditions, step: Step, expected: Expected
) -> dict[str, float]:
    """Hold one run of the step that will be timed against what it has to give.

    Returns:
        The relative errors: of the loss or the logits, and of the gradients by kind.

    Raises:
        WrongResultError: if one is beyond its tolerance, or ``generate`` stopped early.
    """
    step.prepare()
    value = step.run()
    if not conditions.optimizer:
        # the first forward finds out which layers share their input; later ones use it
        step.prepare()
        value = step.run()
    if conditions.kind == "generate":
        length = conditions.tokens + step.repeats
        if value.shape[-1] != length:
            raise WrongResultError(f"generate made {value.shape[-1]} tokens, not {length}")
        return {}
    name = "loss" if conditions.kind in {"train", "leak"} else "logits"
    if expected.value is None:
        errors = {name: 0.0 if bool(value.isfinite().all()) else INFINITE}
        if expected.recorded is not None:
            errors[f"{name} of a recorded run"] = expected.recorded
        return judge(errors, variant, conditions)
    errors = {name: relative_error(value, expected.value)}
    if name == "loss":
        for kind, error in gradient_errors(built, expected.gradients).items():
            if kind not in _NOT_COMPARED.get(variant.detail, ()):
                errors[f"gradient of {kind}"] = error
    return judge(errors, variant, conditions)


def judge(errors: dict[str, float], variant: Variant, conditions: Conditions) -> dict[str, float]:
    """Return ``errors`` if all are within the tolerance of the conditions' dtype.

    Raises:
        WrongResultError: naming those that are not.
    """
    of_values, of_gradients = TOLERANCES[conditions.dtype]
    anew = variant.kind in _CHOOSES_ANEW and conditions.dtype != "fp32"
    factor = _ANEW_FACTOR if anew else 1
    allowed = {
        name: factor * (of_gradients if name.startswith("gradient") else of_values)
        for name in errors
    }
    wrong = [
        f"{name}: relative error {error:.2e}, allowed {allowed[name]:.0e}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
    if wrong:
        raise WrongResultError("; ".join(wrong))
    return errors
