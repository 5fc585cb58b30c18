"""The base models of the architecture table, each built small from its config, and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY, HIDDEN, ROWS, TOKENS, CLASSES = 61, 32, 3, 7, 3
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        title: what the row is called.
        make: builds the base model; the same weights every time.
        batch: a training batch; ``labels`` are in it.
        task: PEFT's task type.
        generates: whether the model generates; else it predicts.
        is_encoder_decoder: whether an encoder reads the input.
        fields: fields of the mixture's config beside ``target_modules="all-linear"``.
        beside_blocks: linears that no router of several layers can serve.
        scopes: router scopes beside ``"module"``: None where they work, else the refusal's start.
    """

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    task: str | None
    generates: bool = True
    is_encoder_decoder: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    beside_blocks: list[str] | None = None
    scopes: dict[str, str | None] = field(default_factory=lambda: {"layer": None, "model": None})


class Plain(nn.Module):
    """A module of nobody's: no config, no ``generate``, a tensor as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, HIDDEN)
        self.second = nn.Sequential(nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(features))
        output: Tensor = self.last(hidden)
        return output


def _built(model: Callable[[Any], nn.Module], config: Callable[..., Any], **sizes: Any) -> Any:
    """A function that builds the same model every time."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return model(config(**sizes)) if sizes else model(config())

    return make


def _ids(rows: int, tokens: int, *, seed: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text() -> Batch:
    """Three rows, the last two padded on the left."""
    ids = _ids(ROWS, TOKENS, seed=1)
    mask = torch.ones_like(ids)
    for row in range(1, ROWS):
        ids[row, :row] = 0
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _pairs() -> Batch:
    return {**_text(), "labels": _ids(ROWS, 5, seed=2)}


def _classes() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def _text_classes() -> Batch:
    return {**_text(), "labels": _classes()}


def _images() -> Batch:
    images = torch.randn(ROWS, 3, 16, 16, generator=_generator(3))
    return {"pixel_values": images, "labels": _classes()}


def _sounds() -> Batch:
    features = torch.randn(ROWS, 8, 12, generator=_generator(4))
    return {"input_features": features, "labels": _ids(ROWS, 5, seed=5)}


def _numbers() -> Batch:
    return {
        "features": torch.randn(4 * ROWS, 5, generator=_generator(6)),
        "labels": _rows_classes(),
    }


def _rows_classes() -> Tensor:
    return torch.arange(4 * ROWS) % CLASSES


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1}

NO_HIDDEN_SIZE = "Plain has no config.hidden_size"
NO_BLOCK = "lies in no transformer block"
OTHER_TOKENS = "of an encoder-decoder model reads other tokens than the router of"

ARCHITECTURES = (
    Architecture("Llama", _built(LlamaForCausalLM, LlamaConfig, **_GROUPED), _text, "CAUSAL_LM"),
    Architecture(
        "Qwen3",
        _built(Qwen3ForCausalLM, Qwen3Config, **_GROUPED, head_dim=16),
        _text,
        "CAUSAL_LM",
    ),
    Architecture(
        "Gemma 3",
        _built(
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            **_GROUPED,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _text,
        "CAUSAL_LM",
    ),
    Architecture(
        "Mistral",
        _built(MistralForCausalLM, MistralConfig, **_GROUPED, sliding_window=4),
        _text,
        "CAUSAL_LM",
    ),
    Architecture("Phi", _built(PhiForCausalLM, PhiConfig, **_COMMON), _text, "CAUSAL_LM"),
    Architecture(
        "GPT-2 (`Conv1D`)",
        _built(
            GPT2LMHeadModel,
            GPT2Config,
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        ),
        _text,
        "CAUSAL_LM",
    ),
    Architecture(
        "GPT-NeoX", _built(GPTNeoXForCausalLM, GPTNeoXConfig, **_COMMON), _text, "CAUSAL_LM"
    ),
    Architecture(
        "Mixtral (experts of its own)",
        _built(MixtralForCausalLM, MixtralConfig, **_GROUPED, num_local_experts=3),
        _text,
        "CAUSAL_LM",
    ),
    Architecture(
        "T5 (encoder-decoder)",
        _built(
            T5ForConditionalGeneration,
            T5Config,
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        ),
        _pairs,
        "SEQ_2_SEQ_LM",
        is_encoder_decoder=True,
        scopes={"layer": OTHER_TOKENS, "model": OTHER_TOKENS},
    ),
    Architecture(
        "Whisper (speech)",
        _built(
            WhisperForConditionalGeneration,
            WhisperConfig,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=6,
            max_target_positions=32,
            decoder_start_token_id=0,
            begin_suppress_tokens=None,
            init_std=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        ),
        _sounds,
        # PEFT's class for SEQ_2_SEQ_LM passes input_ids, which speech has none of
        None,
        is_encoder_decoder=True,
        scopes={"layer": OTHER_TOKENS, "model": OTHER_TOKENS},
    ),
    Architecture(
        "BERT (classification)",
        _built(BertForSequenceClassification, BertConfig, **_COMMON, num_labels=CLASSES),
        _text_classes,
        "SEQ_CLS",
        generates=False,
        beside_blocks=["pooler.dense"],
    ),
    Architecture(
        "ViT (images)",
        _built(
            ViTForImageClassification,
            ViTConfig,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        ),
        _images,
        None,
        generates=False,
        fields={"modules_to_save": ["classifier"]},
    ),
    Architecture(
        "a plain `nn.Module`",
        _built(lambda _: Plain(), dict),
        _numbers,
        None,
        generates=False,
        scopes={"layer": NO_BLOCK, "model": NO_HIDDEN_SIZE},
    ),
)
