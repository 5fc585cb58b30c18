"""The router of an old DyLoRA-MoE checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelora.config import is_int, is_number
from moelora.errors import CheckpointError
from moelora.gate_router import GateRouter
from moelora.router_file import is_ours
from moelora.validation.files import check_floats, read_state

#: What upstream's router had where its file does not say.
DEFAULT_TOP_K, DEFAULT_TEMPERATURE = 1, 2.0
_GATE = {"gate.weight", "gate.bias"}


@dataclass(frozen=True)
class OldRouter:
    """A router's tensors, and a :class:`GateRouter` if it is a linear gate.

    Attributes:
        router: the same function as a moelora router; None if it is more than a linear gate.
        tensors: as they were, by name.
        source: the file.
    """

    router: GateRouter | None
    tensors: dict[str, Tensor]
    source: Path


def read_router(path: Path) -> OldRouter:
    """Read ``router.pt``, as a state dict or as upstream's ``save`` writes it, or its safetensors.

    Raises:
        CheckpointError: if it is damaged, moelora's own, or a gate that contradicts itself.
    """
    if path.suffix == ".safetensors" and is_ours(path):
        raise CheckpointError(f"{path} is moelora's own router file, not an old one.")
    content = read_state(path)
    settings: dict[str, Any] = {}
    if "gate_state_dict" in content:
        settings = {key: value for key, value in content.items() if key != "gate_state_dict"}
        gate = content["gate_state_dict"]
        if not isinstance(gate, dict):
            raise CheckpointError(f"{path}: gate_state_dict must be a dict of tensors.")
        content = {f"gate.{key}": value for key, value in gate.items()}
    if not content or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds no router: it must map names to tensors.")
    check_floats(content, str(path))
    if content.keys() - _GATE or "gate.weight" not in content:
        return OldRouter(None, content, path)
    return OldRouter(_gate(content, settings, path), content, path)


def _gate(tensors: dict[str, Tensor], settings: dict[str, Any], path: Path) -> GateRouter:
    weight = tensors["gate.weight"]
    if weight.ndim != 2:
        raise CheckpointError(
            f"{path}: gate.weight must be (experts, hidden), got shape {tuple(weight.shape)}."
        )
    experts, width = weight.shape
    bias = tensors.get("gate.bias", torch.zeros(experts))
    if tuple(bias.shape) != (experts,):
        raise CheckpointError(
            f"{path}: gate.bias must have shape ({experts},), got {tuple(bias.shape)}."
        )
    for name, value in (("num_experts", experts), ("input_size", width)):
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"{path} says {name}={settings[name]!r}, but its gate has {value}."
            )
    top_k = settings.get("top_k", DEFAULT_TOP_K)
    temperature = settings.get("temperature", DEFAULT_TEMPERATURE)
    if not is_int(top_k) or not 1 <= top_k <= experts:
        raise CheckpointError(f"{path}: top_k must be in [1, {experts}], got {top_k!r}.")
    if not is_number(temperature) or temperature <= 0:
        raise CheckpointError(f"{path}: temperature must be > 0, got {temperature!r}.")
    mature = _maturity(settings.get("expert_maturity"), experts, path)
    router = GateRouter(
        width,
        experts,
        top_k=top_k,
        temperature=float(temperature),
        track_maturity=mature is not None,
    )
    router.to(torch.promote_types(weight.dtype, torch.float32))
    state = {"weight": weight, "bias": bias}
    router.load_state_dict(state if mature is None else {**state, "mature": mature})
    return router.eval()


def _maturity(value: Any, experts: int, path: Path) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or tuple(value.shape) != (experts,):
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        raise CheckpointError(f"{path}: expert_maturity must have shape ({experts},), got {got!r}.")
    # 0 means new; every other value mature
    return value != 0
