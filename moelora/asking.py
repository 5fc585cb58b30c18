"""Asking a router that is not ours for routing weights."""

import itertools
from typing import Any

from torch import Tensor, nn

from moelora.errors import RoutingWeightsError


def ask_router(router: nn.Module, hidden_states: Any) -> Tensor:
    """Call a router in its own device and dtype, and check what it returns.

    Raises:
        RoutingWeightsError: if it does not return a float tensor of one weight vector per token.
    """
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        given = hidden_states.dtype if isinstance(hidden_states, Tensor) else type(hidden_states)
        raise RoutingWeightsError(f"hidden_states must be a float tensor, got {given}.")
    tensors = itertools.chain(router.parameters(), router.buffers())
    own = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if own is not None:
        hidden_states = hidden_states.to(device=own.device, dtype=own.dtype)
    weights = router(hidden_states)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise RoutingWeightsError(
            f"The router {type(router).__name__} must return a float tensor of routing weights, "
            f"got {kind}."
        )
    if weights.shape[:-1] not in (hidden_states.shape[:-1], (hidden_states.shape[0],)):
        raise RoutingWeightsError(
            f"The router {type(router).__name__} must return weights for the tokens "
            f"{tuple(hidden_states.shape[:-1])}, got shape {tuple(weights.shape)}."
        )
    return weights
