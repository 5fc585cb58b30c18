"""A whole checkpoint of DyLoRA-MoE as its own code saved it, in each of its layouts.

``checkpoint-<n>/`` has ``peft_adapters/expert_<i>/`` (inside again ``expert_<i>/``, since PEFT
saves an adapter of that name there), ``router.safetensors`` or ``router.pt``, perhaps
``skill_library`` files, and ``config.json``. ``best_model/`` has ``peft_adapters/expert_<i>.pt``
and the rest in ``dylo_moe_state/``, which older runs put beside the folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelora.config import is_int, is_number
from moelora.errors import CheckpointError
from moelora.validation.files import check_floats, read_json, read_state
from moelora.validation.old_experts import OldExpert, find_experts, read_expert
from moelora.validation.old_router import OldRouter, read_router

_ADAPTERS, _STATE, _CONFIG = "peft_adapters", "dylo_moe_state", "config.json"
_MARK = "dylora"


@dataclass(frozen=True)
class OldCheckpoint:
    """What an old checkpoint holds.

    Attributes:
        folder: where it lies.
        experts: in routing order.
        router: None if there is no file of one.
        skills: skill embeddings by name; None if there is no library.
        lm_head: tensors of a trained output layer, by their name in the base model.
        base_model: folder or hub id of the base model, if it is told.
        config: the fields of its ``config.json``.
        notes: what a person should know of how it was read.
    """

    folder: Path
    experts: list[OldExpert]
    router: OldRouter | None
    skills: dict[str, Tensor] | None
    lm_head: dict[str, Tensor]
    base_model: str | None
    config: dict[str, Any]
    notes: list[str]


def is_old_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one of DyLoRA-MoE's own."""
    root = _root(folder)
    if (root / _ADAPTERS).is_dir() or (root / "expert_0.pt").is_file():
        return True
    config = root / _CONFIG
    if not config.is_file():
        return False
    return _MARK in str(read_json(config).get("model_type", "")).lower()


def read_old_checkpoint(folder: Path, *, lora_alpha: float | None = None) -> OldCheckpoint:
    """Read a checkpoint of DyLoRA-MoE; nothing in it is run.

    Args:
        folder: ``checkpoint-<n>``, ``best_model``, or the folder above ``best_model``.
        lora_alpha: for ``expert_<i>.pt`` files without a config that says it.

    Raises:
        CheckpointError: if a file is missing, damaged, refused, or contradicts another.
    """
    root = _root(folder)
    if not root.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    config = _config(root)
    adapters = root / _ADAPTERS
    alpha = lora_alpha if lora_alpha is not None else _number(config, "lora_alpha")
    experts, heads = [], []
    for path in find_experts(adapters if adapters.is_dir() else root):
        expert, rest = read_expert(path, lora_alpha=alpha)
        experts.append(expert)
        heads.append(rest)
    notes: list[str] = []
    router = _router(root, notes)
    skills = _skills(root)
    checkpoint = OldCheckpoint(
        folder=root,
        experts=experts,
        router=router,
        skills=skills,
        lm_head=_one_head(heads, root),
        base_model=_base_model(config, experts),
        config=config,
        notes=notes,
    )
    _check_counts(checkpoint)
    return checkpoint


def _root(folder: Path) -> Path:
    inner = folder / "best_model"
    has_own = (folder / _ADAPTERS).is_dir() or (folder / "expert_0.pt").is_file()
    return inner if inner.is_dir() and not has_own else folder


def _places(root: Path) -> list[Path]:
    """Where the state beside the experts may lie, the nearest first."""
    return [root, root / _STATE, root.parent / _STATE]


def _config(root: Path) -> dict[str, Any]:
    """The main config, with what the state's own adds."""
    merged: dict[str, Any] = {}
    for path in (root.parent / _STATE / _CONFIG, root / _STATE / _CONFIG, root / _CONFIG):
        if path.is_file():
            merged.update(read_json(path))
    return merged


def _number(config: dict[str, Any], name: str) -> float | None:
    for key in (f"_dylora_{name}", name):
        if key in config:
            value = config[key]
            if not is_number(value):
                raise CheckpointError(f"config.json: {key} must be a number, got {value!r}.")
            return float(value)
    return None


def _router(root: Path, notes: list[str]) -> OldRouter | None:
    names = ("router.safetensors", "router.pt")
    found = [place / name for place in _places(root) for name in names]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        notes.append("The checkpoint holds no router.")
        return None
    router = read_router(path)
    if router.router is None:
        notes.append(
            f"{path.name} is more than a linear gate (it holds {', '.join(sorted(router.tensors))})"
            " and cannot be expressed as a moelora router."
        )
    elif router.router.mature is None:
        notes.append(f"{path.name} does not say which experts are mature; all are taken as mature.")
    return router


def _skills(root: Path) -> dict[str, Tensor] | None:
    names = ("skill_library.safetensors", "skill_library.pt")
    found = [place / name for place in _places(root) for name in names]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None
    content = read_state(path)
    skills = {_skill_name(key, path): value for key, value in content.items()}
    check_floats(skills, str(path))
    widths = {tuple(value.shape) for value in skills.values()}
    if any(len(shape) != 1 for shape in widths) or len(widths) > 1:
        raise CheckpointError(
            f"{path} must hold one vector per skill, all of one width, got shapes {sorted(widths)}."
        )
    return skills


def _skill_name(key: Any, path: Path) -> str:
    if is_int(key) and key >= 0:
        return f"expert_{key}"
    if isinstance(key, str) and key and not any(c in key for c in "/\\\0:") and key != "..":
        number = key.rpartition(".")[2]
        return f"expert_{number}" if number.isdecimal() else key
    raise CheckpointError(f"{path} names a skill {key!r}, must be a number or a plain name.")


def _one_head(heads: list[dict[str, Tensor]], root: Path) -> dict[str, Tensor]:
    """The output layer that was trained with the experts; they share one."""
    first = heads[0]
    for head in heads[1:]:
        if head.keys() != first.keys() or any(
            head[key].shape != first[key].shape or not torch.equal(head[key], first[key])
            for key in head
        ):
            raise CheckpointError(
                f"The experts in {root} were saved with different output layers (lm_head), which "
                "one model cannot have."
            )
    return first


def _base_model(config: dict[str, Any], experts: list[OldExpert]) -> str | None:
    told = [config.get("base_model_name_or_path")]
    told += [expert.config.get("base_model_name_or_path") for expert in experts]
    return next((name for name in told if isinstance(name, str) and name), None)


def _check_counts(checkpoint: OldCheckpoint) -> None:
    experts = len(checkpoint.experts)
    told = [
        checkpoint.config[k]
        for k in ("_dylora_num_experts", "num_experts")
        if k in checkpoint.config
    ]
    if told and told[0] != experts:
        raise CheckpointError(
            f"config.json says {told[0]!r} experts, but {checkpoint.folder} holds {experts}."
        )
    router = checkpoint.router
    if router is not None and router.router is not None and router.router.num_experts != experts:
        raise CheckpointError(
            f"{router.source} routes over {router.router.num_experts} experts, but "
            f"{checkpoint.folder} holds {experts}."
        )
