"""Tiny language models with mixtures, and how tests start Python anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moelora import MoELoraConfig

VOCABULARY = 61
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_llama(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: Any
) -> PreTrainedModel:
    """Two blocks of Llama; no special tokens, so that generation has a fixed length."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            **sizes,
        }
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_mixtral() -> PreTrainedModel:
    """A base model that has routers and an auxiliary loss of its own."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        router_aux_loss_coef=0.5,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    # float32: its grouped product knows no float64
    return MixtralForCausalLM(config)


def tiny_t5() -> PreTrainedModel:
    """An encoder and a decoder, whose sequences differ in length."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=1.0,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(torch.float64)


def mixture_config(**fields: Any) -> MoELoraConfig:
    """A sparse mixture for causal language models; ``fields`` choose otherwise."""
    return MoELoraConfig(
        **{
            "r": 2,
            "lora_alpha": 4,
            "num_experts": 3,
            "top_k_experts": 2,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            "router_type": "learned",
            **fields,
        }
    )


def mixture(base: nn.Module | None = None, *, name: str = "default", **fields: Any) -> PeftModel:
    """A mixture whose experts and routers are far from their initial values."""
    model = get_peft_model(
        tiny_llama() if base is None else base, mixture_config(**fields), adapter_name=name
    )
    perturb(model)
    return model


def lora_config(**fields: Any) -> LoraConfig:
    """A plain LoRA adapter beside mixtures."""
    return LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 4,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )


def two_loras(base: nn.Module | None = None) -> PeftModel:
    """Two plain LoRA adapters as experts, of unequal rank."""
    model = get_peft_model(base or tiny_llama(), lora_config(), adapter_name="first")
    model.add_adapter("second", lora_config(r=3))
    model.base_model.set_adapter(["first", "second"])
    perturb(model)
    return model


def explicit_weights(rows: int = 2, length: int = 7, experts: int = 2, *, seed: int = 3) -> Tensor:
    """Random weights per token, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, experts, generator=generator, dtype=torch.float64)


def gradients_of(model: nn.Module) -> list[Tensor | None]:
    """What backward left in ``.grad`` of all trainable parameters."""
    return [p.grad for p in trainable(model).values()]


def perturb(model: nn.Module, *, seed: int = 1) -> None:
    """Draw all adapter tensors anew, since B starts at zero and routers near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3, generator=generator)


def token_ids(rows: int = 2, length: int = 7, *, seed: int = 2) -> Tensor:
    """Random tokens without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of all routers by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_router." in name}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """All LoRA layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def captured_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The input of every LoRA layer in the last forward, with its graph."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, layer in lora_layers(model).items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def checkpoint_blocks(model: nn.Module, *, use_reentrant: bool) -> None:
    """Switch gradient checkpointing on, as the Trainer does."""
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a refused operation must leave alone."""
    return {
        "classes": {name: type(module).__name__ for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_same_snapshot(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two snapshots to the bit; the message names what differs."""
    changed = [
        f"{kind} of {name!r}"
        for kind in expected
        for name in {**expected[kind], **actual[kind]}
        if not _same(actual[kind].get(name), expected[kind].get(name))
    ]
    assert not changed, f"changed: {changed[:5]} and {max(0, len(changed) - 5)} more"


def _same(actual: Any, expected: Any) -> bool:
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    return type(actual) is type(expected) and actual == expected


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new Python process, with this repository importable.

    Its lines are not counted, which would take a third more: other tests run them in this process.
    """
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
