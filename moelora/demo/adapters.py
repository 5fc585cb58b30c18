"""The adapters that a demo compares, and how each is put on the base model."""

from dataclasses import dataclass

import torch

from moelora import MoELoraConfig
from moelora._peft import LoraConfig, PeftModel, get_peft_model
from moelora.demo.model import Base
from moelora.demo.options import DemoOptions

# lora_alpha / r, the same for every contender
SCALING = 2
# every linear layer but the output head, whatever a model calls them
TARGET_MODULES = "all-linear"


@dataclass(frozen=True)
class Plan:
    """A contender before its training."""

    key: str
    label: str
    config: LoraConfig


def plan_contenders(options: DemoOptions) -> list[Plan]:
    """Return the adapters to train, the mixture last.

    The plain LoRA has the rank that the mixture uses for one token, ``top_k * rank``. All have the
    same targets and the same ``lora_alpha / r``.

    Args:
        options: of the run.
    """
    active, total = options.top_k * options.rank, options.experts * options.rank
    plans = [Plan("lora", f"one LoRA of rank {active}", _lora_config(active))]
    if options.compare_total_rank:
        plans.append(Plan("lora_total", f"one LoRA of rank {total}", _lora_config(total)))
    label = f"mixture of {options.experts} x rank {options.rank}, top {options.top_k}"
    return [*plans, Plan("mixture", label, _mixture_config(options))]


def attach(base: Base, plan: Plan, *, seed: int) -> PeftModel:
    """Put a fresh adapter on the base model.

    Args:
        base: without an adapter.
        plan: of the adapter.
        seed: of the adapter's first weights.
    """
    torch.manual_seed(seed)
    return get_peft_model(base.model, plan.config)


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=TARGET_MODULES, task_type="CAUSAL_LM"
    )


def _mixture_config(options: DemoOptions) -> MoELoraConfig:
    return MoELoraConfig(
        r=options.rank,
        lora_alpha=SCALING * options.rank,
        num_experts=options.experts,
        top_k_experts=options.top_k,
        router_scope="module",
        target_modules=TARGET_MODULES,
        task_type="CAUSAL_LM",
    )
