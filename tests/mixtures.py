"""Layers that hold routed mixtures, and the formula for them in loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from moelora import MoELoraConfig
from tests.models import LAYER_KINDS, Block, activate, one_layer, randomise
from tests.reference import experts_of, mixture_reference, routing_reference

#: Kinds of layers that can hold a mixture.
NOT_GROUPED = [name for name in LAYER_KINDS if name != "Conv2d with groups"]


def moe_config(**changes: Any) -> MoELoraConfig:
    """Three experts of rank 2 on ``Block.layer``, two per token, no capacity limit."""
    fields = {
        "r": 2,
        "lora_alpha": 3,
        "num_experts": 3,
        "target_modules": ["layer"],
        "expert_capacity_factor": None,
        "router_type": "learned",
    }
    return MoELoraConfig(**{**fields, **changes})


def moe_model(*configs: LoraConfig, kind: str = "Linear", dtype: Any = torch.float64) -> PeftModel:
    """One layer with these adapters, all active, every tensor drawn anew."""
    model = get_peft_model(Block(LAYER_KINDS[kind].make()).to(dtype), configs[0], "e0")
    for number, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{number}", config)
    activate(model, [f"e{number}" for number in range(len(configs))])
    randomise(model)
    return model.eval()


def draw_input(kind: str = "Linear", rows: int = 2, tokens: int = 3) -> Tensor:
    x = LAYER_KINDS[kind].draw(rows, tokens)
    return x.double().requires_grad_() if x.is_floating_point() else x


def logits_by_hand(layer: Any, adapter: str, x: Tensor, temperature: float) -> Tensor:
    """Router logits from the router's tensors, divided by the temperature."""
    router = layer.lora_router[adapter]
    if isinstance(layer.base_layer, nn.Embedding):
        x = F.one_hot(x, layer.base_layer.num_embeddings).to(router.weight.dtype)
    if isinstance(layer.base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        x = x.flatten(2).mean(dim=-1)
    if router.hidden_weight is not None:
        x = F.silu(x @ router.hidden_weight.T)
    return x @ router.weight.T / temperature


def by_hand(model: PeftModel, x: Tensor, configs: Sequence[Any], weights: Tensor) -> Tensor:
    """The formula for all adapters together, with the given weights of all experts."""
    layer = one_layer(model)
    names = [f"e{number}" for number in range(len(configs))]
    numbers = [getattr(config, "num_experts", 1) for config in configs]
    return mixture_reference(layer.base_layer, experts_of(layer, names, numbers), x, weights)


def routed_by_hand(model: PeftModel, x: Tensor, config: MoELoraConfig) -> Tensor:
    logits = logits_by_hand(one_layer(model), "e0", x, config.router_temperature)
    flat = routing_reference(logits.flatten(0, -2), top_k=config.top_k_experts)
    return by_hand(model, x, [config], flat.reshape(logits.shape))
