"""Experts to and from disk, and from one model to another."""

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moelora import _peft
from moelora.adapter_folder import ROUTER_KEY, Locator
from moelora.attached_file import is_attached_file
from moelora.config import DISK_PEFT_TYPE, ROUTING_FIELDS, MoELoraConfig
from moelora.errors import CheckpointError, ConfigError, UnsupportedLayerError
from moelora.expert_config import check_config, experts_in
from moelora.expert_record import (
    EXPERTS_FILE,
    ExpertRecord,
    read_records,
    records_of,
    write_records,
)
from moelora.expert_set import ExpertSet
from moelora.new_folder import check_new_folder, new_folder
from moelora.rollback import unchanged_on_error
from moelora.router_file import ROUTER_FILE, check_folder_name, read_router_file, read_tensors


@dataclass(frozen=True)
class FoundExpert:
    """An adapter read from somewhere.

    Attributes:
        name: what it is called there.
        where: the folder, hub id or model, for messages.
        config: its config, a copy.
        tensors: its tensors by name, without the adapter's name, as PEFT saves them.
        record: what is known of it.
    """

    name: str
    where: str
    config: Any
    tensors: dict[str, Tensor]
    record: ExpertRecord


# One expert ----------------------------------------------------------------------------------


def read_source(source: Any, adapter: Any) -> FoundExpert:
    """Read an adapter from a folder, the hub, a model or an ExpertManager.

    Raises:
        CheckpointError: if files are missing or damaged.
        ConfigError: if there is no such adapter, or its config cannot be an expert's.
        TypeError: if ``source`` is none of these.
    """
    if isinstance(source, ExpertSet):
        names = source.get_all_adapter_names()
        if adapter is not None:
            adapter = source.name_of(adapter)
        return _from_model(source.model, adapter, names)
    if isinstance(source, nn.Module):
        return _from_model(source, adapter, list(getattr(source, "peft_config", {})))
    if isinstance(source, str | os.PathLike):
        return _from_folder(source, adapter)
    raise TypeError(
        "source must be a folder, a hub id, a PEFT model or an ExpertManager, got "
        f"{type(source).__name__}."
    )


def _from_model(model: Any, adapter: Any, names: list[str]) -> FoundExpert:
    if not isinstance(model, _peft.PeftModel):
        raise ConfigError(f"The source {type(model).__name__} has no adapters.")
    if adapter is None and len(names) == 1:
        adapter = names[0]
    if adapter not in names:
        raise ConfigError(f"adapter must be one of {names}, got {adapter!r}.")
    config = copy.deepcopy(model.peft_config[adapter])
    _check_lora(config, f"Adapter {adapter!r}")
    tensors = _peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    record = records_of(model.base_model)[adapter]
    return FoundExpert(adapter, f"adapter {adapter!r}", config, tensors, record)


def _from_folder(source: Any, adapter: Any) -> FoundExpert:
    text = os.fspath(source)
    if adapter is not None:
        if not isinstance(adapter, str):
            raise ConfigError(f"adapter must be the name of a subfolder, got {adapter!r}.")
        check_folder_name(adapter, where="The subfolder ")
    locate = Locator(text, adapter, {})
    config_path = locate(_peft.CONFIG_NAME)
    if config_path is None:
        raise CheckpointError(f"{locate.where} holds no {_peft.CONFIG_NAME}, so it is no adapter.")
    config = _read_config(config_path)
    weights = locate(_peft.SAFETENSORS_WEIGHTS_NAME)
    if weights is None:
        raise CheckpointError(
            f"{locate.where} holds no {_peft.SAFETENSORS_WEIGHTS_NAME}. Only safetensors are read."
        )
    name = adapter or Path(text).resolve().name
    known = Locator(text, None, {})
    path = known(EXPERTS_FILE) or (None if adapter else known.above(EXPERTS_FILE))
    record = ExpertRecord() if path is None else read_records(path).get(name, ExpertRecord())
    tensors = {k: t for k, t in read_tensors(weights).items() if ".lora_" in k}
    return FoundExpert(name, locate.where, config, tensors, record)


def _read_config(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    classes: dict[Any, Any] = {"LORA": _peft.LoraConfig, DISK_PEFT_TYPE: MoELoraConfig}
    if not isinstance(kind, str) or kind not in classes:
        raise CheckpointError(
            f"{path} describes an adapter of peft_type {kind!r}, must be one of {list(classes)}."
        )
    try:
        config = _peft.PeftConfig.from_peft_type(**content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_lora(config, str(path))
    return config


def _check_lora(config: Any, where: str) -> None:
    if not isinstance(config, _peft.LoraConfig):
        raise ConfigError(f"{where} is no LoRA adapter, but {type(config).__name__}.")
    check_config(config, where=f"{where} ")


def converted(found: FoundExpert, routing: dict[str, Any] | None) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's config and tensors as those of an expert with or without router rows.

    A mixture of several experts stays what it is.

    Raises:
        ConfigError: if the config cannot be routed (DoRA ...).
    """
    config, tensors = found.config, found.tensors
    config.inference_mode = False
    if experts_in(config) > 1:
        return config, tensors
    tensors = {key: tensor for key, tensor in tensors.items() if ROUTER_KEY not in key}
    if routing is None:
        return plain_config(config), tensors
    if getattr(config, "has_router", False):
        return config, found.tensors
    values = {**_lora_fields(config), **routing}
    return MoELoraConfig(**values), tensors


def plain_config(config: Any) -> Any:
    """The config of a plain LoRA adapter with the same tensors (but for routers)."""
    return config if type(config) is _peft.LoraConfig else _peft.LoraConfig(**_lora_fields(config))


def _lora_fields(config: Any) -> dict[str, Any]:
    names = {field.name for field in fields(_peft.LoraConfig) if field.init}
    return {name: getattr(config, name) for name in names - {"peft_type"}}


def set_tensors(model: Any, name: str, tensors: dict[str, Tensor] | None) -> None:
    """Give an adapter its tensors, after checking that they are what it needs.

    Router rows that were not given stay as they were drawn.

    Raises:
        CheckpointError: if tensors are missing, unknown, of another shape or kind, or not finite.
    """
    if tensors is None:
        return
    own = _peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    rows = {key: tensor for key, tensor in own.items() if ROUTER_KEY in key}
    tensors = {**rows, **tensors}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, too"
        raise CheckpointError(
            f"Expert {name!r} does not fit this model: it {problem} ({len(missing)} tensors are "
            f"missing, {len(unknown)} have no place)."
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"Tensor {key!r} of expert {name!r} has shape {tuple(tensor.shape)}, must have "
                f"{tuple(own[key].shape)}."
            )
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise CheckpointError(
                f"Tensor {key!r} of expert {name!r} has dtype {tensor.dtype}, must be like "
                f"{own[key].dtype}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"Tensor {key!r} of expert {name!r} holds NaN or infinity.")
    _peft.set_peft_model_state_dict(model, tensors, adapter_name=name)


def export_adapter(manager: Any, name: str, folder: Any) -> Path:
    """Write one adapter as a plain LoRA, as :meth:`ExpertManager.export_expert`."""
    config = manager.model.peft_config[name]
    if experts_in(config) > 1:
        raise UnsupportedLayerError(
            f"{name!r} is a mixture of {experts_in(config)} experts, no plain LoRA. "
            "moelora.export_expert(model, folder, expert=...) writes one of them."
        )
    target = check_new_folder(folder)
    tensors = _peft.get_peft_model_state_dict(manager.model, adapter_name=name)
    tensors = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in tensors.items()
        if ROUTER_KEY not in key
    }
    plain = copy.deepcopy(plain_config(config))
    plain.inference_mode = True
    base = manager.model.get_base_model()
    if plain.base_model_name_or_path is None:
        plain.base_model_name_or_path = base.__dict__.get("name_or_path")
    with new_folder(target) as temporary:
        plain.save_pretrained(str(temporary))
        save_file(tensors, temporary / _peft.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return target


# The whole set -------------------------------------------------------------------------------


def save_experts(manager: Any, folder: Path) -> None:
    """Write all experts, as :meth:`ExpertManager.save`."""
    names = manager.get_all_adapter_names()
    if not names:
        raise ConfigError("There are no experts yet. Make one with create_expert().")
    for name in names:
        check_folder_name(name, where="Expert ")
    records = {name: manager.record(name) for name in names}
    # the attached router's file names the active adapters as its experts
    with _all_active(manager, names):
        manager.model.save_pretrained(str(folder))
    write_records(folder, records)


@contextmanager
def _all_active(manager: Any, names: list[str]) -> Iterator[None]:
    active, flags = manager.active_experts, [(p, p.requires_grad) for p in _parameters(manager)]
    tuner, current = manager.model.base_model, manager.model.active_adapter
    tuner.set_adapter(names)
    try:
        yield
    finally:
        tuner.set_adapter(active)
        manager.model.active_adapter = current
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _parameters(manager: Any) -> Iterator[nn.Parameter]:
    parameters: Iterator[nn.Parameter] = manager.model.parameters()
    return parameters


def load_experts(
    cls: Any, model: Any, folder: Any, *, is_trainable: bool, defaults: dict[str, Any]
) -> Any:
    """Load all experts, as :meth:`ExpertManager.load`."""
    cls(model, **defaults)
    if isinstance(model, _peft.PeftModel):
        raise ConfigError("The model has adapters already. Load experts over a base model.")
    locate = Locator(os.fspath(folder), None, {})
    records = _saved_experts(locate)
    for name in records:
        place = _place(locate, name)
        if place(_peft.CONFIG_NAME) is None:
            raise CheckpointError(f"{locate.where} has no folder of expert {name!r}.")
    with unchanged_on_error(model):
        loaded = _load_adapters(model, locate, list(records), is_trainable=is_trainable)
        configs = list(loaded.peft_config.values())
        for name, config in loaded.peft_config.items():
            _check_lora(config, f"Expert {name!r}")
        manager = cls(loaded, **{**_like(configs[0]), **defaults})
    records_of(manager.model.base_model).update(records)
    frozen = [name for name, record in records.items() if record.frozen]
    if frozen:
        manager.freeze(frozen)
    manager.activate_all_experts()
    return manager


def _load_adapters(model: Any, locate: Locator, names: list[str], *, is_trainable: bool) -> Any:
    loaded: Any = None
    for name in names:
        place = _place(locate, name)
        where = str(place.local) if place.local.is_dir() else place.model_id
        arguments: dict[str, Any] = {"is_trainable": is_trainable}
        if not place.local.is_dir() and place.subfolder is not None:
            arguments["subfolder"] = place.subfolder
        if loaded is None:
            loaded = _peft.PeftModel.from_pretrained(model, where, adapter_name=name, **arguments)
        else:
            loaded.load_adapter(where, name, **arguments)
    return loaded


def _place(locate: Locator, name: str) -> Locator:
    """Where an adapter lies: PEFT writes the one named default into the folder itself."""
    return locate if name == "default" else Locator(locate.model_id, name, {})


def _saved_experts(locate: Locator) -> dict[str, ExpertRecord]:
    """The experts of a folder in routing order, with what is known of them."""
    try:
        path = locate(EXPERTS_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{locate.where} is no folder here, and not to be had from the hub: {error}"
        ) from error
    if path is not None:
        return read_records(path)
    router = locate(ROUTER_FILE)
    if router is not None and is_attached_file(router):
        return {name: ExpertRecord() for name in read_router_file(router).experts}
    names = ["default"] if locate(_peft.CONFIG_NAME) is not None else []
    if locate.local.is_dir():
        inner = [path.parent.name for path in locate.local.glob(f"*/{_peft.CONFIG_NAME}")]
        names += sorted(inner, key=_natural)
    if not names:
        raise CheckpointError(f"{locate.where} holds neither {EXPERTS_FILE} nor an adapter.")
    return {name: ExpertRecord() for name in names}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts expert_2 before expert_10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _like(config: Any) -> dict[str, Any]:
    """Defaults for new experts, after one that is there."""
    values: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type")
    }
    if isinstance(values["target_modules"], set):
        values["target_modules"] = sorted(values["target_modules"])
    if getattr(config, "has_router", False):
        routing = {name: getattr(config, name) for name in ROUTING_FIELDS}
        values["routing"] = MoELoraConfig(**{**routing, "num_experts": 1, "joins_mixture": True})
    return values
