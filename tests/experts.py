"""Expert managers over tiny models, and what of them must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from moelora import ExpertManager, MoELoraConfig
from tests.models import HIDDEN, gpt2_config, llama_config, randomise, token_ids


class Plain(nn.Module):
    """Two layers and no config: what no architecture table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


#: Base models, each with an input and its target modules (None: PEFT's choice).
BASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], list[str] | None]] = {
    "Llama": (lambda: LlamaForCausalLM(llama_config()), token_ids, None),
    "GPT-2": (lambda: GPT2LMHeadModel(gpt2_config()), token_ids, None),
    "plain module": (Plain, lambda: torch.randn(2, 5, HIDDEN), ["first", "second"]),
}


def routing_config(**changes: Any) -> MoELoraConfig:
    """Experts with router rows of their own, two per token, nothing random in training."""
    fields = {
        "num_experts": 1,
        "joins_mixture": True,
        "top_k_experts": 2,
        "expert_capacity_factor": None,
    }
    return MoELoraConfig(**{**fields, **changes})


def manager(
    number: int = 3, *, base: str = "Llama", routed: bool = False, **fields: Any
) -> ExpertManager:
    """A manager of experts that are all different and all active, of ranks 2, 3, 4 ..."""
    make, _, targets = BASES[base]
    torch.manual_seed(0)
    experts = ExpertManager(
        make(), target_modules=targets, routing=routing_config() if routed else None, **fields
    )
    for rank in range(2, number + 2):
        experts.create_expert(r=rank)
    if number:
        randomise(experts.model)
        experts.model.eval()
    return experts


def output(experts: ExpertManager, inputs: Tensor, **kwargs: Any) -> Tensor:
    """What the model returns, without a graph."""
    with torch.no_grad():
        result = experts.model(inputs, **kwargs)
    return result if isinstance(result, Tensor) else result.logits  # type: ignore[no-any-return]


def tensors_of(experts: ExpertManager, name: str) -> dict[str, Tensor]:
    """A copy of every tensor of one expert, router rows included."""
    return {
        key: tensor.detach().clone()
        for key, tensor in experts.model.state_dict().items()
        if f".{name}." in key or key.endswith(f".{name}")
    }


def train(
    experts: ExpertManager,
    optimizer: Any,
    inputs: Tensor,
    *,
    steps: int = 1,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Some optimiser steps towards smaller outputs, the router's own weights included."""
    experts.model.train()
    for _ in range(steps):
        result = experts.model(inputs, **kwargs)
        tensor = result if isinstance(result, Tensor) else result.logits
        value = tensor.pow(2).mean() if loss is None else loss(result)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    experts.model.eval()


def snapshot(optimizer: Any) -> dict[int, dict[str, Any]]:
    """A copy of an optimiser's state, by the identity of the parameters."""
    return {id(p): copy.deepcopy(dict(state)) for p, state in optimizer.state.items()}
