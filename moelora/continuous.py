"""transformers' continuous batching: routing that its paged cache cannot serve is refused.

Its rows are packed and run by a thread that turns every error into a failed request, so what cannot
work has to be said before the first request.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from moelora import _peft
from moelora.errors import RoutingWeightsError, UnsupportedLayerError
from moelora.scope import ATTACHED
from moelora.shared import shared_routers_of


def init_continuous_batching(
    original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Refuse routers that need a first pass; routers of layers and blocks need nothing.

    Raises:
        UnsupportedLayerError: if one router decides for the whole model.
    """
    if _needs_first_pass(base):
        raise UnsupportedLayerError(
            "Continuous batching cannot serve a router that reads the final hidden states of a "
            "first pass (router_scope='model', or an attached router): that pass would need a "
            "paged cache of its own. Use generate(), or router_scope='module' or 'layer'."
        )
    return original(base, *args, **kwargs)


def generate_batch(original: Callable[..., Any], base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Refuse explicit weights, which continuous batching would ignore as any argument it lacks.

    Raises:
        RoutingWeightsError: if weights are given.
    """
    if kwargs.pop("routing_weights", None) is not None:
        raise RoutingWeightsError(
            "generate_batch() packs tokens of many requests into one row, to which routing_weights "
            "cannot be aligned. Use generate(), or let routers decide."
        )
    return original(base, *args, **kwargs)


def _needs_first_pass(base: nn.Module) -> bool:
    shared = shared_routers_of(base)
    if base.__dict__.get(ATTACHED) is None and (shared is None or not shared.active()):
        return False
    layers = (module for module in base.modules() if isinstance(module, _peft.LoraLayer))
    first = next(layers, None)
    return first is not None and not first.disable_adapters and not first.merged
