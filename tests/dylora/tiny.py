"""Small base models for DyLoRA-MoE, and a data set that can be learnt in ten steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 67
HIDDEN = 32
_IDS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
_DECODER = {
    **_IDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def gpt2() -> PreTrainedModel:
    """Conv1D layers, tied embeddings."""
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 512}
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**_IDS, **sizes, **rates))


def llama() -> PreTrainedModel:
    """Untied."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_DECODER))


def gemma() -> PreTrainedModel:
    """Tied embeddings, scaled inputs, sliding windows."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**_DECODER, sliding_window=8))


BASES = {"gpt2": gpt2, "llama": llama, "gemma": gemma}


def token_ids(rows: int = 2, length: int = 12, *, seed: int = 2) -> Tensor:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def counting(samples: int, length: int = 12, *, first: int = 2, seed: int = 0) -> Tensor:
    """Texts that count round through the eight tokens from ``first`` on: a skill for each."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 8, (samples, 1), generator=generator)
    return (start + torch.arange(length)) % 8 + first


def randomise(model: nn.Module, *, std: float = 0.2, seed: int = 1) -> None:
    """Draw all adapter tensors anew, since B starts at zero and routers near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=std, generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW over what is trainable."""
    return torch.optim.AdamW(trainable(model).values(), **{"lr": 1e-2, **options})
