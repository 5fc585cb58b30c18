"""Names of adapters: which may be given, and giving a model's adapter another one."""

from typing import Any

from torch import nn

from moelora import _peft
from moelora.binding import bind
from moelora.errors import ConfigError
from moelora.frozen import rename_frozen
from moelora.router_file import check_folder_name


def check_new_name(base: nn.Module, taken: list[str], name: object) -> str:
    """Refuse a name that PEFT or a file system would take for something else.

    Args:
        base: the base model, whose modules' names are taken too: PEFT tells an adapter's tensors
            by its name between dots.
        taken: the adapters there are.
        name: the new adapter's.

    Raises:
        CheckpointError: if it is no plain folder name.
        ConfigError: if it is no string, taken, or part of a module's name.
    """
    if not isinstance(name, str):
        raise ConfigError(f"An expert's name must be a string, got {name!r}.")
    check_folder_name(name, where="Expert ")
    if name in taken:
        raise ConfigError(f"There is an expert {name!r} already; the names are {taken}.")
    if "." in name or name.startswith("lora_") or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"An expert's name must hold no '.', not start with 'lora_' and be no attribute of "
            f"nn.ModuleDict, got {name!r}."
        )
    parts = {part for module_name, _ in base.named_modules() for part in module_name.split(".")}
    parts |= {key.rpartition(".")[2] for key, _ in base.named_parameters()}
    if name in parts - set(taken):
        raise ConfigError(
            f"An expert cannot be named {name!r}: modules of the model are named so, and PEFT "
            "would mix up their tensors when it saves."
        )
    return name


def rename_adapter(tuner: Any, old: str, new: str) -> None:
    """Give an adapter another name. Its tensors stay the same objects, its place the same.

    Args:
        tuner: the ``LoraModel``.
        old: its name.
        new: a checked, free name.
    """
    for module in tuner.model.modules():
        if isinstance(module, _peft.LoraLayer):
            _rename_in_layer(module, old, new)
    _rename_key(tuner.peft_config, old, new)
    tuner.active_adapter = [new if name == old else name for name in tuner.active_adapters]
    bind(tuner.model, tuner.peft_config)


def _rename_in_layer(layer: Any, old: str, new: str) -> None:
    names = (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
    for name in dict.fromkeys((*names, "frozen_peft_weight_names")):
        container = getattr(layer, name, {})
        if old in container:
            _rename_key(container, old, new)
    rename_frozen(layer, old, new)
    layer.merged_adapters = [new if name == old else name for name in layer.merged_adapters]
    layer._active_adapter = [new if name == old else name for name in layer.active_adapters]


def _rename_key(container: Any, old: str, new: str) -> None:
    """Rename in a dict or one of torch's; order and values stay."""
    items = list(container.items())
    container.clear()
    for key, value in items:
        container[new if key == old else key] = value
