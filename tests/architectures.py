"""Whole tiny models of every kind that PEFT wraps, with plain adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from tests.models import (
    bert_config,
    gpt2_config,
    llama_config,
    lora_model,
    opt_config,
    randomise,
    t5_config,
    token_ids,
)

ROWS, TOKENS, EXPERTS = 3, 5, 3


@dataclass(frozen=True)
class Architecture:
    """A base model, what to adapt in it, and the name of the output to compare."""

    make: Callable[[], nn.Module]
    targets: list[str]
    task: TaskType | None
    output: str
    per_token: bool = True
    # PEFT saves a classification head per adapter and so allows only one active adapter
    experts: int = EXPERTS
    extra: dict[str, Any] = field(default_factory=dict)

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        batch = {"input_ids": token_ids(ROWS, TOKENS)}
        if "decoder_tokens" in self.extra:
            batch["decoder_input_ids"] = token_ids(ROWS, self.extra["decoder_tokens"])
        return batch


ATTENTION = ["query", "value", "dense"]
ARCHITECTURES = {
    "causal LM": Architecture(
        lambda: LlamaForCausalLM(llama_config()),
        ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        TaskType.CAUSAL_LM,
        "logits",
    ),
    "causal LM of Conv1D layers": Architecture(
        lambda: GPT2LMHeadModel(gpt2_config()), ["c_attn", "c_proj"], TaskType.CAUSAL_LM, "logits"
    ),
    "flattened tokens": Architecture(
        lambda: OPTForCausalLM(opt_config()), ["fc1", "fc2", "q_proj"], TaskType.CAUSAL_LM, "logits"
    ),
    "seq2seq": Architecture(
        lambda: T5ForConditionalGeneration(t5_config()),
        ["q", "k", "v", "o", "wi", "wo"],
        TaskType.SEQ_2_SEQ_LM,
        "logits",
        per_token=False,
        extra={"decoder_tokens": 4},
    ),
    "seq2seq of equal lengths": Architecture(
        lambda: T5ForConditionalGeneration(t5_config()),
        ["q", "v"],
        TaskType.SEQ_2_SEQ_LM,
        "logits",
        per_token=False,
        extra={"decoder_tokens": TOKENS},
    ),
    "sequence classification": Architecture(
        lambda: BertForSequenceClassification(bert_config()),
        ["query", "value"],
        TaskType.SEQ_CLS,
        "logits",
        experts=1,
    ),
    "token classification": Architecture(
        lambda: BertForTokenClassification(bert_config()),
        ["query", "value"],
        TaskType.TOKEN_CLS,
        "logits",
        experts=1,
    ),
    "question answering": Architecture(
        lambda: BertForQuestionAnswering(bert_config(num_labels=2)),
        ATTENTION,
        TaskType.QUESTION_ANS,
        "start_logits",
        experts=1,
    ),
    "feature extraction": Architecture(
        lambda: BertModel(bert_config(), add_pooling_layer=False),
        ATTENTION,
        TaskType.FEATURE_EXTRACTION,
        "last_hidden_state",
    ),
    "no task type": Architecture(
        lambda: LlamaForCausalLM(llama_config()), ["q_proj", "up_proj"], None, "logits"
    ),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name: str) -> PeftModel:
    """Plain adapters of unequal rank and alpha over a float64 model, all active."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = architecture.make().double()
    configs = [
        LoraConfig(
            r=r, lora_alpha=alpha, target_modules=architecture.targets, task_type=architecture.task
        )
        for r, alpha in ((2, 3), (3, 1), (1, 2))
    ]
    model = lora_model(base, configs[: architecture.experts])
    randomise(model, std=0.3)
    return model.eval()


def run(name: str, model: nn.Module, **kwargs: Any) -> Tensor:
    output = model(**ARCHITECTURES[name].batch(), **kwargs)
    value: Tensor = getattr(output, ARCHITECTURES[name].output)
    return value


def random_weights(name: str, *lead: int) -> Tensor:
    return torch.randn(*lead, ARCHITECTURES[name].experts, dtype=torch.float64)
