"""The first of two passes: the final hidden states of the model without its adapters.

What X-LoRA and DyLoRA-MoE route by. The pass keeps a KV cache of its own beside the caller's, so
that a decoding step costs one token twice and not the prompt again.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.scope import Frame, RoutingScope

_CACHE = "_moelora_first_pass"
_FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def first_pass(
    base: nn.Module, scope: RoutingScope, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Run ``base`` without adapters and without gradient.

    Args:
        base: a transformers model.
        scope: its routing scope.
        args: the forward's positional arguments.
        kwargs: the forward's keyword arguments.

    Returns:
        The final hidden states ``(batch, seq, hidden)`` of these positions, and the pass's own
        cache where the caller gave none but will get one.

    Raises:
        UnsupportedLayerError: if the model gives no hidden states.
        RoutingWeightsError: if the given KV cache was filled without this pass.
    """
    inputs = inspect.signature(base.forward).bind_partial(*args, **kwargs).arguments
    inputs.update(inputs.pop("kwargs", {}))
    backbone = getattr(base, "base_model", base)
    backbone = backbone if isinstance(backbone, nn.Module) else base
    accepted = inspect.signature(backbone.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    inputs.pop("labels", None)
    if "return_dict" in accepted or "kwargs" in accepted:
        inputs["return_dict"] = True
    cache = inputs.get("past_key_values")
    if cache is not None:
        inputs["past_key_values"] = _own_cache(cache)
    with torch.no_grad(), scope.entered(Frame(adapters_off=True)):
        output = backbone(**inputs)
    hidden_states = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden_states, Tensor):
        raise UnsupportedLayerError(
            f"{type(base).__name__} gives no last_hidden_state, which a router over the model's "
            "final hidden states reads. Use router_scope='module', or pass routing_weights."
        )
    made = getattr(output, "past_key_values", None) if cache is None else None
    return hidden_states.detach(), made


def keep_cache(output: Any, own: Any) -> None:
    """Let the cache that a forward returns carry the first pass's own."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and own is not None and hasattr(cache, "get_seq_length"):
        _follow(cache, own)


def _own_cache(cache: Any) -> Any:
    """The first pass's cache that belongs to the caller's; made while that is empty."""
    own = getattr(cache, _CACHE, None)
    if own is not None:
        if int(own.get_seq_length()) != int(cache.get_seq_length()):
            raise RoutingWeightsError(
                f"The given KV cache holds {int(cache.get_seq_length())} positions, but the first "
                f"pass has seen {int(own.get_seq_length())}: steps with explicit weights or "
                "without adapters were taken in between. Start from an empty cache."
            )
        return own
    if not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) != 0:
        raise RoutingWeightsError(
            "The given KV cache holds positions that were not routed by this model, so their first "
            "pass is missing. Start from an empty cache, or pass routing_weights."
        )
    own = copy.deepcopy(cache)
    _follow(cache, own)
    return own


def _follow(cache: Any, own: Any) -> None:
    """Do to the first pass's cache what generate does to the caller's (beams, say)."""
    setattr(cache, _CACHE, own)
    for name in _FOLLOWED:
        method = getattr(cache, name, None)
        if method is not None:
            setattr(cache, name, functools.partial(_both, method, getattr(own, name)))


def _both(method: Any, own_method: Any, *args: Any, **kwargs: Any) -> Any:
    own_method(*args, **kwargs)
    return method(*args, **kwargs)
