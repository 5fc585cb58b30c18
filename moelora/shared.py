"""Routers that many layers share: one per transformer block, or one for the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moelora.decision import consecutive_columns, decide
from moelora.layer import mixtures_of
from moelora.scope import Frame, RoutingScope, SharedRouting

_ROUTERS = "_moelora_shared_routers"


@dataclass
class SharedRouters:
    """The routers of one block or of the model.

    Attributes:
        scope: the model's routing scope.
        name: the block's name; ``""`` for the model.
        hosts: the LoRA layer in which each mixture's router lies, by adapter name.
        reads_decoder: True if the block's tokens are the decoder's.
    """

    scope: RoutingScope
    name: str
    hosts: dict[str, Any]
    reads_decoder: bool

    def decide(self, hidden_states: Tensor, frame: Frame) -> SharedRouting | None:
        """Let the active mixtures' routers decide; None if there are none or they are disabled.

        A single expert has nothing to be chosen from: no router reads anything then.

        Args:
            hidden_states: ``(batch, seq, hidden)``.
            frame: the current forward.
        """
        active = self.active()
        if not active:
            return None
        if not self.chooses():
            return SharedRouting(None, {})
        specs = {adapter: mixtures_of(host)[adapter] for adapter, host in active.items()}
        first = next(iter(active.values()))
        device = first.lora_router[next(iter(active))].weight.device
        mask = frame.decoder_token_mask if self.reads_decoder else frame.token_mask
        if mask is not None and mask.shape != hidden_states.shape[:-1]:
            mask = None
        routing = decide(
            hidden_states.to(device),
            [(host.lora_router[adapter], specs[adapter]) for adapter, host in active.items()],
            name=self.name or "model",
            training=first.training,
            scope=self.scope,
            frame=frame,
            token_mask=None if mask is None else mask.reshape(-1).to(device),
        )
        weights = routing.routing_weights
        weights = weights.reshape(*hidden_states.shape[:-1], weights.shape[-1])
        columns = consecutive_columns({a: spec.num_experts for a, spec in specs.items()})
        return SharedRouting(weights, columns)

    def chooses(self) -> bool:
        """Whether more than one expert is active."""
        hosts = self.active().items()
        return sum(mixtures_of(host)[adapter].num_experts for adapter, host in hosts) > 1

    def active(self) -> dict[str, Any]:
        """The hosts of active mixtures, in the order of ``active_adapters``."""
        host = next(iter(self.hosts.values()))
        if host.disable_adapters:
            return {}
        return {a: self.hosts[a] for a in host.active_adapters if a in self.hosts}


def shared_routers_of(module: nn.Module) -> SharedRouters | None:
    """The shared routers bound to a block or base model."""
    routers: SharedRouters | None = module.__dict__.get(_ROUTERS)
    return routers


def bind_shared(
    base: nn.Module,
    scope: RoutingScope,
    *,
    router_scope: str,
    hosts: dict[str, dict[str, Any]],
    reads_decoder: Callable[[str], bool],
) -> None:
    """Tell each block (or the model, named ``""``) which routers it has.

    Args:
        base: the base model.
        scope: its routing scope.
        router_scope: ``"layer"`` or ``"model"``.
        hosts: by block name, then adapter name, the LoRA layer that holds the router.
        reads_decoder: whether a block's tokens are the decoder's.
    """
    for name, by_adapter in hosts.items():
        module = base.get_submodule(name)
        module.__dict__[_ROUTERS] = SharedRouters(scope, name, by_adapter, reads_decoder(name))
        hooks = module._forward_pre_hooks.values()
        if router_scope == "layer" and not any(hook is _before_block for hook in hooks):
            module.register_forward_pre_hook(_before_block, with_kwargs=True)


def unbind_shared(base: nn.Module) -> None:
    """Remove what :func:`bind_shared` left."""
    for module in base.modules():
        if module.__dict__.pop(_ROUTERS, None) is None:
            continue
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _before_block]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Route the block's input hidden states for all layers in it."""
    routers = shared_routers_of(block)
    frame = None if routers is None else routers.scope.top
    if routers is None or frame is None or frame.weights is not None or frame.adapters_off:
        return
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden_states, Tensor):
        return
    shared = routers.decide(hidden_states, frame)
    if shared is not None:
        frame.shared[routers.name] = shared
