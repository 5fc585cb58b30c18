"""What a checkpoint's own routers decided, as one weight for each expert in each adapted layer."""

from typing import Any

import torch
from torch import Tensor

from moelora.record import record_routing
from moelora.validation.candidate import Candidate, lora_layers
from moelora.validation.ways import Batch, activate

_PREFIX = "base_model.model."


def own_weights(candidate: Candidate, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a checkpoint's mixtures, routed by themselves.

    Args:
        candidate: a checkpoint with mixtures.
        batch: the model's inputs.

    Returns:
        The logits, and for each adapted layer by its name in the base model the routing weights
        ``(tokens, experts)``; an expert that a layer lacks has weight 0 there, one that is alone
        in a layer has weight 1.
    """
    model = candidate.model
    activate(model, candidate.mixtures)
    with torch.no_grad(), record_routing(model) as record:
        logits = model(**batch, use_cache=False).logits
    decided = {name: routing.routing_weights for name, routing in record.routing.items()}
    layers = lora_layers(model)
    tokens = batch["input_ids"].numel()
    found = {}
    for name, layer in layers.items():
        own = name.removeprefix(_PREFIX)
        key = _router_of(own, decided)
        served = _served(layers, layer, own, key)
        present = [mixture for mixture in candidate.mixtures if _has(served, mixture)]
        full = _spread(candidate, present, None if key is None else decided[key], tokens)
        found[own] = full * _mask(candidate, layer).to(full.device)
    return logits, found


def _router_of(layer: str, decided: dict[str, Tensor]) -> str | None:
    """The name under which a layer's routing was recorded: its own, its block's, the model's."""
    if layer in decided:
        return layer
    blocks = (name for name in decided if name != "model" and layer.startswith(f"{name}."))
    return next(blocks, "model" if "model" in decided else None)


def _served(layers: dict[str, Any], layer: Any, own: str, key: str | None) -> list[Any]:
    """The layers of one router, which has a column for every mixture in one of them."""
    if key is None or key == own:
        return [layer]
    inside = _PREFIX if key == "model" else f"{_PREFIX}{key}."
    return [one for name, one in layers.items() if name.startswith(inside)]


def _has(layers: list[Any], mixture: str) -> bool:
    return any(mixture in one.lora_A or mixture in one.lora_embedding_A for one in layers)


def _spread(
    candidate: Candidate, present: list[str], weights: Tensor | None, tokens: int
) -> Tensor:
    """Put the columns of the mixtures that are present among those of all experts."""
    configs = candidate.model.peft_config
    full = torch.zeros(tokens, len(candidate.experts), device=candidate.device)
    if weights is not None:
        full = full.to(weights.dtype)
    taken = start = 0
    for mixture in candidate.mixtures:
        number = configs[mixture].num_experts
        if mixture in present:
            columns = slice(start, start + number)
            if weights is None:
                full[:, columns] = full.new_tensor(_constant(configs[mixture]))
            else:
                full[:, columns] = weights[:, taken : taken + number]
            taken += number
        start += number
    return full


def _constant(config: Any) -> list[float]:
    """Weights that no router decides: fixed ones, or 1 for what is always on."""
    if config.routed and config.num_experts > 1:
        return config.fixed_routing_weights or [1 / config.num_experts] * config.num_experts
    return [1.0] * config.num_experts


def _mask(candidate: Candidate, layer: Any) -> Tensor:
    """1 for the experts that a layer has."""
    configs = candidate.model.peft_config
    flags = [
        float(_has([layer], mixture))
        for mixture in candidate.mixtures
        for _ in range(configs[mixture].num_experts)
    ]
    return torch.tensor(flags)
