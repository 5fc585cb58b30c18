"""Looking at the routing of a model's last forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moelora.binding import base_of
from moelora.errors import UnsupportedLayerError
from moelora.routing import Routing
from moelora.scope import scope_of


class RoutingRecord:
    """The routing of the last forward: by layer name, what its router decided.

    Attributes:
        routing: one :class:`~moelora.routing.Routing` per routed layer, tokens flattened
            ``batch * seq``. Replaced at each forward, so memory stays bounded.
    """

    def __init__(self, *, keep_graph: bool = False) -> None:
        self.keep_graph = keep_graph
        self.routing: dict[str, Routing] = {}

    def begin_forward(self) -> None:
        """Forget the forward before."""
        self.routing = {}

    def add(self, layer_name: str, routing: Routing) -> None:
        """Keep one layer's decision."""
        self.routing[layer_name] = routing if self.keep_graph else routing.detach()


@contextmanager
def record_routing(model: nn.Module, *, keep_graph: bool = False) -> Iterator[RoutingRecord]:
    """Record what the routers of ``model`` decide while the block runs.

    Args:
        model: a PEFT model with LoRA adapters, or the model they were injected into.
        keep_graph: keep the tensors' graph, for a loss of your own; it lives as long as the record.

    Yields:
        The record; it stays readable after the block.

    Raises:
        UnsupportedLayerError: if the model has no LoRA adapters.
    """
    scope = scope_of(base_of(model))
    if scope is None:
        raise UnsupportedLayerError(
            f"{type(model).__name__} has no LoRA adapters whose routing could be recorded."
        )
    record = RoutingRecord(keep_graph=keep_graph)
    scope.recorders.append(record)
    try:
        yield record
    finally:
        scope.recorders.remove(record)
