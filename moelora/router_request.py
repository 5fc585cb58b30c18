"""How trainers ask a model for its router loss: the contract of ``output_router_logits``.

A config that has this attribute tells that the model answers (transformers' mixture-of-experts
models, and TRL since 1.7, which takes its ``router_aux_loss_coef`` only then); the forward argument
of that name asks for ``outputs.aux_loss``, unscaled, which the caller weighs and logs.
"""

from typing import Any

from torch import nn

from moelora.config import MoELoraConfig
from moelora.router import Router
from moelora.scope import ATTACHED, ATTACHED_SPEC, RoutingScope, live_scopes, scope_of

_NAME = "output_router_logits"


def announce(base: nn.Module, peft_config: dict[str, Any]) -> None:
    """Let the config of ``base`` tell that it answers, while a router with a loss is there.

    A base model with routers of its own tells so already and is left alone.

    Args:
        base: a bound base model.
        peft_config: the adapters' configs, by name.
    """
    scope = scope_of(base)
    if scope is None:
        return
    spec: Any = base.__dict__.get(ATTACHED_SPEC)
    answers = isinstance(base.__dict__.get(ATTACHED), Router) and spec.aux_loss_coef != 0
    if not (answers or any(map(_has_loss, peft_config.values()))):
        withdraw(scope)
    elif scope.announced is None:
        config = _text_config(base)
        if config is not None and not hasattr(config, _NAME):
            scope.announced = config
            setattr(config, _NAME, False)


def _has_loss(config: Any) -> bool:
    learned = isinstance(config, MoELoraConfig) and config.has_router
    return learned and config.router_aux_loss_coef != 0


def withdraw(scope: RoutingScope) -> None:
    """Leave the config as it was."""
    config, scope.announced = scope.announced, None
    _unset(config)


def withdraw_all() -> None:
    """Leave the config of every live model as it was; :func:`announce_again` undoes it."""
    for scope in live_scopes():
        _unset(scope.announced)


def announce_again() -> None:
    """Let the configs tell again, after :func:`withdraw_all`."""
    for scope in live_scopes():
        if scope.announced is not None and not hasattr(scope.announced, _NAME):
            setattr(scope.announced, _NAME, False)


def take_request(scope: RoutingScope, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for ``outputs.aux_loss``; takes the argument out of ``kwargs``.

    A base model with routers of its own keeps the argument.
    """
    asked = kwargs.get(_NAME)
    config = scope.announced
    if config is None:
        return bool(asked)
    kwargs.pop(_NAME, None)
    if getattr(config, _NAME, False):
        if kwargs.get("fused_lm_head"):
            # TRL's own head reads the config and would ask the base for router logits
            kwargs[_NAME] = False
        return asked is not False
    return bool(asked)


def _unset(config: Any) -> None:
    if config is not None:
        vars(config).pop(_NAME, None)


def _text_config(base: nn.Module) -> Any:
    """The config that callers look at; None where there is none or several."""
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    try:
        return config.get_text_config()
    except ValueError:  # several: no caller can tell which
        return None
