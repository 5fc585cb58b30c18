"""The models that are measured: known shapes, built from their config with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_LINEARS = ("c_attn", "c_proj", "c_fc")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelShape:
    """A decoder by its sizes.

    Attributes:
        name: as in case names.
        family: ``Llama``, ``Qwen3`` or ``GPT2``: the prefix of transformers' classes.
        fields: arguments of its config.
        targets: the modules that get an adapter.
        blocks: the config's field that holds the number of blocks.
    """

    name: str
    family: str
    fields: dict[str, Any]
    targets: tuple[str, ...] = LLAMA_LINEARS
    blocks: str = "num_hidden_layers"

    def cut(self, name: str, *, layers: int, vocabulary: int) -> ModelShape:
        """The same blocks, fewer of them, with a small head: what adapters cost per block."""
        return replace(
            self, name=name, fields={**self.fields, self.blocks: layers, "vocab_size": vocabulary}
        )

    def build(self, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """A frozen model with random weights, the same for the same shape."""
        config = getattr(transformers, f"{self.family}Config")(**self.fields)
        name = "GPT2LMHeadModel" if self.family == "GPT2" else f"{self.family}ForCausalLM"
        model_class: Any = getattr(transformers, name)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: Any = model_class(config)
        finally:
            torch.set_default_dtype(before)
        # no cast: the buffers of rotary embeddings stay float32, as in a loaded model
        frozen: PreTrainedModel = model.to(device).requires_grad_(False)
        return frozen


def _llama(name: str, *, tied: bool, **fields: Any) -> ModelShape:
    common = {"max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": None}
    return ModelShape(name, "Llama", {**common, "tie_word_embeddings": tied, **fields})


_LLAMA_1B = _llama(
    "llama-1b",
    tied=True,
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rope_theta=500000.0,
)
_LLAMA_8B = _llama(
    "llama-8b",
    tied=False,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
)
_SMOLLM2 = _llama(
    "smollm2-135m",
    tied=True,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
_TINY = _llama(
    "tiny",
    tied=True,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
_QWEN3 = ModelShape(
    "qwen3-0.6b",
    "Qwen3",
    {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
_GPT2_RATES = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_GPT2 = ModelShape(
    "gpt2",
    "GPT2",
    {**_GPT2_RATES, "n_positions": 1024, "bos_token_id": None, "eos_token_id": None},
    targets=GPT2_LINEARS,
    blocks="n_layer",
)
_TINY_GPT2 = replace(
    _GPT2,
    name="tiny-gpt2",
    fields={**_GPT2.fields, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
)

SHAPES = {
    shape.name: shape
    for shape in (
        _LLAMA_1B,
        # all blocks, but no loss over 128 256 words, which costs every variant the same
        _LLAMA_1B.cut("llama-1b-blocks", layers=16, vocabulary=1024),
        _LLAMA_1B.cut("llama-1b-4-layers", layers=4, vocabulary=1024),
        _LLAMA_8B,
        _LLAMA_8B.cut("llama-8b-6-layers", layers=6, vocabulary=1024),
        _QWEN3,
        _GPT2,
        _SMOLLM2,
        _TINY,
        _TINY_GPT2,
    )
}


@dataclass
class BaseModels:
    """Builds each base model once; every variant gets modules of its own over the same weights."""

    device: torch.device
    _key: tuple[str, str] | None = None
    _model: PreTrainedModel | None = field(default=None, repr=False)

    def of(self, shape: str, dtype: str) -> PreTrainedModel:
        """The model whose tensors all its copies share."""
        if self._key == (shape, dtype) and self._model is not None:
            return self._model
        # free the last one first: two may not fit
        self._key = self._model = None
        self._model = SHAPES[shape].build(device=self.device, dtype=DTYPES[dtype])
        self._key = (shape, dtype)
        return self._model

    def copy_of(self, shape: str, dtype: str) -> PreTrainedModel:
        """New modules that share their tensors with all other copies of this model."""
        model = self.of(shape, dtype)
        shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
        return copy.deepcopy(model, shared)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """All LoRA layers of a model by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def unique_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors: dict[int, Tensor] = {
        id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
