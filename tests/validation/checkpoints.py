"""Checkpoints of every kind that validation reads, saved by plain PEFT calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moelora import MoELoraConfig, Router
from tests.lm import perturb
from tests.validation.old_checkpoints import TARGETS, old_model, save_old
from tests.validation.tiny import tiny_base

UNLIKE = [["q_proj", "o_proj"], ["q_proj", "o_proj", "down_proj"], ["q_proj"]]


def mixture_model(**fields: Any) -> PeftModel:
    config = MoELoraConfig(
        **{
            "r": 2,
            "lora_alpha": 4,
            "num_experts": 3,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            "router_type": "learned",
            **fields,
        }
    )
    model = get_peft_model(tiny_base(), config)
    perturb(model)
    return model.eval()


def adapters_model(*, router: bool = True, **fields: Any) -> PeftModel:
    """Three plain adapters whose names are not in the order of the alphabet."""
    model: Any = tiny_base()
    for name, r in (("sql", 2), ("french", 3), ("maths", 2)):
        config = LoraConfig(
            r=r, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM", **fields
        )
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    perturb(model)
    model.base_model.set_adapter(["sql", "french", "maths"])
    if router:
        torch.manual_seed(4)
        attached = Router(32, 3, top_k=2)
        with torch.no_grad():
            attached.weight.normal_()
        model.attach_router(attached)
    return model.eval()


def joining_model(*, targets: list[list[str]] | None = None, **fields: Any) -> PeftModel:
    """Experts that came one at a time, each an adapter with its own router rows."""
    model: Any = tiny_base()
    for index in range(3):
        config = MoELoraConfig(
            r=2 + index,
            lora_alpha=4,
            num_experts=1,
            joins_mixture=True,
            target_modules=TARGETS if targets is None else targets[index],
            task_type="CAUSAL_LM",
            router_type="learned",
            **fields,
        )
        if index:
            model.add_adapter(f"skill_{index}", config)
        else:
            model = get_peft_model(model, config, adapter_name="skill_0")
    perturb(model)
    model.base_model.set_adapter(["skill_0", "skill_1", "skill_2"])
    return model.eval()


MODELS: dict[str, Any] = {
    "mixture": mixture_model,
    "mixture with a router per block": lambda: mixture_model(router_scope="layer"),
    "mixture with one router": lambda: mixture_model(router_scope="model"),
    "young mixture": lambda: mixture_model(router_type="learned_with_maturity"),
    "fixed mixture": lambda: mixture_model(
        router_type="fixed", fixed_routing_weights=[0.5, -1.0, 2.0]
    ),
    "experts without routing": lambda: mixture_model(
        use_moe_routing=False, router_type="learned_with_maturity"
    ),
    "adapters with a router": adapters_model,
    "adapters alone": lambda: adapters_model(router=False),
    "experts that joined": joining_model,
    # o_proj has two of them, down_proj one alone
    "joined, in other layers each": lambda: joining_model(targets=UNLIKE),
    "joined, a router per block": lambda: joining_model(targets=UNLIKE, router_scope="layer"),
}


def save(kind: str, folder: Path) -> Path:
    """Save a checkpoint of this kind."""
    if kind.startswith("old"):
        return save_old(folder, old_model(), router=None if "without" in kind else "pt")
    MODELS[kind]().save_pretrained(folder)
    return folder


KINDS = [*MODELS, "old", "old without a router"]
