"""Undoing a load that failed: the structure of a model, kept and put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules, adapters, hooks and gradient flags back if the block raises.

    Every module's attributes are kept by reference, and the containers among them (the adapters of
    a layer, the configs of a tuner, hooks) by content. Values of tensors are not kept: a load that
    is refused has written none.
    """
    attributes = [(module, _kept(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for module, kept in attributes:
            _restore(vars(module), kept)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def _kept(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a shallow copy of what it holds if that may change in place."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], kept: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, content) in kept.items():
        if isinstance(value, dict | set):
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
        attributes[name] = value
