"""Checkpoints as DyLoRA-MoE's own code saves them, made with plain PEFT on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.lm import perturb
from tests.validation.tiny import tiny_base

TARGETS = ["q_proj", "v_proj", "o_proj"]
LAYOUTS = ("nested", "flat", "bin", "pt")


class OldGate(nn.Module):
    """What upstream's router has: a linear gate, and settings that are no tensors."""

    def __init__(self, width: int, experts: int, *, top_k: int = 1, temperature: float = 2.0):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.settings: dict[str, Any] = {
            "num_experts": experts,
            "input_size": width,
            "top_k": top_k,
            "temperature": temperature,
        }
        self.expert_maturity = torch.ones(experts)

    def forward(self, x: Tensor) -> Tensor:
        """The published rule, written anew."""
        scores = self.gate(x)
        if bool((self.expert_maturity == 0).any()):
            return torch.softmax(scores / self.settings["temperature"], dim=-1)
        best, where = scores.topk(self.settings["top_k"], dim=-1)
        return torch.zeros_like(scores).scatter(-1, where, best.softmax(dim=-1))

    def save(self, path: Path) -> None:
        content = {"gate_state_dict": self.gate.state_dict(), **self.settings}
        torch.save({**content, "expert_maturity": self.expert_maturity}, path)


def old_model(
    experts: int = 3, *, base: nn.Module | None = None, r: int = 4, **fields: Any
) -> PeftModel:
    """The experts as upstream's manager makes them; the last one has twice the rank."""
    model: Any = base if base is not None else tiny_base()
    for index in range(experts):
        rank = r if index < experts - 1 or experts == 1 else 2 * r
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            **{"lora_alpha": 8, "lora_dropout": 0.05, "target_modules": TARGETS, **fields},
        )
        name = f"expert_{index}"
        if index == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    perturb(model)
    return model.eval()


def old_gate(experts: int = 3, width: int = 32, **settings: Any) -> OldGate:
    torch.manual_seed(5)
    gate = OldGate(width, experts, **settings)
    with torch.no_grad():
        gate.gate.weight.normal_()
        gate.gate.bias.normal_()
    return gate


def names_of(model: PeftModel) -> list[str]:
    return list(model.peft_config)


def save_old(
    folder: Path,
    model: PeftModel,
    *,
    layout: str = "nested",
    router: str | None = "safetensors",
    gate: OldGate | None = None,
    skills: str | None = "pt",
    config: dict[str, Any] | None = None,
) -> Path:
    """Save as upstream's callback does, or (``layout="pt"``) as the end of its training does."""
    adapters = folder / "peft_adapters"
    adapters.mkdir(parents=True)
    names = names_of(model)
    for name in names:
        model.set_adapter(name)
        if layout == "pt":
            _save_pt(model, name, adapters)
            continue
        model.save_pretrained(
            adapters / name, selected_adapters=[name], safe_serialization=layout != "bin"
        )
        if layout == "flat":
            for path in (adapters / name / name).iterdir():
                path.rename(adapters / name / path.name)
            (adapters / name / name).rmdir()
    state = folder / "dylo_moe_state" if layout == "pt" else folder
    state.mkdir(exist_ok=True)
    width = model.get_base_model().config.hidden_size
    _save_router(state, router, old_gate(len(names), width) if gate is None else gate)
    _save_skills(state, skills, width, len(names))
    written = {
        "model_type": "dylora-moe",
        "_dylora_format": "peft_separated",
        "base_model_name_or_path": str(model.get_base_model().config._name_or_path),
        "num_experts": len(names),
    }
    if layout == "pt":
        written |= {"_dylora_num_experts": len(names), "_dylora_lora_alpha": 8}
    (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
    return folder


def _save_pt(model: PeftModel, name: str, folder: Path) -> None:
    """Upstream's way: parameters that are trained and whose name contains the expert's."""
    weights = {
        key: parameter.data.clone()
        for key, parameter in model.named_parameters()
        if (name in key or "lm_head" in key) and parameter.requires_grad
    }
    torch.save(weights, folder / f"{name}.pt")


def _save_router(folder: Path, kind: str | None, gate: OldGate) -> None:
    if kind == "safetensors":
        save_file(gate.state_dict(), folder / "router.safetensors")
    elif kind == "state":
        torch.save(gate.state_dict(), folder / "router.pt")
    elif kind == "pt":
        gate.save(folder / "router.pt")


def _save_skills(folder: Path, kind: str | None, width: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(9)
    skills = {index: torch.randn(width, generator=generator) for index in range(experts)}
    if kind == "pt":
        torch.save(skills, folder / "skill_library.pt")
    elif kind == "safetensors":
        named = {str(key): value for key, value in skills.items()}
        save_file(named, folder / "skill_library.safetensors")
