"""The slow path: the formula of a weighted sum of LoRA experts, in plain float64 loops.

``base(x) + sum_e w_e(x) * scaling_e * B_e A_e x``. Nothing here calls moelora; tensors are read out
of PEFT's layers, cut into experts, and multiplied one token and one expert at a time. Gradients are
those that autograd gives these loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Expert:
    """One (A, B) pair: ``a`` maps to the rank space, ``b`` back, ``bias`` is B's."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float


def experts_of(layer: Any, adapters: Sequence[str], num_experts: Sequence[int]) -> list[Expert]:
    """The experts of ``adapters`` in order, each adapter holding so many stacked ones."""
    experts = []
    for adapter, number in zip(adapters, num_experts, strict=True):
        if adapter in layer.lora_embedding_A:
            a, b, bias = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            bias = layer.lora_B[adapter].bias
        rank = a.shape[0] // number
        for index in range(number):
            own = slice(index * rank, (index + 1) * rank)
            experts.append(Expert(a[own], b[:, own], bias, layer.scaling[adapter]))
    return experts


def mixture_reference(
    base_layer: nn.Module, experts: Sequence[Expert], x: Tensor, weights: Tensor
) -> Tensor:
    """The output of an adapted layer, token by token (convolutions: sample by sample).

    Args:
        base_layer: the frozen layer.
        experts: the experts in effect.
        x: the layer's input.
        weights: ``(*lead, E)``, one weight vector per token or sample.
    """
    base = base_layer(x)
    lead = weights.shape[:-1]
    flat_weights = weights.reshape(-1, weights.shape[-1])
    tokens = x.reshape(len(flat_weights), *x.shape[len(lead) :])
    rows = base.reshape(len(flat_weights), *base.shape[len(lead) :])
    mixed = []
    for token, row, row_weights in zip(tokens, rows, flat_weights, strict=True):
        total = row
        for expert, weight in zip(experts, row_weights, strict=True):
            total = total + weight * _update(base_layer, expert, token)
        mixed.append(total)
    return torch.stack(mixed).reshape(base.shape) if mixed else base


def _update(base_layer: nn.Module, expert: Expert, token: Tensor) -> Tensor:
    """``scaling * B A x`` for one token or one sample."""
    if isinstance(base_layer, nn.Embedding):
        update = expert.b @ expert.a[:, token]
    elif isinstance(base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        update = _convolve(base_layer, expert, token)
    else:
        update = expert.b @ (expert.a @ token)
        if expert.bias is not None:
            update = update + expert.bias
    return update * expert.scaling


def _convolve(base_layer: Any, expert: Expert, sample: Tensor) -> Tensor:
    convolution = {
        nn.Conv1d: nn.functional.conv1d,
        nn.Conv2d: nn.functional.conv2d,
        nn.Conv3d: nn.functional.conv3d,
    }[type(base_layer)]
    # PEFT's A reads all channels also where the base layer has groups; its B has the groups.
    ranks = convolution(
        sample[None], expert.a, stride=base_layer.stride, padding=base_layer.padding
    )
    return convolution(ranks, expert.b, bias=expert.bias, groups=base_layer.groups)[0]


def routing_reference(logits: Tensor, *, top_k: int) -> Tensor:
    """Weights by top-k and renormalisation, one token at a time; k = 1 keeps the probability."""
    rows = []
    for row in logits:
        exponentials = [value.exp() for value in row - row.max().detach()]
        probabilities = [value / sum(exponentials) for value in exponentials]
        order = sorted(range(len(row)), key=row.tolist().__getitem__, reverse=True)[:top_k]
        kept = sum(probabilities[expert] for expert in order)
        weights = [
            probabilities[expert] / (kept if top_k > 1 else 1)
            if expert in order
            else row.new_zeros(())
            for expert in range(len(row))
        ]
        rows.append(torch.stack(weights))
    return torch.stack(rows) if rows else logits
