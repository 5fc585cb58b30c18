"""Plain experts as one mixture: what a single pass runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moelora.config import MoELoraConfig
from moelora.validation.candidate import lora_layers


def why_not_stackable(model: Any, experts: Sequence[str]) -> str | None:
    """Say what keeps experts from being one mixture; None if nothing does.

    Args:
        model: a PEFT model with the experts as plain LoRA adapters.
        experts: their names.
    """
    for name in experts:
        for layer_name, layer in lora_layers(model).items():
            if name in layer.lora_variant:
                return f"expert {name!r} is of another kind than plain LoRA (in {layer_name})"
            if name not in layer.lora_A:
                if name in layer.lora_embedding_A:
                    return f"expert {name!r} adapts an embedding ({layer_name})"
                continue
            a, b = layer.lora_A[name], layer.lora_B[name]
            if type(a) is not nn.Linear or b.bias is not None:
                return f"expert {name!r} adapts a convolution or a bias (in {layer_name})"
    return None


def stack_experts(model: Any, experts: Sequence[str], name: str) -> None:
    """Add a mixture of all experts, routed in each layer, whose routers are newly drawn.

    Ranks may differ: shorter experts are filled with zeros, and each one's scaling goes into its B.
    A layer that an expert does not adapt has zeros for it.

    Args:
        model: a PEFT model with the experts as plain LoRA adapters.
        experts: their names, in routing order; one may occur several times.
        name: of the new adapter.
    """
    layers = {
        layer_name.removeprefix("base_model.model."): layer
        for layer_name, layer in lora_layers(model).items()
        if any(expert in layer.lora_A for expert in experts)
    }
    ranks = [layer.r[e] for layer in layers.values() for e in experts if e in layer.lora_A]
    rank = max(ranks)
    first = model.peft_config[experts[0]]
    config = MoELoraConfig(
        task_type=first.task_type,
        r=rank,
        lora_alpha=rank,
        num_experts=len(experts),
        top_k_experts=min(2, len(experts)),
        router_type="learned",
        expert_capacity_factor=None,
        target_modules=sorted(layers),
        fan_in_fan_out=first.fan_in_fan_out,
    )
    model.add_adapter(name, config)
    with torch.no_grad():
        for layer in layers.values():
            _fill(layer, experts, name, rank)
    model.eval()


def _fill(layer: Any, experts: Sequence[str], name: str, rank: int) -> None:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a.zero_()
    b.zero_()
    for index, expert in enumerate(experts):
        if expert not in layer.lora_A:
            continue
        own, start = layer.r[expert], index * rank
        a[start : start + own] = layer.lora_A[expert].weight
        b[:, start : start + own] = layer.lora_B[expert].weight * layer.scaling[expert]
