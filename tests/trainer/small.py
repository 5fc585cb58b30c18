"""A tokenizer, texts and TRL trainers, small enough to run many of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.lm import VOCABULARY

SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; as many words as the tiny models have tokens."""
    words = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(length: int, *, seed: int) -> str:
    """Random words, each with a space in front."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, VOCABULARY - len(SPECIAL), (length,), generator=generator)
    return "".join(f" w{number}" for number in drawn.tolist())


def completions(rows: int = 4) -> Dataset:
    """Prompts with a completion, of unequal lengths."""
    return Dataset.from_list(
        [
            {"prompt": text(2 + i % 3, seed=i), "completion": text(3 + i % 4, seed=50 + i)}
            for i in range(rows)
        ]
    )


def preferences(rows: int = 4) -> Dataset:
    """Prompts with a chosen and a rejected completion."""
    return Dataset.from_list(
        [
            {
                "prompt": text(2 + i % 3, seed=i),
                "chosen": text(3 + i % 2, seed=50 + i),
                "rejected": text(2 + i % 4, seed=80 + i),
            }
            for i in range(rows)
        ]
    )


def judged(rows: int = 4) -> Dataset:
    """Prompts with a completion that is good or not."""
    return Dataset.from_list(
        [
            {
                "prompt": text(2 + i % 3, seed=i),
                "completion": text(3 + i % 2, seed=50 + i),
                "label": i % 2 == 0,
            }
            for i in range(rows)
        ]
    )


def even_words(completions: list[str], **_: Any) -> list[float]:
    """A reward without a model: how many words have an even number."""
    return [
        float(sum(w.startswith("w") and int(w[1:]) % 2 == 0 for w in c.split())) + len(c) / 100
        for c in completions
    ]


_KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, completions, {}),
    "dpo": (DPOTrainer, DPOConfig, preferences, {}),
    "kto": (KTOTrainer, KTOConfig, judged, {"per_device_train_batch_size": 2}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        completions,
        {"num_generations": 2, "max_completion_length": 3, "per_device_train_batch_size": 2},
    ),
}


def trl_trainer(
    kind: str,
    model: Any,
    folder: Path,
    *,
    dataset: Any = None,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    eval_dataset: Any = None,
    **fields: Any,
) -> Any:
    """A TRL trainer for one step on the CPU."""
    trainer, config, make, own = _KINDS[kind]
    base = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    extra = {"reward_funcs": even_words} if kind == "grpo" else {}
    return trainer(
        model=model,
        args=config(**{**base, **own, **fields}),
        train_dataset=make() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
        **extra,
    )


class SeenBatches:
    """What the model was called with in training steps, where it trains."""

    def __init__(self, model: PeftModel) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.base = model.get_base_model()
        self.hook = self.base.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)

    def _keep(self, base: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if base.training and torch.is_grad_enabled():
            names = ("input_ids", "attention_mask", "position_ids")
            self.batches.append({n: kwargs[n] for n in names if kwargs.get(n) is not None})
