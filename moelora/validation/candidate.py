"""A checkpoint on its base model, in the forms that the ways of running it need.

Every checkpoint is brought into one PEFT model: its experts as plain adapters (for the ways of many
passes, and for the slow reference), and what it holds itself (a mixture, or a router).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moelora import _peft
from moelora.attached_file import is_attached_file
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig
from moelora.errors import CheckpointError
from moelora.router_file import ROUTER_FILE, is_ours, read_router_file
from moelora.validation.errors import ValidationError
from moelora.validation.files import read_json
from moelora.validation.old_checkpoint import (
    OldCheckpoint,
    is_old_checkpoint,
    read_old_checkpoint,
)


@dataclass
class Candidate:
    """A checkpoint, loaded.

    Attributes:
        model: the base model with all adapters.
        kind: ``"DyLoRA-MoE checkpoint"``, ``"mixture"`` or ``"adapters"``.
        experts: names of plain adapters, one per expert, in routing order.
        mixtures: names of the checkpoint's own routed adapters, active together; empty where its
            experts are plain adapters.
        router: the router over the model's final hidden states, if the checkpoint has one. It is
            not attached.
        notes: what a person should know of how it was read.
    """

    model: Any
    kind: str
    experts: list[str]
    mixtures: list[str] = field(default_factory=list)
    router: nn.Module | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.get_base_model().get_input_embeddings().weight.shape[0])


def load_candidate(
    folder: Path,
    *,
    base: str | None,
    dtype: torch.dtype,
    device: torch.device,
    lora_alpha: float | None = None,
) -> Candidate:
    """Load a checkpoint of moelora's or of DyLoRA-MoE's own, on its base model.

    Args:
        folder: of the checkpoint.
        base: folder or hub id of the base model; None takes what the checkpoint says.
        dtype: of the base model.
        device: to run on.
        lora_alpha: for old ``expert_<i>.pt`` files without a config that says it.

    Raises:
        CheckpointError: if the checkpoint is damaged, refused or does not fit the base model.
        ValidationError: if there is no base model, or fewer than two experts.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    old = read_old_checkpoint(folder, lora_alpha=lora_alpha) if _is_old(folder) else None
    folders = [] if old is not None else adapter_folders(folder)
    told = old.base_model if old is not None else _told_base(folders)
    model = load_base(base or told, dtype=dtype, device=device)
    if old is not None:
        candidate = _load_old(model, old)
    else:
        candidate = _load_ours(model, folders)
    if len(candidate.experts) < 2:
        raise ValidationError(f"{folder} holds one expert; there is nothing to mix.")
    if dtype == torch.float64:
        # PEFT leaves some adapters in float32, whose products would not be exact
        candidate.model.double()
    candidate.model.eval()
    return candidate


def load_base(location: str | None, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model.

    Raises:
        ValidationError: if none is named or it cannot be loaded.
    """
    if location is None:
        raise ValidationError("The checkpoint does not say its base model: give it with --base.")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValidationError(f"The base model {location} cannot be loaded: {reason}") from error
    return model.to(device).eval()  # type: ignore[arg-type]


def _is_old(folder: Path) -> bool:
    return not (folder / _peft.CONFIG_NAME).is_file() and is_old_checkpoint(folder)


def adapter_folders(folder: Path) -> list[Path]:
    """The adapters of a folder in routing order: itself, or those inside it.

    Raises:
        CheckpointError: if there are none, or the router names one that is not there.
    """
    if (folder / _peft.CONFIG_NAME).is_file():
        return [folder]
    inner = [path.parent for path in folder.glob(f"*/{_peft.CONFIG_NAME}")]
    if not inner:
        raise CheckpointError(
            f"{folder} holds no {_peft.CONFIG_NAME}, no folders that do, and no checkpoint of "
            "DyLoRA-MoE."
        )
    router = folder / ROUTER_FILE
    if router.is_file() and is_ours(router) and is_attached_file(router):
        names = read_router_file(router).experts
        missing = [n for n in names if not (folder / n / _peft.CONFIG_NAME).is_file()]
        if missing:
            raise CheckpointError(f"{router} routes over {missing[0]!r}, which is not beside it.")
        return [folder / name for name in names]
    return sorted(inner, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _told_base(folders: Sequence[Path]) -> str | None:
    told = [read_json(f / _peft.CONFIG_NAME).get("base_model_name_or_path") for f in folders]
    return next((name for name in told if isinstance(name, str) and name), None)


# Ours ----------------------------------------------------------------------------------------


def _load_ours(base: Any, folders: list[Path]) -> Candidate:
    kinds = [read_json(folder / _peft.CONFIG_NAME).get("peft_type") for folder in folders]
    unknown = [kind for kind in kinds if kind not in ("LORA", DISK_PEFT_TYPE)]
    if unknown:
        raise CheckpointError(
            f"{folders[0].parent} holds an adapter of peft_type {unknown[0]!r}, must be 'LORA' or "
            f"{DISK_PEFT_TYPE!r}."
        )
    names = [_adapter_name(folder, index) for index, folder in enumerate(folders)]
    try:
        model: Any = _peft.PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folders[0]} does not load: {_first_line(error)}") from error
    router = model.detach_router()
    candidate = Candidate(model, "adapters", [], router=router)
    for name in names:
        config = model.peft_config[name]
        if isinstance(config, MoELoraConfig):
            candidate.kind = "mixture"
            candidate.mixtures.append(name)
            candidate.experts += split_mixture(model, name)
        else:
            candidate.experts.append(name)
    if candidate.mixtures and len(candidate.mixtures) < len(names):
        raise CheckpointError(
            f"{folders[0].parent} holds mixtures beside plain adapters; validate them apart."
        )
    return candidate


def _adapter_name(folder: Path, index: int) -> str:
    """A name that PEFT takes and that is no part of a tensor's name."""
    return f"loaded{index}_" + re.sub(r"\W", "_", folder.resolve().name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lora_layers(model: Any) -> dict[str, Any]:
    """The LoRA layers of a model by name.

    Args:
        model: a PEFT model.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, _peft.LoraLayer)}


def split_mixture(model: Any, name: str) -> list[str]:
    """Add each expert of a mixture as a plain LoRA adapter with a copy of its tensors.

    Args:
        model: a PEFT model with the mixture.
        name: of the mixture.

    Returns:
        The names of the new adapters.
    """
    config = model.peft_config[name]
    experts = [f"{name}_expert_{index}" for index in range(config.num_experts)]
    for index, expert in enumerate(experts):
        plain = _peft.LoraConfig(
            task_type=config.task_type,
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            rank_pattern=dict(config.rank_pattern or {}),
            alpha_pattern=dict(config.alpha_pattern or {}),
            fan_in_fan_out=config.fan_in_fan_out,
        )
        model.add_adapter(expert, plain)
        for layer in lora_layers(model).values():
            _copy_expert(layer, name, expert, index)
    return experts


def _copy_expert(layer: Any, mixture: str, expert: str, index: int) -> None:
    """Copy one expert's rows of A and columns of B."""
    embedding = mixture in layer.lora_embedding_A
    if not embedding and mixture not in layer.lora_A:
        return
    rank = layer.r[expert]
    rows = slice(index * rank, (index + 1) * rank)
    with torch.no_grad():
        for half in ("A", "B"):
            holder = getattr(layer, f"lora_embedding_{half}" if embedding else f"lora_{half}")
            source = holder[mixture] if embedding else holder[mixture].weight
            target = holder[expert] if embedding else holder[expert].weight
            target.copy_(source[rows] if half == "A" else source[:, rows])


# Old -----------------------------------------------------------------------------------------


def _load_old(base: Any, checkpoint: OldCheckpoint) -> Candidate:
    if checkpoint.lm_head:
        _set_head(base, checkpoint.lm_head)
    model: Any = None
    names = []
    for expert in checkpoint.experts:
        config = expert.lora_config()
        config.inference_mode = False
        try:
            if model is None:
                model = _peft.get_peft_model(base, config, adapter_name=expert.name)
            else:
                model.add_adapter(expert.name, config)
            result = _peft.set_peft_model_state_dict(model, expert.tensors, expert.name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{expert.source} does not fit the base model: {_first_line(error)}"
            ) from error
        _check_loaded(model, expert.name, expert.tensors, result, expert.source)
        names.append(expert.name)
    router = None if checkpoint.router is None else checkpoint.router.router
    if router is not None:
        router = router.to(next(base.parameters()).device)
    return Candidate(
        model, "DyLoRA-MoE checkpoint", names, router=router, notes=list(checkpoint.notes)
    )


def _check_loaded(
    model: Any, name: str, tensors: dict[str, Tensor], result: Any, source: Path
) -> None:
    """Every tensor has a place, and every layer of the adapter its tensors."""
    if result.unexpected_keys:
        raise CheckpointError(
            f"{source} holds {result.unexpected_keys[0]!r}, for which the base model has no place."
        )
    adapted = {
        layer_name.removeprefix("base_model.model.")
        for layer_name, layer in lora_layers(model).items()
        if name in layer.lora_A or name in layer.lora_embedding_A
    }
    given = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    missing = sorted(adapted - given)
    if missing:
        raise CheckpointError(
            f"{source} holds no tensors for layer {missing[0]!r}, which its config adapts."
        )


def _set_head(base: Any, tensors: dict[str, Tensor]) -> None:
    """Give the base model the output layer that was trained, untied from its embeddings."""
    head = base.get_output_embeddings()
    weight = tensors.get("lm_head.weight")
    if head is None or weight is None or tuple(weight.shape) != tuple(head.weight.shape):
        raise CheckpointError(
            f"The trained lm_head, of shape {None if weight is None else tuple(weight.shape)}, "
            "does not fit the base model."
        )
    bias = tensors.get("lm_head.bias")
    new = nn.Linear(head.in_features, head.out_features, bias=bias is not None)
    new.to(device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    base.set_output_embeddings(new.requires_grad_(False))
    base.config.tie_word_embeddings = False
