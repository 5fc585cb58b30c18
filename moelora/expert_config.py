"""Configs of experts: what may differ between adapters that are active together."""

from dataclasses import fields
from typing import Any

from torch import nn

from moelora import _peft
from moelora.attached import tuner_of
from moelora.config import ROUTING_FIELDS, MoELoraConfig, is_int, is_number
from moelora.errors import ConfigError, UnsupportedLayerError

_SHARED_FIELDS = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "kasa_config",
    "arrow_config",
    "ensure_weight_tying",
)
_SAFE_INITS = ("gaussian", "eva", "orthogonal")


def experts_in(config: Any) -> int:
    """How many experts an adapter holds."""
    return getattr(config, "num_experts", 1)


def expert_config(values: dict[str, Any], routing: dict[str, Any] | None) -> Any:
    """The config of a new expert: a plain LoRA's, or with ``routing`` a routed adapter's.

    Raises:
        ConfigError: if a field is unknown, wrong, or cannot differ between experts.
    """
    cls: type[Any] = _peft.LoraConfig if routing is None else MoELoraConfig
    unknown = sorted(values.keys() - {field.name for field in fields(cls)})
    if unknown:
        raise ConfigError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}.")
    try:
        config = cls(**{**values, **(routing or {})})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The expert's config is wrong: {error}") from error
    _check_numbers(config)
    check_config(config)
    return config


def _check_numbers(config: Any) -> None:
    """Check what PEFT finds out when it makes layers, or not at all."""
    if not is_int(config.r) or config.r < 1:
        raise ConfigError(f"r must be an integer of at least 1, got {config.r!r}.")
    if not is_number(config.lora_alpha):
        raise ConfigError(f"lora_alpha must be a finite number, got {config.lora_alpha!r}.")
    if not is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be a number in [0, 1), got {config.lora_dropout!r}.")


def check_model(model: Any) -> None:
    """Refuse models whose adapters cannot be managed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, _peft.PeftMixedModel | _peft.BaseTuner):
        raise UnsupportedLayerError(
            f"An ExpertManager needs a base model or a PeftModel, got {type(model).__name__}."
        )
    if isinstance(model, _peft.PeftModel):
        tuner_of(model)
        for name, config in model.peft_config.items():
            check_config(config, where=f"Adapter {name!r} ")
    elif any(isinstance(module, _peft.BaseTunerLayer) for module in model.modules()):
        raise UnsupportedLayerError(
            "The model has adapters injected into it. An ExpertManager needs a base model without "
            "adapters, or a PeftModel."
        )


def check_config(config: Any, *, where: str = "An expert ") -> None:
    """Refuse options that several active adapters cannot each have.

    Raises:
        ConfigError: naming the option and its value.
    """
    for name in _SHARED_FIELDS:
        value = getattr(config, name, None)
        if value:
            raise ConfigError(
                f"{where}cannot have {name}={value!r}: it changes the base model, which all "
                "experts share, or allows one active adapter only."
            )
    if config.bias != "none":
        raise ConfigError(
            f"{where}must have bias='none', got {config.bias!r}: all experts share the base "
            "model's biases."
        )
    init = config.init_lora_weights
    if not isinstance(init, bool) and init not in _SAFE_INITS:
        raise ConfigError(
            f"{where}must have init_lora_weights True, False or one of {', '.join(_SAFE_INITS)}, "
            f"got {init!r}: it would change the base weights under the other experts."
        )


def routing_fields(routing: MoELoraConfig | None) -> dict[str, Any] | None:
    """The fields that make each expert a routed adapter of its own."""
    if routing is None:
        return None
    if not isinstance(routing, MoELoraConfig):
        raise TypeError(f"routing must be a MoELoraConfig or None, got {type(routing).__name__}.")
    if not routing.has_router:
        raise ConfigError(
            "routing needs a learned router, got use_moe_routing="
            f"{routing.use_moe_routing}, router_type={routing.router_type!r}."
        )
    values = {name: getattr(routing, name) for name in ROUTING_FIELDS}
    return {**values, "num_experts": 1, "joins_mixture": True}
