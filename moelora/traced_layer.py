"""Layers routed in one op inside a trace of ``torch.compile``, by Triton's kernels.

What ``routed_layer.py`` does where nothing is traced, without what a trace cannot keep: plans, and
results that wait for the layers with the same input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moelora.fused_layer import (
    changes_operations,
    frozen_linear,
    is_linear_mixture,
)
from moelora.ops import Member, explain
from moelora.ops.traced import routed_linear_traced
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
    found = mixture_alone(layer)
    if found is None or changes_operations(x) or keeps_graph(layer, frame):
        return None
    adapter, spec = found
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
    if isinstance(layer.scaling[adapter], Tensor):
        return None
    if not all(parameter.is_contiguous() for parameter in parameters):
        return None
    base = frozen_linear(layer, x, [adapter], drops=True)
    training = layer.training
    tape = None if frame is None or binding is None else frame.tape
    takes = tape is not None and tape.takes(training=training, coefficient=spec.aux_loss_coef)
    if frame is None and binding is not None and training and torch.is_grad_enabled():
        # a block that its model recomputes by itself: it has to save what its forward saved
        takes = spec.aux_loss_coef != 0
    options = options_of(spec, layer.scaling[adapter], training=training, takes=takes)
    mask = token_mask()
    countable = mask is None or options.capacity_factor is not None
    drops = type(dropout) is not torch.nn.Identity and dropout.training
    weight, bias = (None, None) if base is None else base[:2]
    member = Member(
        weight, bias, *parameters, router.mature,
        base is not None and base.is_conv1d, dropout(x) if drops else None,
    )  # fmt: skip
    result = routed_linear_traced(
        x, member, options=options, token_mask=mask,
        is_sparse=is_sparse and countable and not drops and router.mature is None,
        record=looks_on(binding, tape if takes else None),
    )  # fmt: skip
    output = reported(
        result, spec, binding, frame, token_mask=mask,
        router_is_trainable=router.weight.requires_grad,
    )  # fmt: skip
    return output if base is not None else beside_base(layer, x, output)


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
