"""Plain LoRA folders for tests that compose, export and merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.lm import lora_config, perturb, tiny_llama

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_lora(
    folder: Path, *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any
) -> PeftModel:
    """Save a random LoRA of the tiny Llama; the model that has it is returned, in eval mode."""
    model = get_peft_model(
        tiny_llama(dtype=dtype), lora_config(**fields), autocast_adapter_dtype=False
    )
    perturb(model, seed=seed)
    model.save_pretrained(folder)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of an adapter's config."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of an adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
