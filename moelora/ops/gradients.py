"""What the ops' backward passes have in common."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_dtype(gradient: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """The first rows of a gradient in a parameter's dtype; no call where nothing is to do."""
    if gradient.shape[0] != rows:
        gradient = gradient[:rows]
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, whose checks are made only where a second backward is asked for."""
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        return (checked if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return run


def output_gradients(
    gradients: Sequence[Tensor | None], lora_bs: Sequence[Tensor], x: Tensor
) -> list[Tensor]:
    """The gradient of each member's output, ``(tokens, d_out)``; zeros where nobody used it."""
    return [
        x.new_zeros(x.shape[0], lora_b.shape[0])
        if grad is None
        else grad.reshape(-1, lora_b.shape[0])
        for grad, lora_b in zip(gradients[: len(lora_bs)], lora_bs, strict=True)
    ]
