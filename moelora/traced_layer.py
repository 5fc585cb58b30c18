"""Layers routed in one op inside a trace of ``torch.compile``, by Triton's kernels.

What ``routed_layer.py`` does where nothing is traced, without what a trace cannot keep: plans, and
what earlier forwards showed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moelora.decision import MixtureSpec
from moelora.fused_layer import (
    changes_operations,
    frozen_linear,
    is_linear_mixture,
)
from moelora.ops import Member, RoutedOutput, explain
from moelora.ops.routed_triton import MAX_MEMBERS
from moelora.ops.traced import routed_linears_traced, version_of
from moelora.routed_layer import (
    beside_base,
    keeps_graph,
    looks_on,
    mixture_alone,
    options_of,
    reported,
)
from moelora.scope import Frame, LayerBinding

# torch 2.7: the first that tells of exports
_IS_EXPORTING = getattr(torch.compiler, "is_exporting", None)


class _Found(NamedTuple):
    """A layer that can be routed in one operator.

    Attributes:
        spec: of its mixture.
        member: what the operator is told of it.
        dropout: at work, or None.
        scaling: of its adapter.
        is_sparse: whether computing with the chosen experts only is faster.
    """

    spec: MixtureSpec
    member: Member
    dropout: nn.Module | None
    scaling: float
    is_sparse: bool

    def is_like(self, other: "_Found") -> bool:
        """Whether one operator can compute both, for the same input."""
        mine, theirs = self.member, other.member
        return (
            self.spec == other.spec
            and self.scaling == other.scaling
            and (self.dropout is None) == (other.dropout is None)
            and (mine.base_weight is None) == (theirs.base_weight is None)
            and (mine.mature is None) == (theirs.mature is None)
            and mine.lora_a.shape == theirs.lora_a.shape
            and mine.lora_a.dtype == theirs.lora_a.dtype
            and mine.lora_b.dtype == theirs.lora_b.dtype
            and mine.router.dtype == theirs.router.dtype
        )


def traced_forward(
    layer: Any,
    x: Tensor,
    binding: LayerBinding | None,
    frame: Frame | None,
    *,
    token_mask: Callable[[], Tensor | None],
) -> Tensor | None:
    """The layer's output by the kernels, its decision reported; None where they cannot run.

    Args:
        layer: a LoRA layer.
        x: its input.
        binding: the layer's place in its model.
        frame: the current forward.
        token_mask: tells which of the layer's tokens are real, ``(tokens,)``, or None.
    """
    if changes_operations(x) or keeps_graph(layer, frame):
        return None
    found = _find(layer, x)
    if found is None:
        return None
    mask = token_mask()
    result = _taken(x, binding, frame)
    if result is None:
        result = _computed(found, layer, x, binding, frame, mask)
    output = reported(
        result, found.spec, binding, frame, token_mask=mask,
        router_is_trainable=found.member.router.requires_grad,
    )  # fmt: skip
    return output if found.member.base_weight is not None else beside_base(layer, x, output)


def _find(layer: Any, x: Tensor) -> _Found | None:
    """What the operator computes of a layer, if it can."""
    mixture = mixture_alone(layer)
    if mixture is None:
        return None
    adapter, spec = mixture
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    router, dropout = layer.lora_router[adapter], layer.lora_dropout[adapter]
    parameters = (lora_a.weight, lora_b.weight, router.weight)
    runs, is_sparse = _choice(
        x.device.type, x.dtype, spec.num_experts, min(spec.top_k, spec.num_experts),
        lora_a.weight.shape[0] // spec.num_experts, layer.__dict__.get("_moelora_backend", "auto"),
    )  # fmt: skip
    if not runs or not is_linear_mixture(layer, x, adapter):
        return None
    # a scaling that is a tensor, as for swapping adapters of a compiled model, is not fixed
    scaling = layer.scaling[adapter]
    if isinstance(scaling, Tensor):
        return None
    if not all(parameter.is_contiguous() for parameter in parameters):
        return None
    base = frozen_linear(layer, x, [adapter], drops=True)
    drops = type(dropout) is not nn.Identity and dropout.training
    weight, bias = (None, None) if base is None else base[:2]
    is_conv1d = base is not None and base.is_conv1d
    member = Member(weight, bias, *parameters, router.mature, is_conv1d)
    return _Found(spec, member, dropout if drops else None, scaling, is_sparse)


def _computed(
    found: _Found,
    layer: Any,
    x: Tensor,
    binding: LayerBinding | None,
    frame: Frame | None,
    mask: Tensor | None,
) -> RoutedOutput:
    """The layer's result; those of layers behind it in its group are kept for them."""
    spec, training = found.spec, layer.training
    tape = None if frame is None or binding is None else frame.tape
    takes = tape is not None and tape.takes(training=training, coefficient=spec.aux_loss_coef)
    if frame is None and binding is not None and training and torch.is_grad_enabled():
        # a block that its model recomputes by itself: it has to save what its forward saved
        takes = spec.aux_loss_coef != 0
    options = options_of(spec, found.scaling, training=training, takes=takes)
    others = _others(found, layer, x, binding, frame)
    members = []
    for each in (found, *(other for _, other in others)):
        dropped = None if each.dropout is None else each.dropout(x)
        members.append(each.member._replace(dropped=dropped))
    countable = mask is None or options.capacity_factor is not None
    is_dense = found.dropout is not None or found.member.mature is not None or not countable
    results = routed_linears_traced(
        x, members, options=options, token_mask=mask, is_sparse=found.is_sparse and not is_dense,
        record=looks_on(binding, tape if takes else None),
    )  # fmt: skip
    if frame is not None and frame.traced is not None and others:
        version = version_of(x)
        for (name, _), result in zip(others, results[1:], strict=True):
            frame.traced.ready[name] = x, version, result
    return results[0]


def _others(
    found: _Found, layer: Any, x: Tensor, binding: LayerBinding | None, frame: Frame | None
) -> list[tuple[str, _Found]]:
    """The layers behind this one in its group, as far as one operator can compute them with it.

    In inference only: a model that checkpoints its blocks by itself recomputes each layer alone,
    and a trace cannot tell whether it will.
    """
    others: list[tuple[str, _Found]] = []
    if binding is None or frame is None or frame.traced is None:
        return others
    if layer.training or torch.is_grad_enabled():
        return others
    is_behind = False
    for name, other in frame.traced.groups.get(binding.name, ()):
        if not is_behind:
            is_behind = other is layer
            continue
        # a hook before a layer may change what the layer is
        if other.training != layer.training or other._forward_pre_hooks:
            return others
        each = _find(other, x)
        if each is None or not found.is_like(each):
            return others
        others.append((name, each))
        if len(others) + 1 == MAX_MEMBERS:
            return others
    return others


def _taken(x: Tensor, binding: LayerBinding | None, frame: Frame | None) -> RoutedOutput | None:
    """The layer's result, if it was computed with another's for this very input."""
    if binding is None or frame is None or frame.traced is None or torch.is_grad_enabled():
        return None
    ready = frame.traced.ready.pop(binding.name, None)
    if ready is None or ready[0] is not x or ready[1] != version_of(x):
        return None
    result: RoutedOutput = ready[2]
    return result


@torch.compiler.assume_constant_result
def _choice(
    device_type: str, dtype: torch.dtype, num_experts: int, top_k: int, rank: int, backend: str
) -> tuple[bool, bool]:
    """Whether the kernels run, and compute with the chosen experts only.

    An exported program should hold PyTorch's operations only. It is asked here, where nothing is
    traced: for a trace of torch 2.11 every compilation is one.
    """
    if _IS_EXPORTING is None or _IS_EXPORTING():
        return False, False
    choice = explain(
        device=device_type, dtype=dtype, num_experts=num_experts, top_k=top_k, rank=rank,
        backend=backend,
    )  # fmt: skip
    return choice.backend == "triton", choice.is_sparse
