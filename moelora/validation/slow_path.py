"""The reference: a weighted sum in every layer, of what plain PEFT says each expert adds.

Independent of moelora's layers: all adapters are off, and a hook on each adapted layer asks PEFT's
own forward for every expert alone, ``E + 1`` base products in each layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moelora.validation.candidate import lora_layers


def slow_logits(
    model: Any,
    experts: Sequence[str],
    weights: Tensor | Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
) -> Tensor:
    """The logits of ``base(x) + sum_e w_e (y_e(x) - base(x))`` in every adapted layer.

    Args:
        model: a PEFT model with the experts as plain adapters; left as it was.
        experts: their names, in the order of the weights.
        weights: ``(batch, seq, experts)`` for all layers, or for each layer by its name in the base
            model, ``(batch * seq, experts)``.
        batch: the model's inputs.
    """
    with torch.no_grad(), model.disable_adapter(), _mixing(model, experts, weights):
        return model(**batch, use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def _mixing(
    model: Any, experts: Sequence[str], weights: Tensor | Mapping[str, Tensor]
) -> Iterator[None]:
    handles = []
    for name, layer in lora_layers(model).items():
        own = name.removeprefix("base_model.model.")
        if isinstance(weights, Tensor):
            of_layer: Tensor | None = weights
        else:
            of_layer = weights.get(own)
        if of_layer is not None:
            hook = _hook(experts, of_layer)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(experts: Sequence[str], weights: Tensor) -> Any:
    def mix(layer: Any, args: Any, kwargs: Any, base: Tensor) -> Tensor:
        if not any(e in layer.lora_A or e in layer.lora_embedding_A for e in experts):
            return base
        per_token = weights.reshape(*base.shape[:-1], len(experts))
        dtype = torch.promote_types(base.dtype, torch.float32)
        result = base.to(dtype)
        for index, expert in enumerate(experts):
            if expert in layer.lora_A or expert in layer.lora_embedding_A:
                added = alone(layer, expert, args, kwargs).to(dtype) - base.to(dtype)
                result = result + per_token[..., index : index + 1].to(dtype) * added
        return result.to(base.dtype)

    return mix


def alone(layer: Any, expert: str, args: Any, kwargs: Any) -> Tensor:
    """What PEFT's own forward of a layer gives with one plain adapter active.

    Args:
        layer: a LoRA layer.
        expert: the adapter's name.
        args: the layer's inputs.
        kwargs: the layer's keyword inputs.
    """
    active, off = layer._active_adapter, layer._disable_adapters
    layer._active_adapter, layer._disable_adapters = [expert], False
    try:
        # forward itself: a call would run the hook again
        result: Tensor = layer.forward(*args, **kwargs)
        return result
    finally:
        layer._active_adapter, layer._disable_adapters = active, off
