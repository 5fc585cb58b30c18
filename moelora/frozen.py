"""Frozen adapters: PEFT's ``set_adapter`` makes whatever it activates trainable, except these.

PEFT activates adapters in many places (``set_adapter``, ``add_adapter``, leaving
``disable_adapter()``, ``delete_adapter``), and each sets ``requires_grad`` of the active ones. The
names of frozen adapters lie in the layers, so that they stay frozen whoever activates them.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from moelora import _peft

_FROZEN = "_moelora_frozen"


def set_adapter(
    original: Callable[..., None],
    layer: Any,
    adapter_names: str | list[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Activate as PEFT does, and keep frozen adapters frozen."""
    original(layer, adapter_names, *args, **kwargs)
    frozen = layer.__dict__.get(_FROZEN)
    if frozen:
        layer.set_requires_grad(frozen, requires_grad=False)


def delete_adapter(original: Callable[..., None], layer: Any, adapter_name: str) -> None:
    """Delete as PEFT does; a later adapter of that name is not frozen."""
    original(layer, adapter_name)
    if adapter_name in layer.__dict__.get(_FROZEN, ()):
        layer.__dict__[_FROZEN] = layer.__dict__[_FROZEN] - {adapter_name}


def frozen_adapters(base: nn.Module) -> set[str]:
    """The names of frozen adapters."""
    found: set[str] = set()
    for layer in _lora_layers(base):
        found |= layer.__dict__.get(_FROZEN, frozenset())
    return found


def freeze_adapters(base: nn.Module, names: Iterable[str]) -> None:
    """Freeze adapters: no gradient, none left over, and so no step of an optimiser."""
    names = frozenset(names)
    for layer in _lora_layers(base):
        layer.__dict__[_FROZEN] = layer.__dict__.get(_FROZEN, frozenset()) | names
        layer.set_requires_grad(names, requires_grad=False)
        for parameter in adapter_parameters(layer, names):
            # momentum and weight decay move whatever has a gradient, even one of zeros
            parameter.grad = None


def unfreeze_adapters(base: nn.Module, names: Iterable[str]) -> None:
    """Let adapters train again: those that are active at once, the others when activated."""
    names = frozenset(names)
    for layer in _lora_layers(base):
        layer.__dict__[_FROZEN] = layer.__dict__.get(_FROZEN, frozenset()) - names
        active = names & set(layer.active_adapters)
        if active and not layer.disable_adapters:
            layer.set_requires_grad(active, requires_grad=True)


def rename_frozen(layer: Any, old: str, new: str) -> None:
    """Follow an adapter that gets another name."""
    frozen = layer.__dict__.get(_FROZEN, frozenset())
    if old in frozen:
        layer.__dict__[_FROZEN] = frozen - {old} | {new}


def adapter_parameters(layer: Any, names: Iterable[str]) -> Iterable[nn.Parameter]:
    """All parameters that a layer holds of these adapters."""
    for container_name in layer.adapter_layer_names:
        container = getattr(layer, container_name, None)
        for name in names:
            if container is None or name not in container:
                continue
            item = container[name]
            yield from item.parameters() if isinstance(item, nn.Module) else [item]


def _lora_layers(base: nn.Module) -> Iterable[Any]:
    return (module for module in base.modules() if isinstance(module, _peft.LoraLayer))
