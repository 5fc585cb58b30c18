"""``export_expert``: one expert leaves as an ordinary LoRA adapter that plain PEFT loads."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from moelora import _peft
from moelora.composition import write_card
from moelora.config import is_int
from moelora.errors import ConfigError
from moelora.expert_folders import find_experts
from moelora.expert_tensors import Expert, LoraPair, experts_of_model, find_expert
from moelora.new_folder import check_new_folder, new_folder
from moelora.stacking import Stack, stack, target_fields, without_padding

#: Ranks for which vLLM has kernels (its ``max_lora_rank``).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedExpert:
    """What :func:`export_expert` has written.

    Attributes:
        folder: the LoRA adapter.
        name: the expert's name in the mixture.
        index: its place in the mixture.
        r: the rank of the LoRA, the same in all layers.
        lora_alpha: so that ``lora_alpha / r`` is the expert's scaling.
        layers: how many layers it adapts.
        dropped_layers: layers of the mixture in which the expert is zero.
        rounding: the largest relative rounding of B by folding scalings that differ between layers
            into it; 0 if the LoRA is exact to the bit.
    """

    folder: Path
    name: str
    index: int
    r: int
    lora_alpha: int | float
    layers: int
    dropped_layers: int
    rounding: float


def export_expert(
    source: "str | os.PathLike[str] | nn.Module",
    out: "str | os.PathLike[str]",
    *,
    expert: int | str,
    adapter: str = "default",
    rank: int | Literal["vllm"] | None = None,
    force: bool = False,
) -> ExportedExpert:
    """Write one expert as a plain LoRA adapter, which PEFT loads without moelora.

    Its config is as plain as can be, one rank and one scaling for all layers, since that is what
    other programs (vLLM among them) read. Ranks and layers in which both A and B are zero are left
    out, which changes nothing; the rank is the largest that is left. Routers are not part of it.
    The base model is not needed.

    Args:
        source: the folder or hub id of a mixture; a folder of several adapters with an attached
            router; or a PEFT model.
        out: the folder to write.
        expert: its index or name; for several adapters the adapter's.
        adapter: with a model: which of its adapters.
        rank: pad with zeros to this rank; ``"vllm"`` for the next of :data:`VLLM_RANKS`; None for
            no padding.
        force: replace an adapter that is in ``out``.

    Raises:
        ConfigError: if there is no such expert, or ``rank`` is too small or no rank.
        CheckpointError: if the source cannot be read or is damaged, or ``out`` not written.
        UnsupportedLayerError: if the adapter is more than pairs of A and B (DoRA, biases ...).

    Example:
        >>> export_expert("my-mixture", "sql-lora", expert="sql").r  # doctest: +SKIP
        8
    """
    paths = [] if isinstance(source, nn.Module) else [source]
    target = check_new_folder(out, force=force, sources=paths)
    if isinstance(source, nn.Module):
        experts = experts_of_model(source, adapter)
        names = [one.name for one in experts]
        index = find_expert(names, expert)
        chosen = experts[index]
    else:
        saved = find_experts(source)
        names = saved.names
        index = find_expert(names, expert)
        chosen = saved.read(index)
    layers = without_padding(chosen.layers)
    r = _rank(layers, rank)
    stacked = stack([layers], ranks=dict.fromkeys(layers, r), one_scaling=True)
    write_lora(target, [chosen], stacked, layers=layers)
    return ExportedExpert(
        folder=Path(out),
        name=names[index],
        index=index,
        r=r,
        lora_alpha=stacked.fields["lora_alpha"],
        layers=len(layers),
        dropped_layers=len(chosen.layers) - len(layers),
        rounding=stacked.rounding,
    )


def write_lora(
    target: Path,
    experts: Sequence[Expert],
    stacked: Stack,
    *,
    layers: dict[str, LoraPair],
    check: Callable[[Path], Any] | None = None,
) -> Any:
    """Write a plain LoRA adapter with a clean config.

    Args:
        target: the folder, as ``check_new_folder`` returned it.
        experts: of one mixture, whose config says what base model and layers they are for.
        stacked: the tensors and their ranks.
        layers: the layers that the LoRA adapts.
        check: called with the folder before it gets its name; if it raises, nothing is written.

    Returns:
        What ``check`` returned.
    """
    config = experts[0].config
    plain = _peft.LoraConfig(
        **stacked.fields,
        **target_fields(experts, layers),
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        fan_in_fan_out=config.fan_in_fan_out,
        lora_dropout=config.lora_dropout,
        init_lora_weights=True,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {**experts[0].others, **stacked.tensors}
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with new_folder(target) as folder:
        plain.save_pretrained(str(folder))
        save_file(contiguous, folder / _peft.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_card(folder, config.base_model_name_or_path)
        return None if check is None else check(folder)


def _rank(layers: dict[str, LoraPair], wanted: Any) -> int:
    needed = max(pair.rank for pair in layers.values())
    if wanted is None:
        return needed
    if wanted == "vllm":
        wanted = next((rank for rank in VLLM_RANKS if rank >= needed), None)
        if wanted is None:
            raise ConfigError(
                f"rank='vllm' cannot hold this expert: it has rank {needed}, and vLLM serves at "
                f"most {VLLM_RANKS[-1]}."
            )
    if not is_int(wanted) or wanted < needed:
        raise ConfigError(
            f"rank must be an integer of at least {needed}, the expert's own, 'vllm' or None, got "
            f"{wanted!r}."
        )
    return int(wanted)
