"""One process and two GPUs: a model on another GPU than the current one, a model on both."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from checks.setup import Job, adapt, base, batch, build, gradients

VARIANTS: dict[str, dict[str, Any]] = {
    "scope module": {},
    "scope layer": {"router_scope": "layer"},
    "scope model": {"router_scope": "model"},
    "all experts": {"top_k_experts": 8},
    "64 experts": {"num_experts": 64, "top_k_experts": 1, "r": 2},
    "z_loss": {"load_balance_loss_type": "z_loss"},
}


def results_of(model: PeftModel, job: Job) -> dict[str, Tensor]:
    """Gradients of a training step, logits of a forward, and a few greedy tokens."""
    data = batch(job, 0)
    device = next(model.parameters()).device
    data = {name: value.to(device) for name, value in data.items()}
    loss = model(**data).loss
    loss.backward()
    found = {"loss": loss.detach(), **gradients(model)}
    model.eval()
    with torch.no_grad():
        found["logits"] = model(**data).logits
        prompt = {key: data[key][:2, :4] for key in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        found["generated"] = model.generate(**prompt, **options)
    return found


def check_other_device(job: Job) -> None:
    """On the other GPU than the current one: logits and gradients as on the current one."""
    if job.device.type != "cuda":
        job.skip("on another GPU than the current one", "needs two GPUs")
        return
    other = torch.device("cuda", (job.rank + 1) % job.ranks)
    for name, fields in VARIANTS.items():
        expected = results_of(build(job, **fields), job)
        found = results_of(build(replace(job, device=other), **fields), job)
        where = "" if torch.cuda.current_device() == job.device.index else " (device changed!)"
        job.compare(f"on {other}, {name}{where}", found, expected)


def split_by_hand(model: PeftModel, first: torch.device, second: torch.device) -> PeftModel:
    """The upper half of the blocks on the second GPU; hooks bring their inputs there."""
    causal = model.get_base_model()
    inner = causal.model
    upper = [*inner.layers[len(inner.layers) // 2 :], inner.norm, causal.lm_head]
    model.to(first)
    for module in upper:
        module.to(second)
        module.register_forward_pre_hook(_bring_to(second), with_kwargs=True)
    return model


def _bring_to(device: torch.device) -> Callable[..., Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return move(args), {name: move(value) for name, value in kwargs.items()}

    return hook


def split_by_map(folder: Path, first: torch.device, second: torch.device) -> LlamaForCausalLM:
    """The same by transformers' ``device_map``, as accelerate does it."""
    blocks = LlamaConfig.from_pretrained(folder).num_hidden_layers
    places = {
        f"model.layers.{number}": str(first if number < blocks // 2 else second)
        for number in range(blocks)
    }
    ends = {"model.norm": str(second), "model.rotary_emb": str(first), "lm_head": str(second)}
    device_map = {"model.embed_tokens": str(first), **places, **ends}
    return LlamaForCausalLM.from_pretrained(folder, device_map=device_map, dtype="float32")


def check_split_model(job: Job) -> None:
    """Layers, routers and their balancing losses on two GPUs: as on one."""
    if job.device.type != "cuda":
        job.skip("layers on two GPUs", "needs two GPUs")
        return
    other = torch.device("cuda", (job.rank + 1) % job.ranks)
    for scope in ("module", "layer", "model"):
        fields = {"router_scope": scope, "router_aux_loss_coef": 1.0}
        expected = results_of(build(job, **fields), job)
        model = split_by_hand(adapt(base(job), **fields), job.device, other).train()
        job.compare(f"layers on two GPUs, by hand, {scope}", results_of(model, job), expected)
        name = f"layers on two GPUs, device_map, {scope}"
        if find_spec("accelerate") is None:
            job.skip(name, "accelerate is not installed")
            continue
        folder = job.folder / f"base-{job.rank}"
        # every rank for itself: in a process group, only the first would write
        model = base(job)
        model.config.save_pretrained(folder)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        mapped = adapt(split_by_map(folder, job.device, other), **fields).train()
        used = {p.device for p in mapped.parameters()}
        job.report(f"{name}: on both", f"{sorted(map(str, used))}", passed=len(used) > 1)
        job.compare(name, results_of(mapped, job), expected)
