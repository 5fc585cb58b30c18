"""Giving a base model its hooks and each adapted layer its place; and taking both away."""

from typing import Any

from torch import nn

from moelora import _peft
from moelora.config import MoELoraConfig
from moelora.decision import MixtureSpec
from moelora.hooks import after_forward, before_forward, refuse_in_backbone
from moelora.layer import mixtures_of
from moelora.places import block_of, is_encoder_decoder, module_lists, reads_decoder
from moelora.router_request import announce, withdraw
from moelora.scope import (
    ATTACHED,
    ATTACHED_SPEC,
    SCOPE,
    LayerBinding,
    RoutingScope,
    ScopedCheckpoint,
    scope_of,
)
from moelora.shared import bind_shared, unbind_shared
from moelora.shared_input import groups_for_traces


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel or LoraModel; any other module is its own base."""
    # a tuple: torch.compile of torch 2.6 cannot trace a union made in place
    if isinstance(model, (_peft.PeftModel, _peft.PeftMixedModel)):
        inner = model.base_model
        return inner.model if isinstance(inner, _peft.BaseTuner) else inner
    return model.model if isinstance(model, _peft.BaseTuner) else model


def bind(base: nn.Module, peft_config: dict[str, Any]) -> RoutingScope:
    """Give every LoRA layer of ``base`` its place, and the base its hooks. Idempotent.

    The hooks are permanent (while the adapters are), because the base model is the one place that
    every caller passes: PeftModel with or without a task type, a bare LoraModel, an injected model,
    trainers that call the base directly.
    """
    scope = scope_of(base)
    if scope is None:
        scope = RoutingScope()
        base.__dict__[SCOPE] = scope
        base.register_forward_pre_hook(before_forward, with_kwargs=True)
        base.register_forward_hook(after_forward, with_kwargs=True, always_call=True)
        for backbone in _backbones(base):
            backbone.register_forward_pre_hook(refuse_in_backbone, with_kwargs=True)
    experts_of = {
        name: config.num_experts if isinstance(config, MoELoraConfig) else 1
        for name, config in peft_config.items()
    }
    scope.input_groups = None
    lists = module_lists(base)
    two_stacks = is_encoder_decoder(base)
    shared: dict[str, dict[str, dict[str, Any]]] = {"layer": {}, "model": {}}
    for name, module in base.named_modules():
        if not isinstance(module, _peft.LoraLayer):
            continue
        block = block_of(name, lists)
        module.__dict__["_moelora_binding"] = LayerBinding(
            scope=scope,
            name=name,
            block=None if block is None else block[1:],
            block_name=None if block is None else block[0],
            reads_decoder=two_stacks and reads_decoder(name),
            experts_of=experts_of,
        )
        for adapter, spec in _shared_mixtures(module).items():
            key = "" if spec.router_scope == "model" or block is None else block[0]
            shared[spec.router_scope].setdefault(key, {})[adapter] = module
    for router_scope, hosts in shared.items():
        bind_shared(
            base,
            scope,
            router_scope=router_scope,
            hosts=hosts,
            reads_decoder=lambda name: two_stacks and reads_decoder(name),
        )
    scope.groups_for_traces = groups_for_traces(base)
    scope_checkpointing(base, scope)
    announce(base, peft_config)
    return scope


def _shared_mixtures(layer: Any) -> dict[str, MixtureSpec]:
    """The mixtures whose shared router lies in this layer."""
    routers = layer._modules.get("lora_router", ())
    return {
        name: spec
        for name, spec in mixtures_of(layer).items()
        if name in routers and spec.router_scope != "module"
    }


def unbind(base: nn.Module) -> None:
    """Remove what :func:`bind` left on the base model."""
    base.__dict__.pop(ATTACHED, None)
    base.__dict__.pop(ATTACHED_SPEC, None)
    scope = base.__dict__.pop(SCOPE, None)
    if scope is None:
        return
    withdraw(scope)
    unbind_shared(base)
    for module in (base, *_backbones(base)):
        _remove_hooks(module)
    for module in base.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, ScopedCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = checkpoint.checkpoint


def _backbones(base: nn.Module) -> list[nn.Module]:
    """The model inside a model with a head, as transformers names it."""
    inner = getattr(base, "base_model", None)
    return [inner] if isinstance(inner, nn.Module) and inner is not base else []


def _remove_hooks(module: nn.Module) -> None:
    ours = (before_forward, after_forward, refuse_in_backbone)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def scope_checkpointing(base: nn.Module, scope: RoutingScope) -> None:
    """Let blocks that are recomputed see the routing of their own forward."""
    for module in base.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, ScopedCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = ScopedCheckpoint(checkpoint, scope)
