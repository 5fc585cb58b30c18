"""What the ops have in common around their arithmetic: autocast, and backward passes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_dtype(gradient: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """The first rows of a gradient in a parameter's dtype; no call where nothing is to do."""
    if gradient.shape[0] != rows:
        gradient = gradient[:rows]
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; some kinds (meta) know none.

    Example:
        >>> is_autocast("cpu"), is_autocast("meta")
        (False, False)
    """
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_given_dtypes(function: _Function) -> _Function:
    """Let an op, whose first argument is a tensor, compute in its tensors' dtypes under autocast.

    Args:
        function: the op.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_autocast(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return cast("_Function", run)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, whose checks are made only where a second backward is asked for.

    Autocast, under which nobody should call backward but some do, changes nothing in it.
    """
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        chosen = checked if torch.is_grad_enabled() else backward
        if not torch._C._is_any_autocast_enabled():
            return chosen(ctx, *gradients)
        # of outputs that all went unused there are no gradients
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None or not is_autocast(given.device.type):
            return chosen(ctx, *gradients)
        with torch.autocast(given.device.type, enabled=False):
            return chosen(ctx, *gradients)

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
