"""Turning an old DyLoRA-MoE checkpoint into moelora's files, whole or not at all."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moelora import _peft
from moelora.adapter_folder import read_shapes
from moelora.errors import CheckpointError
from moelora.new_folder import new_folder
from moelora.router_file import ATTACHED, read_router_file, write_router_file
from moelora.skill_library import SKILL_LIBRARY_FILE, SkillLibrary
from moelora.validation.old_checkpoint import OldCheckpoint, read_old_checkpoint
from moelora.validation.old_experts import OldExpert

METADATA_FILE = "conversion.json"
HEAD_FILE = "lm_head.safetensors"
UNKNOWN_ROUTER_FILE = "router_original.safetensors"
_ROUTER_NOTE = (
    "DyLoRA-MoE asked its router with the hidden states of a pass in which all experts were active "
    "and summed. To get the same weights, do so too and pass them as routing_weights; a router "
    "that routes by itself reads a pass without adapters, and decides differently."
)


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        out: the new folder.
        experts: names of the adapters, each a folder in it, in routing order.
        router: ``"converted"``, ``"kept"`` (as tensors that no moelora router expresses) or
            ``"none"``.
        skills: number of skill embeddings; None without a library.
        base_model: folder or hub id of the base model, if known.
        notes: what a person should know.
    """

    out: str
    experts: list[str]
    router: str
    skills: int | None
    base_model: str | None
    notes: list[str]


def convert_checkpoint(
    old: "str | os.PathLike[str]",
    out: "str | os.PathLike[str]",
    *,
    lora_alpha: float | None = None,
    base_model: str | None = None,
) -> Conversion:
    """Write an old checkpoint of DyLoRA-MoE as moelora reads it.

    Each expert becomes a plain PEFT adapter in a folder of its name, the router
    ``router.safetensors`` above them, the skills a :class:`~moelora.SkillLibrary` of directions.
    Adapters and router are copied to the bit. Nothing of the old checkpoint is run or changed.

    Args:
        old: ``checkpoint-<n>``, ``best_model``, or the folder above it.
        out: a new or empty folder; it appears when all is written and read back.
        lora_alpha: for ``expert_<i>.pt`` files without a config that says it.
        base_model: recorded in the adapters instead of what the old ones say.

    Raises:
        CheckpointError: if the old checkpoint is damaged, refused or contradicts itself, or ``out``
            cannot be written.
        SkillError: if a skill's embedding has no direction.

    Example:
        >>> convert_checkpoint("results/checkpoint-500", "experts")  # doctest: +SKIP
    """
    source = Path(old)
    target = _check_out(Path(out), source)
    checkpoint = read_old_checkpoint(source, lora_alpha=lora_alpha)
    base = base_model or checkpoint.base_model
    notes = list(checkpoint.notes)
    with new_folder(target) as folder:
        for expert in checkpoint.experts:
            _write_expert(folder, expert, base)
        router = _write_router(folder, checkpoint, notes)
        skills = _write_skills(folder, checkpoint)
        if checkpoint.lm_head:
            save_file(_plain(checkpoint.lm_head), folder / HEAD_FILE)
            notes.append(
                f"The output layer was trained with the experts. No adapter can hold it: load "
                f"{HEAD_FILE} into the base model before the adapters."
            )
        conversion = Conversion(
            out=str(target),
            experts=[expert.name for expert in checkpoint.experts],
            router=router,
            skills=skills,
            base_model=base,
            notes=notes,
        )
        _write_metadata(folder, checkpoint, conversion)
        _read_back(folder, checkpoint)
    return conversion


def _check_out(out: Path, source: Path) -> Path:
    target = out.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"--out {out} exists and is not empty. Choose a new folder.")
    if target == source.resolve() or target in source.resolve().parents:
        raise CheckpointError(f"--out {out} holds the old checkpoint. Choose another folder.")
    return target


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    return {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}


def _write_expert(folder: Path, expert: OldExpert, base_model: str | None) -> None:
    config = expert.lora_config()
    config.inference_mode = True
    if base_model is not None:
        config.base_model_name_or_path = base_model
    path = folder / expert.name
    config.save_pretrained(str(path))
    save_file(
        _plain(expert.tensors), path / _peft.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"}
    )


def _write_router(folder: Path, checkpoint: OldCheckpoint, notes: list[str]) -> str:
    old = checkpoint.router
    if old is None:
        return "none"
    if old.router is None:
        save_file(_plain(old.tensors), folder / UNKNOWN_ROUTER_FILE)
        notes.append(
            f"Its tensors are kept in {UNKNOWN_ROUTER_FILE}; give your own router module to "
            "attach_router()."
        )
        return "kept"
    router = old.router
    write_router_file(
        folder,
        router.state_dict(),
        kind=ATTACHED,
        experts=[expert.name for expert in checkpoint.experts],
        extra={
            "router_class": f"{type(router).__module__}.{type(router).__qualname__}",
            "router_config": json.dumps(router.config()),
        },
    )
    notes.append(_ROUTER_NOTE)
    return "converted"


def _write_skills(folder: Path, checkpoint: OldCheckpoint) -> int | None:
    if checkpoint.skills is None:
        return None
    library = SkillLibrary()
    for name, embedding in checkpoint.skills.items():
        # only directions count, for upstream's cosine too
        library.add_skill(name, embedding.float(), metadata={"expert": name})
    library.save(folder / SKILL_LIBRARY_FILE)
    return len(checkpoint.skills)


def _write_metadata(folder: Path, checkpoint: OldCheckpoint, conversion: Conversion) -> None:
    def described(path: Path) -> dict[str, Any]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"file": os.path.relpath(path, checkpoint.folder), "sha256": digest}

    content = {
        "format": 1,
        "converted_from": "DyLoRA-MoE",
        "experts": {expert.name: described(expert.source) for expert in checkpoint.experts},
        "router": conversion.router,
        "router_source": None if checkpoint.router is None else described(checkpoint.router.source),
        "base_model": conversion.base_model,
        "config": checkpoint.config,
        "notes": conversion.notes,
    }
    text = json.dumps(content, indent=2, default=str) + "\n"
    (folder / METADATA_FILE).write_text(text, encoding="utf-8")


def _read_back(folder: Path, checkpoint: OldCheckpoint) -> None:
    """Read what was written before it takes its name."""
    for expert in checkpoint.experts:
        shapes = read_shapes(folder / expert.name / _peft.SAFETENSORS_WEIGHTS_NAME)
        if shapes != {key: tuple(tensor.shape) for key, tensor in expert.tensors.items()}:
            raise CheckpointError(f"{expert.name} was not written as it was read.")
    if (folder / "router.safetensors").is_file():
        read_router_file(folder / "router.safetensors")
