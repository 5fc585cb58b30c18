"""One routing decision: the routers that decide together, from their input to a ``Routing``.

The same for every scope: a router in each layer, one per block, or one for the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelora.auxiliary import attach_deferred
from moelora.config import MoELoraConfig
from moelora.router import ModuleRouter
from moelora.routing import (
    Routing,
    drop_experts,
    limit_capacity,
    share_while_immature,
    top_k_routing,
)
from moelora.scope import Frame, RoutingScope, Tape, TapeEntry


@dataclass(frozen=True)
class MixtureSpec:
    """What a layer keeps of the config of one stacked adapter."""

    num_experts: int
    routed: bool
    has_router: bool
    router_scope: str
    top_k: int
    temperature: float
    capacity_factor: float | None
    expert_dropout: float
    loss_type: str
    aux_loss_coef: float
    balance_over_ranks: bool
    fixed_weights: tuple[float, ...]

    @classmethod
    def from_config(cls, config: MoELoraConfig) -> "MixtureSpec":
        """Take the routing fields of ``config``."""
        capacity_factor = config.expert_capacity_factor
        uniform = [1.0 / config.num_experts] * config.num_experts
        return cls(
            num_experts=config.num_experts,
            routed=config.routed,
            has_router=config.has_router,
            router_scope=config.router_scope,
            top_k=config.top_k_experts,
            temperature=float(config.router_temperature),
            capacity_factor=None if capacity_factor is None else float(capacity_factor),
            expert_dropout=float(config.expert_dropout),
            loss_type=config.load_balance_loss_type,
            aux_loss_coef=float(config.router_aux_loss_coef),
            balance_over_ranks=config.balance_over_ranks,
            fixed_weights=tuple(config.fixed_routing_weights or uniform),
        )


def consecutive_columns(experts_of: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The columns of mixtures whose experts are concatenated in order.

    Example:
        >>> consecutive_columns({"a": 4, "b": 2})
        {'a': (0, 4), 'b': (4, 6)}
    """
    columns = {}
    start = 0
    for adapter, experts in experts_of.items():
        columns[adapter] = (start, start + experts)
        start += experts
    return columns


def decide(
    inputs: Tensor,
    routers: Sequence[tuple[ModuleRouter, MixtureSpec]],
    *,
    name: str,
    training: bool,
    scope: RoutingScope | None,
    frame: Frame | None,
    token_mask: Tensor | None,
) -> Routing:
    """Let all routers decide together over all their experts, and report what they decided.

    Each mixture's temperature divides its own logits; top-k, capacity, dropout and loss are those
    of the first one. Top-k is at most the number of experts.

    Args:
        inputs: what the routers read, ``(..., features)`` or token ids ``(...)``.
        routers: at least one router with the spec of its mixture, in the order of their experts.
        name: the layer or block the decision is for, in records and errors.
        training: whether capacity, expert dropout and auxiliary losses are in effect.
        scope: the model's routing scope; None outside of a model.
        frame: the current forward.
        token_mask: ``(tokens,)`` True for real tokens, or None.

    Returns:
        The decision for the flattened tokens.
    """
    spec = routers[0][1]
    logits = [
        router(inputs).reshape(-1, router.num_experts) / router_spec.temperature
        for router, router_spec in routers
    ]
    top_k = min(spec.top_k, sum(router.num_experts for router, _ in routers))
    routing = top_k_routing(torch.cat(logits, dim=-1), top_k=top_k)
    if training and spec.capacity_factor is not None:
        routing = limit_capacity(
            routing, capacity_factor=spec.capacity_factor, token_mask=token_mask
        )
    if any(router.mature is not None for router, _ in routers):
        mature = [
            logits[0].new_ones(router.num_experts, dtype=torch.bool)
            if router.mature is None
            else router.mature
            for router, _ in routers
        ]
        routing = share_while_immature(routing, torch.cat(mature))
    dropped_share = routers[0][0].dropped_share
    if training and dropped_share > 0:
        routing = drop_experts(routing, probability=dropped_share)
    if scope is None:
        return routing
    for recorder in scope.recorders:
        recorder.add(name, routing)
    if frame is None or frame.tape is None:
        return routing
    if not frame.tape.takes(training=training, coefficient=spec.aux_loss_coef):
        return routing
    entry = TapeEntry(
        layer_name=name,
        routing=routing,
        token_mask=token_mask,
        loss_type=spec.loss_type,
        coefficient=spec.aux_loss_coef,
        router_is_trainable=any(p.requires_grad for r, _ in routers for p in r.parameters()),
        checkpointed=frame.checkpointed,
        over_ranks=training and spec.balance_over_ranks,
    )
    weights = report(routing.routing_weights, entry, frame.tape)
    return replace(routing, routing_weights=weights)


def report(result: Tensor, entry: TapeEntry, tape: Tape) -> Tensor:
    """Leave a decision on the tape; in a recomputation, whose tape is closed, attach its loss.

    Args:
        result: what the decision led to, the weights or the layer's output.
        entry: the decision.
        tape: that of the decision's forward.
    """
    if tape.closed:
        return attach_deferred(result, entry, tape)
    tape.add(entry)
    return result
