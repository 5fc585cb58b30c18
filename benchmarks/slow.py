"""The slow way to compute every variant: float64 updates, one expert after the other, plain loops.

It shares no code with moelora: only the decisions (which experts a token kept) are taken from a
record of the fast run, since two experts of nearly equal score may change places by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Built, Variant
from benchmarks.shapes import adapted_layers
from moelora import Routing

_TEMPERATURE = 2.0
_COEFFICIENT = 0.01


@dataclass
class SlowRun:
    """What the slow layers share during one forward.

    Attributes:
        variant: whose arithmetic it is.
        built: its model.
        record: decisions of the fast run by layer, or by block.
        losses: the balancing loss of each layer's router, in order.
    """

    variant: Variant
    built: Built
    record: dict[str, Routing]
    losses: list[Tensor] = field(default_factory=list)

    def weights_of(self, layer: Any, name: str, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """The weight of each expert per token, float64; 1 where adapters are plain."""
        scalings = kwargs.pop("scalings", None)
        kwargs.pop("routing_weights", None)
        if scalings is not None:
            return self._xlora[name].get_maybe_topk_scalings(scalings).double()
        if self.variant.kind == "arrow":
            return arrow_weights(layer, x, self.variant.top_k)
        if self.built.weights is not None:
            return self.built.weights.double()
        if self.variant.kind != "moelora":
            return None
        if self.variant.detail == "fixed":
            return x.new_full((self.variant.experts,), 1 / self.variant.experts, dtype=torch.double)
        return self._routed(layer, name, x)

    @property
    def _xlora(self) -> dict[str, Any]:
        layers: dict[str, Any] = self.built.model.__dict__["_benchmark_xlora"]
        return layers

    def _routed(self, layer: Any, name: str, x: Tensor) -> Tensor:
        key = self._key(name)
        routing = self.record[key]
        if self.variant.detail in {"layer", "model"}:
            # one router for many layers, whose input is not at hand: its weights as recorded. It
            # runs outside the layers, so the model's loss has its balancing loss already
            return routing.routing_weights.double().reshape(*x.shape[:-1], -1)
        router = next(iter(layer.lora_router.values()))
        logits = x.double().flatten(0, -2) @ router.weight.double().T / _TEMPERATURE
        probs = logits.softmax(dim=-1)
        self.losses.append(balance(probs, routing.selected_experts))
        kept = routing.routing_weights > 0
        if routing.selected_experts.shape[-1] == 1:
            weights: Tensor = probs * kept
        else:
            weights = logits.masked_fill(~kept, -1e300).softmax(dim=-1) * kept
        return weights.reshape(*x.shape[:-1], -1)

    def _key(self, name: str) -> str:
        found = [key for key in self.record if name == key or name.startswith(f"{key}.")]
        if self.variant.detail == "model":
            found = list(self.record)
        if len(found) != 1:
            raise RuntimeError(f"Layer {name!r} has no record of its routing.")
        return found[0]


def balance(probs: Tensor, selected: Tensor) -> Tensor:
    """``experts * sum_e share_of_slots[e] * mean_probability[e]``."""
    experts = probs.shape[-1]
    counts = torch.zeros(experts, dtype=probs.dtype, device=probs.device)
    for expert in range(experts):
        counts[expert] = (selected == expert).sum()
    return experts * (counts / selected.numel() * probs.mean(dim=0)).sum()


def arrow_weights(layer: Any, x: Tensor, top_k: int) -> Tensor:
    """Softmax over the top k of ``|x . prototype|``."""
    (arrow,) = layer.lora_arrow.values()
    scores = (x.double() @ arrow.prototypes.double().T).abs()
    kept, index = scores.topk(top_k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, kept.softmax(dim=-1))


def _experts(layer: Any, adapter: str, variant: Variant) -> Iterator[tuple[Tensor, Tensor]]:
    lora_a, lora_b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
    count = variant.experts if variant.kind == "moelora" else 1
    yield from zip(
        lora_a.unflatten(0, (count, -1)).unbind(0),
        lora_b.unflatten(1, (count, -1)).unbind(1),
        strict=True,
    )


def _adapters(layer: Any) -> list[str]:
    if hasattr(layer, "lora_arrow") and len(layer.lora_arrow):
        (arrow,) = layer.lora_arrow.values()
        return list(arrow.task_adapter_names)
    return list(layer.active_adapters)


def slow_forward(layer: Any, name: str, run: SlowRun, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """``base(x) + sum_e weight_e * scaling_e * B_e A_e x``, in float64 but for the base."""
    if layer.disable_adapters:
        kwargs.pop("scalings", None)
        plain: Tensor = layer.base_layer(x, **kwargs)
        return plain
    weights = run.weights_of(layer, name, x, kwargs)
    base: Tensor = layer.base_layer(x, **kwargs)
    result, number, wide = base.double(), 0, x.double()
    for adapter in _adapters(layer):
        for lora_a, lora_b in _experts(layer, adapter, run.variant):
            weight = 1.0 if weights is None else weights[..., number, None]
            if adapter in layer.lora_magnitude_vector:
                delta = wide @ lora_a.T @ lora_b.T * layer.scaling[adapter]
                update = dora_update(layer, adapter, base.double(), lora_a, lora_b, delta)
                result = result + weight * update
            else:
                # weighted in the rank space, or all deltas would be kept for backward
                result = result + (wide @ lora_a.T * weight) @ lora_b.T * layer.scaling[adapter]
            number += 1
    return result.to(base.dtype)


def dora_update(
    layer: Any, adapter: str, base: Tensor, lora_a: Tensor, lora_b: Tensor, delta: Tensor
) -> Tensor:
    """What DoRA adds: ``(c - 1) (base - bias) + c * delta``, ``c = m / ||W + scaling B A||``."""
    weight = layer.get_base_layer().weight.double()
    weight = weight.T if layer.fan_in_fan_out else weight
    norm = (weight + layer.scaling[adapter] * lora_b @ lora_a).norm(dim=1).detach()
    ratio = layer.lora_magnitude_vector[adapter].weight.double() / norm
    bias = layer.get_base_layer().bias
    without_bias = base if bias is None else base - bias.double()
    update: Tensor = (ratio - 1) * without_bias + ratio * delta
    return update


@contextmanager
def slow_layers(variant: Variant, built: Built, record: dict[str, Routing]) -> Iterator[SlowRun]:
    """Let all adapted layers compute the slow way inside the block."""
    run = SlowRun(variant, built, record)
    layers = adapted_layers(built.model)
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    if variant.kind == "xlora":
        built.model.__dict__["_benchmark_xlora"] = {
            name: forward.__self__ for name, forward in before.items() if forward is not None
        }
    for name, layer in layers.items():
        layer.forward = _bound(layer, name, run)
    try:
        yield run
    finally:
        built.model.__dict__.pop("_benchmark_xlora", None)
        for name, layer in layers.items():
            del layer.forward
            forward = before[name]
            if forward is not None:
                layer.forward = forward


def _bound(layer: nn.Module, name: str, run: SlowRun) -> Callable[..., Tensor]:
    # names in records are those of the base model
    short = name.removeprefix("base_model.model.")

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        key = name if run.variant.kind == "xlora" else short
        return slow_forward(layer, key, run, x, kwargs)

    return forward


def slow_loss(run: SlowRun, loss: Tensor) -> Tensor:
    """The model's loss with the balancing losses of its routers."""
    if not run.losses:
        return loss
    return loss.double() + _COEFFICIENT * torch.stack(run.losses).mean()
