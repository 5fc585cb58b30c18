"""Tiny models and adapters that several tests share. Everything is built, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jaxtyping
import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig, T5Config
from transformers.pytorch_utils import Conv1D

import moelora  # noqa: F401 - importing installs the plugin

VOCABULARY = 32


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Run without the type checks of the test run, as users do, to see moelora's own refusals."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


HIDDEN = 16


class Block(nn.Module):
    """One layer named ``layer``, so that adapters have a target; the forward takes keywords."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@dataclass(frozen=True)
class LayerKind:
    """A kind of base layer that PEFT adapts.

    Attributes:
        make: builds the base layer.
        draw: draws an input of so many rows and tokens (convolutions: rows and space).
        per_token: whether each token can have its own weights; else each sample has.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int, int], Tensor]
    per_token: bool


def _features(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, 6)


LAYER_KINDS = {
    "Linear": LayerKind(lambda: nn.Linear(6, 5), _features, True),
    "Linear without bias": LayerKind(lambda: nn.Linear(6, 5, bias=False), _features, True),
    "Conv1D": LayerKind(lambda: Conv1D(5, 6), _features, True),
    "Embedding": LayerKind(
        lambda: nn.Embedding(VOCABULARY, 5),
        lambda rows, tokens: torch.randint(0, VOCABULARY, (rows, tokens)),
        True,
    ),
    "Conv1d": LayerKind(
        lambda: nn.Conv1d(4, 6, 3, padding=1),
        lambda rows, size: torch.randn(rows, 4, size + 2),
        False,
    ),
    "Conv2d": LayerKind(
        lambda: nn.Conv2d(4, 6, 3, stride=2),
        lambda rows, size: torch.randn(rows, 4, size + 4, 5),
        False,
    ),
    "Conv2d with groups": LayerKind(
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda rows, size: torch.randn(rows, 4, size + 3, 4),
        False,
    ),
    "Conv3d": LayerKind(
        lambda: nn.Conv3d(4, 6, 2),
        lambda rows, size: torch.randn(rows, 4, size + 2, 3, 3),
        False,
    ),
}


def lora_config(**changes: Any) -> LoraConfig:
    """A plain LoRA of rank 2 on ``Block.layer`` whose B is not zero."""
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["layer"], "init_lora_weights": False}
    return LoraConfig(**{**fields, **changes})


def lora_model(
    base: nn.Module, configs: Sequence[LoraConfig], *, autocast_adapter_dtype: bool = True
) -> peft.PeftModel:
    """``base`` with one adapter per config, named ``e0``, ``e1`` ..., all active in that order."""
    model = get_peft_model(base, configs[0], "e0", autocast_adapter_dtype=autocast_adapter_dtype)
    for number, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{number}", config, autocast_adapter_dtype=autocast_adapter_dtype)
    activate(model, [f"e{number}" for number in range(len(configs))])
    return model


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make ``names`` the active adapters, in this order, and all of them trainable."""
    tuner = model if isinstance(model, LoraModel) else model.base_model
    tuner.set_adapter(list(names))


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """All adapted layers of a model."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def one_layer(model: nn.Module) -> LoraLayer:
    """The only adapted layer of a model."""
    (layer,) = lora_layers(model)
    return layer


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of all adapters, in a fixed order."""
    return [p for name, p in sorted(model.named_parameters()) if "lora_" in name]


def randomise(model: nn.Module, *, std: float = 0.5) -> None:
    """Draw every adapter tensor anew, so that no expert is zero and none equals another."""
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=std)


def project(output: Tensor) -> Tensor:
    """A fixed random projection of ``output`` to one number."""
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (output * probe.to(output.dtype)).sum()


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of :func:`project`; zeros where it does not depend on an input."""
    return list(torch.autograd.grad(project(output), inputs, materialize_grads=True))


# Transformers, built from their configs --------------------------------------------------------

_SIZES = {"vocab_size": VOCABULARY, "attn_implementation": "eager"}


def llama_config(**changes: Any) -> LlamaConfig:
    """Two blocks, two heads."""
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**_SIZES, **fields, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    """Two blocks of Conv1D layers."""
    fields = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2Config(**{**_SIZES, **fields, **rates, **changes})


def opt_config(**changes: Any) -> OPTConfig:
    """Two blocks, of which the feed-forward part was once given flattened tokens."""
    fields = {
        "hidden_size": HIDDEN,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "pad_token_id": 0,
    }
    return OPTConfig(**{**_SIZES, **fields, **changes})


def t5_config(**changes: Any) -> T5Config:
    """Encoder and decoder of two blocks each."""
    fields = {
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    return T5Config(**{**_SIZES, **fields, **changes})


def token_ids(rows: int = 2, tokens: int = 5) -> Tensor:
    """Token ids without padding."""
    return torch.randint(1, VOCABULARY, (rows, tokens))


def bert_config(**changes: Any) -> BertConfig:
    """Two encoder blocks, no dropout."""
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return BertConfig(**{**_SIZES, **fields, **changes})
