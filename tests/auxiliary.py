"""Auxiliary losses written token by token in float64, and gradients to hold them against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.lm import (
    captured_inputs,
    router_parameters,
    token_ids,
    trainable,
)
from tests.tolerances import assert_close

LOSS_TYPES = ["aux_loss", "switch", "z_loss"]
SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])


def expected_loss(
    logits: Tensor, *, loss_type: str, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """The loss of one router, written out token by token; ``logits`` are divided already."""
    rows = [row for i, row in enumerate(logits) if mask is None or bool(mask[i])]
    if loss_type == "z_loss":
        return sum(row.exp().sum().log() ** 2 for row in rows) / len(rows)
    chosen_per_token = top_k if loss_type == "aux_loss" else 1
    experts = logits.shape[-1]
    counts = [0] * experts
    for row in rows:
        for expert in sorted(range(experts), key=lambda e: -row[e].item())[:chosen_per_token]:
            counts[expert] += 1
    mean_probs = sum(row.exp() / row.exp().sum() for row in rows) / len(rows)
    share = torch.tensor(counts, dtype=logits.dtype) / (len(rows) * chosen_per_token)
    return experts * (share * mean_probs).sum()


def expected_mean_loss(
    model: PeftModel, inputs: dict[str, Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """The mean over all routers, from what each of them was given and its rows."""
    config = model.peft_config["default"]
    losses = []
    for name, x in inputs.items():
        router = model.get_submodule(name).lora_router["default"]
        logits = (x @ router.weight.T).flatten(0, -2) / config.router_temperature
        losses.append(
            expected_loss(
                logits,
                loss_type=config.load_balance_loss_type,
                top_k=config.top_k_experts,
                mask=None if mask is None else mask.flatten(),
            )
        )
    return sum(losses) / len(losses)


@contextmanager
def router_inputs(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """What each router reads in the last forward, by the name of the layer that holds it."""
    scope = model.peft_config["default"].router_scope
    inputs: dict[str, Tensor] = {}
    holders = {name.rsplit(".lora_router", 1)[0] for name in router_parameters(model)}

    def keep_of_block(block: nn.Module, args: tuple[Any, ...]) -> None:
        for name in holders:
            if any(part is model.get_submodule(name) for part in block.modules()):
                inputs[name] = args[0]

    def keep_of_model(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = {key: kwargs[key] for key in ("input_ids", "attention_mask") if key in kwargs}
        with torch.no_grad():
            plain = copy.deepcopy(model).unload().model
            (name,) = holders
            inputs[name] = plain(**kept).last_hidden_state

    if scope == "module":
        with captured_inputs(model) as found:
            yield found
        return
    base = model.get_base_model()
    if scope == "layer":
        hooks = [block.register_forward_pre_hook(keep_of_block) for block in base.model.layers]
    else:
        hooks = [base.register_forward_pre_hook(keep_of_model, with_kwargs=True, prepend=True)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Gradients of all trainable parameters, zeros where there is none."""
    parameters = list(trainable(model).values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def assert_gradients_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compare gradients that passed transformers' norms and losses, which compute in float32."""
    assert_close(actual, expected, dtype=torch.float32)


def accumulated(model: nn.Module) -> list[Tensor]:
    """What backward left in ``.grad``."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model).values()]


def scaled(tensors: list[Tensor], factor: float) -> list[Tensor]:
    return [factor * tensor for tensor in tensors]


def summed(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)]


def train_batch(rows: int = 2, length: int = 7, *, seed: int = 2) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed=seed)
    return {"input_ids": ids, "labels": ids.clone()}


def without_loss(model: PeftModel) -> PeftModel:
    """The same model with the auxiliary loss switched off."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if "moe_mixtures" in module.__dict__:
            spec = module.moe_mixtures["default"]
            module.moe_mixtures["default"] = type(spec)(**{**vars(spec), "aux_loss_coef": 0.0})
    return other
