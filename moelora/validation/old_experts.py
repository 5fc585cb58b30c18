"""The experts of an old DyLoRA-MoE checkpoint: PEFT folders, nested or not, or ``expert_i.pt``."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moelora import _peft
from moelora.config import is_int, is_number
from moelora.errors import CheckpointError
from moelora.router_file import read_tensors
from moelora.validation.files import check_floats, read_json, read_pt

_EXPERT = re.compile(r"expert_(0|[1-9][0-9]{0,4})(\.pt)?")
_PREFIX = "base_model.model."
# what upstream never wrote, and what would make more of a model than the file's tensors
_NEVER_WRITTEN = (
    "layer_replication",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)


@dataclass(frozen=True)
class OldExpert:
    """One expert as PEFT saves an adapter.

    Attributes:
        name: ``expert_<i>``.
        config: the fields of its ``LoraConfig``.
        tensors: by the names of ``adapter_model.safetensors``, without the adapter's name.
        source: the file they were read from.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: Path

    def lora_config(self) -> Any:
        """The config as PEFT's class.

        Raises:
            CheckpointError: if PEFT refuses it.
        """
        try:
            return _peft.LoraConfig.from_peft_type(**self.config)
        except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise CheckpointError(f"The config of {self.source}: {error}") from error


def find_experts(folder: Path) -> list[Path]:
    """The folders or ``.pt`` files of the experts, by their number; a folder comes first.

    Raises:
        CheckpointError: if there are none, or a number is missing between them.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: p.name, reverse=True):
        match = _EXPERT.fullmatch(path.name)
        if match is not None and path.is_dir() == (match[2] is None):
            found[int(match[1])] = path
    # reversed, so that the folder expert_0 is seen after the file expert_0.pt
    if not found:
        raise CheckpointError(f"{folder} holds no expert_0, expert_1 ... (folders or .pt files).")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise CheckpointError(
            f"{folder} holds experts up to {max(found)}, but expert_{missing[0]} is missing."
        )
    return [found[index] for index in range(len(found))]


def read_expert(path: Path, *, lora_alpha: float | None) -> tuple[OldExpert, dict[str, Tensor]]:
    """Read one expert.

    Args:
        path: its folder, or its ``.pt`` file.
        lora_alpha: of a ``.pt`` file, which does not say it.

    Returns:
        The expert, and the tensors beside it that belong to the base model (a trained ``lm_head``).

    Raises:
        CheckpointError: if files are missing, damaged, or contradict each other.
    """
    if path.suffix == ".pt":
        return _read_pt_expert(path, lora_alpha=lora_alpha)
    return _read_folder_expert(path), {}


def _read_folder_expert(folder: Path) -> OldExpert:
    name = folder.name
    # PEFT saves an adapter that is not called "default" into a folder of its name
    inner = next((f for f in (folder / name, folder) if (f / _peft.CONFIG_NAME).is_file()), None)
    if inner is None:
        raise CheckpointError(
            f"{folder} holds no {_peft.CONFIG_NAME}, neither itself nor in {name}/."
        )
    config = read_json(inner / _peft.CONFIG_NAME)
    weights = inner / _peft.SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        tensors: dict[Any, Any] = dict(read_tensors(weights))
    elif (inner / _peft.WEIGHTS_NAME).is_file():
        weights = inner / _peft.WEIGHTS_NAME
        tensors = read_pt(weights)
    else:
        raise CheckpointError(
            f"{inner} holds neither {_peft.SAFETENSORS_WEIGHTS_NAME} nor {_peft.WEIGHTS_NAME}."
        )
    _check_config(config, inner / _peft.CONFIG_NAME)
    expert = OldExpert(name, config, _checked(tensors, weights), weights)
    _check_ranks(expert)
    return expert


def _read_pt_expert(path: Path, *, lora_alpha: float | None) -> tuple[OldExpert, dict[str, Tensor]]:
    """``save_lora_experts`` wrote named parameters, and other experts' where names begin alike."""
    name, content = path.stem, read_pt(path)
    marker, own, rest = f".{name}", {}, {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path} must map names to tensors, got the key {key!r}.")
        if ".lora_" not in key:
            rest[key.removeprefix(_PREFIX)] = value
        elif key.endswith(marker) or f"{marker}." in key:
            own[key.replace(marker, "", 1)] = value
    if not own:
        raise CheckpointError(
            f"{path} holds no tensors of {name}: only parameters that were being trained were "
            "saved. Train this expert, or take a checkpoint with peft_adapters/expert_i folders."
        )
    foreign = sorted(set(rest) - {"lm_head.weight", "lm_head.bias"})
    if foreign:
        raise CheckpointError(f"{path} holds {foreign[0]!r}, which belongs to no expert.")
    tensors = _checked(own, path)
    check_floats(rest, str(path))
    if lora_alpha is None:
        raise CheckpointError(
            f"{path} does not say lora_alpha, and no config.json beside it does. Give it with "
            "--lora-alpha (DyLoRA-MoE's default was 32)."
        )
    ranks = sorted({t.shape[0] for key, t in tensors.items() if _is_a(key)})
    if len(ranks) != 1:
        raise CheckpointError(f"{path} has layers of ranks {ranks}, must be one rank.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ranks[0],
        "lora_alpha": lora_alpha,
        "target_modules": sorted({_module(key).rpartition(".")[2] for key in tensors}),
    }
    return OldExpert(name, config, tensors, path), rest


def _check_config(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} describes an adapter of peft_type {config.get('peft_type')!r}, must be 'LORA'."
        )
    for name in _NEVER_WRITTEN:
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is set, which no DyLoRA-MoE expert has.")
    if not is_int(config.get("r")) or config["r"] < 1:
        raise CheckpointError(f"{path}: r must be an integer >= 1, got {config.get('r')!r}.")
    if not is_number(config.get("lora_alpha")):
        raise CheckpointError(
            f"{path}: lora_alpha must be a finite number, got {config.get('lora_alpha')!r}."
        )
    dropout = config.get("lora_dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise CheckpointError(f"{path}: lora_dropout must be in [0, 1), got {dropout!r}.")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(is_number, pattern.values())):
            raise CheckpointError(f"{path}: {name} must map names to numbers, got {pattern!r}.")


def _check_ranks(expert: OldExpert) -> None:
    """Hold the config's ranks against the tensors, before a model is made after the config."""
    pattern = expert.config.get("rank_pattern") or {}
    claimed = {expert.config["r"], *pattern.values()}
    there = {t.shape[0] for key, t in expert.tensors.items() if _is_a(key)}
    if not there <= claimed:
        raise CheckpointError(
            f"{expert.source} has layers of rank {sorted(there)}, but its config asks for "
            f"{sorted(claimed)}."
        )
    # a rank that no layer has would be allocated before it is found to be missing
    if claimed - there and max(claimed) > max(there):
        raise CheckpointError(
            f"The config of {expert.source} asks for rank {max(claimed)}, its layers have rank "
            f"{sorted(there)}."
        )


def _checked(tensors: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, each A beside a B that fits it."""
    if not any(isinstance(key, str) and ".lora_" in key for key in tensors):
        raise CheckpointError(f"{path} holds no LoRA tensors.")
    check_floats(tensors, str(path))
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX) or tensor.ndim > 5:
            raise CheckpointError(f"{path} holds {key!r}, which PEFT would not have saved.")
        if not _is_a(key):
            continue
        other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        pair = tensors.get(other)
        if pair is None:
            raise CheckpointError(f"{path} holds {key!r}, but no {other!r}.")
        if tensor.ndim < 2 or pair.ndim < 2 or tensor.shape[0] != pair.shape[1]:
            raise CheckpointError(
                f"{path}: {key!r} of shape {tuple(tensor.shape)} does not fit {other!r} of shape "
                f"{tuple(pair.shape)}."
            )
    lonely = [key for key in tensors if ".lora_B" in key and _a_of(key) not in tensors]
    if lonely:
        raise CheckpointError(f"{path} holds {lonely[0]!r}, but no {_a_of(lonely[0])!r}.")
    return tensors


def _is_a(key: str) -> bool:
    return ".lora_A" in key or ".lora_embedding_A" in key


def _a_of(key: str) -> str:
    return key.replace("lora_B", "lora_A")


def _module(key: str) -> str:
    return key.partition(".lora_")[0]
