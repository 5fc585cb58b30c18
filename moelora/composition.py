"""``compose``: LoRA adapters become the experts of one mixture, without the base model."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moelora import _peft
from moelora.adapter_folder import check_folder
from moelora.config import MoELoraConfig, is_int
from moelora.errors import CheckpointError, ConfigError
from moelora.expert_tensors import PREFIX, Expert, LoraPair, experts_of_model, read_experts
from moelora.model_card import add_to_model_card
from moelora.new_folder import check_new_folder, new_folder
from moelora.prototypes import arrow_router, top_right_singular_vector
from moelora.router import ROUTER_INIT_STD
from moelora.router_file import MIXTURE, check_folder_name, write_router_file
from moelora.stacking import Stack, stack, target_fields

#: How a composed mixture routes before any training.
ComposedRouter = Literal["arrow", "zeros", "train"]

# Arrow divides its logits by 1, see its paper; the others by MoELoraConfig's own default
_ARROW_TEMPERATURE = 1.0


@dataclass(frozen=True)
class ComposedExpert:
    """One expert of a composed mixture.

    Attributes:
        name: in ``router.safetensors``, and to :func:`moelora.export_expert`.
        source: what it was read from.
        rank: its largest rank, before padding.
        layers: how many layers it adapts.
    """

    name: str
    source: str
    rank: int
    layers: int


@dataclass(frozen=True)
class Composition:
    """What :func:`compose` has written.

    Attributes:
        folder: the mixture.
        experts: in routing order.
        router: ``"arrow"``, ``"zeros"`` or ``"train"``.
        top_k: experts per token.
        temperature: divides the router logits.
        layers: adapted layers, the union of the experts'.
        rank: of every expert after padding, in most layers.
        dtype: of A and B in the file.
        rounding: the largest relative rounding of B by folding unequal scalings into it; 0 if the
            experts are exact to the bit.
        notes: what a reader should know, one sentence each.
    """

    folder: Path
    experts: tuple[ComposedExpert, ...]
    router: str
    top_k: int
    temperature: float
    layers: int
    rank: int
    dtype: str
    rounding: float
    notes: tuple[str, ...]


def compose(
    sources: "Sequence[str | os.PathLike[str]] | nn.Module",
    out: "str | os.PathLike[str]",
    *,
    router: ComposedRouter = "arrow",
    top_k: int | None = None,
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    adapters: Sequence[str] | None = None,
    seed: int = 0,
    allow_different_bases: bool = False,
    force: bool = False,
    show_progress: bool = False,
) -> Composition:
    """Make LoRA adapters the experts of one mixture, and write it as a folder.

    The experts keep their function: with one-hot routing the mixture gives what that adapter alone
    gives. Unequal ranks are padded with zeros to the largest of each layer; the targets are the
    union, with zeros where an adapter lacks a layer; unequal scalings are folded into B (exact
    where their ratio is a power of two, else rounded once, told as ``rounding``; a 16-bit file
    then becomes float32). The base model is not needed. Load the result with
    ``PeftModel.from_pretrained(base, out)``.

    Padding stays zero in training, since a factor only learns where the other is not zero. To
    train the router alone, load with ``is_trainable=True`` and call
    :func:`moelora.freeze_experts`.

    Each layer gets a linear router that reads the layer's own input, one of:

    - ``"arrow"``: training-free. The logit of an expert is ``|x . v|``, with ``v`` the unit vector
      that its ``B A`` amplifies most; see :mod:`moelora.prototypes`. An expert that lacks a layer,
      or is zero there, has logit 0. For convolutions the kernel is summed, as the router reads the
      mean over space.
    - ``"zeros"``: all weights are ``1 / E``, the mean of the experts; ``top_k`` must be ``E``,
      since ties under a smaller one would always go to the same experts.
    - ``"train"``: small random rows, which are to be trained.

    Source: Arrow (arXiv:2405.11157); the absolute value is smoothed below ``|x . v|`` of about
    0.001, which leaves the choice of the top k as it is.

    Args:
        sources: folders or hub ids (``owner/name`` or ``owner/name/subfolder``) of LoRA adapters;
            those of a mixture add all its experts. Or a PEFT model that holds the adapters.
        out: the folder to write.
        router: how tokens are routed before any training.
        top_k: experts per token; by default 2, with ``"zeros"`` all.
        temperature: divides the router logits; by default 1 for ``"arrow"``, else that of
            :class:`MoELoraConfig`.
        names: the experts' names; by default those of the folders.
        adapters: with a model: which adapters, in this order; by default all its LoRA adapters.
        seed: of the rows of ``"train"``.
        allow_different_bases: compose adapters whose configs name different base models, or of
            which only some bring saved embeddings.
        force: replace an adapter that is in ``out``.
        show_progress: a bar over layers on standard error.

    Raises:
        ConfigError: if an argument is not allowed, or there are fewer than two experts.
        CheckpointError: if a source cannot be read, is damaged, or does not fit the others.
        UnsupportedLayerError: if an adapter is more than pairs of A and B (DoRA, biases ...).

    Example:
        >>> made = compose(["sql", "french"], "both", router="train")  # doctest: +SKIP
        >>> [expert.name for expert in made.experts]  # doctest: +SKIP
        ['sql', 'french']
    """
    _check_arguments(router, seed)
    paths = [] if isinstance(sources, nn.Module) else _paths(sources)
    target = check_new_folder(out, force=force, sources=paths)
    if isinstance(sources, nn.Module):
        experts = _of_model(sources, adapters)
    else:
        if adapters is not None:
            raise ConfigError("adapters is for a model; give the folders as sources.")
        experts = [expert for path in paths for expert in read_experts(path)]
    experts = _named(experts, names)
    notes = list(_check_together(experts, allow_different_bases=allow_different_bases))
    ranks = _ranks(experts)
    stacked = stack([expert.layers for expert in experts], ranks=ranks)
    config = _config(experts, ranks, stacked, router, top_k, temperature)
    layers = tqdm(ranks, desc="routers", unit="layer", disable=not show_progress, leave=False)
    routers = _routers(experts, layers, router, seed, dtype=stacked.dtype)
    others = {key: value for expert in experts for key, value in expert.others.items()}
    with new_folder(target) as folder:
        _write(folder, config, {**others, **stacked.tensors, **routers}, routers, experts)
    return Composition(
        folder=Path(out),
        experts=tuple(map(_told, experts)),
        router=router,
        top_k=config.top_k_experts,
        temperature=config.router_temperature,
        layers=len(ranks),
        rank=config.r,
        dtype=str(stacked.dtype).removeprefix("torch."),
        rounding=stacked.rounding,
        notes=(*notes, *_notes(experts)),
    )


def freeze_experts(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Let only the router of a mixture learn: its experts stay as they are.

    Call it on a model loaded with ``PeftModel.from_pretrained(..., is_trainable=True)``, before
    the optimiser is made. ``set_adapter`` makes all of an adapter trainable again.

    Args:
        model: a PEFT model or any module that holds the mixture's layers.
        adapter_name: the mixture.

    Returns:
        The names of the router's parameters, which are now trainable.

    Raises:
        ConfigError: if the model has no router of that name; nothing is changed then.

    Example:
        >>> freeze_experts(model)  # doctest: +SKIP
        ['base_model.model.model.layers.0.self_attn.q_proj.lora_router.default.weight', ...]
    """
    routers, experts = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, _peft.LoraLayer):
            continue
        for kind in layer.adapter_layer_names:
            container: Any = getattr(layer, kind, None)
            if container is None or adapter_name not in container:
                continue
            part = container[adapter_name]
            where = f"{name}.{kind}.{adapter_name}"
            if kind == "lora_router":
                routers.update({f"{where}.{key}": p for key, p in part.named_parameters()})
            else:
                experts += [part] if isinstance(part, Tensor) else list(part.parameters())
    if not routers:
        raise ConfigError(f"adapter_name {adapter_name!r} has no router in this model.")
    for parameter in experts:
        parameter.requires_grad_(False)
    for parameter in routers.values():
        parameter.requires_grad_(True)
    return list(routers)


# What is composed ----------------------------------------------------------------------------


def _check_arguments(router: str, seed: int) -> None:
    allowed = get_args(ComposedRouter)
    if router not in allowed:
        raise ConfigError(f"router must be one of {', '.join(map(repr, allowed))}, got {router!r}.")
    if not is_int(seed) or seed < 0:
        raise ConfigError(f"seed must be an integer of at least 0, got {seed!r}.")


def _paths(sources: Any) -> list[str]:
    if isinstance(sources, str | os.PathLike) or not isinstance(sources, Iterable):
        raise ConfigError(f"sources must be a list of folders or hub ids, got {sources!r}.")
    paths = [os.fspath(source) for source in sources]
    places = [str(Path(p).resolve()) if Path(p).is_dir() else p for p in paths]
    repeated = [path for path, number in Counter(places).items() if number > 1]
    if repeated:
        raise ConfigError(f"sources must differ, but {repeated[0]!r} is given more than once.")
    return paths


def _of_model(model: nn.Module, adapters: Sequence[str] | None) -> list[Expert]:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    loras = [name for name, one in configs.items() if isinstance(one, _peft.LoraConfig)]
    chosen = loras if adapters is None else list(adapters)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"adapters must differ, got {chosen}.")
    return [expert for name in chosen for expert in experts_of_model(model, name)]


def _named(experts: list[Expert], names: Sequence[str] | None) -> list[Expert]:
    """Give each expert a name of its own.

    Raises:
        ConfigError: if there are fewer than two, or the names do not fit.
    """
    if len(experts) < 2:
        raise ConfigError(f"A mixture needs at least 2 experts, got {len(experts)}.")
    if names is not None and (len(names) != len(experts) or len(set(names)) < len(names)):
        raise ConfigError(
            f"names must be {len(experts)} different names, one per expert, got {list(names)}."
        )
    chosen = list(names) if names is not None else _distinct(experts)
    for name in chosen:
        check_folder_name(name, where="names: ")
    return [
        Expert(name, e.source, e.config, e.layers, e.others, e.mature)
        for name, e in zip(chosen, experts, strict=True)
    ]


def _distinct(experts: list[Expert]) -> list[str]:
    """The folders' names; of equal ones (``checkpoint-100``) with the folder above in front."""
    counts = Counter(expert.name for expert in experts)
    names = []
    for expert in experts:
        above = Path(expert.source).resolve().parent.name
        twice = counts[expert.name] > 1 and above
        names.append(f"{above}-{expert.name}" if twice else expert.name)
    return [n if names.count(n) == 1 else f"{n}-{index}" for index, n in enumerate(names)]


def _check_together(experts: list[Expert], *, allow_different_bases: bool) -> Iterator[str]:
    """Refuse adapters that cannot be experts of one model, and tell what they differ in."""
    for name in ("base_model_name_or_path", "revision"):
        values = _values(experts, name)
        if len(values) > 1 and not allow_different_bases:
            raise CheckpointError(
                f"The adapters were trained on different bases: {name} is {values}. If they are "
                "the same weights under other names, pass allow_different_bases "
                "(--allow-different-bases)."
            )
        if len(values) > 1:
            yield f"{name} differs ({values}); the mixture names the first."
    if len(tasks := _values(experts, "task_type")) > 1:
        raise CheckpointError(
            f"The adapters were made for different tasks, task_type is {tasks}: no one model has "
            "the layers of all."
        )
    if len(dropouts := _values(experts, "lora_dropout")) > 1:
        yield f"lora_dropout differs ({dropouts}); the mixture has 0.0."
    _check_widths(experts)
    check_others(experts, allow_different_bases=allow_different_bases)


def _values(experts: list[Expert], name: str) -> list[Any]:
    """The different values of a config field, without None, in order."""
    values = [getattr(expert.config, name) for expert in experts]
    return list(dict.fromkeys(value for value in values if value is not None))


def _check_widths(experts: list[Expert]) -> None:
    first: dict[str, tuple[Expert, LoraPair]] = {}
    for expert in experts:
        for layer, pair in expert.layers.items():
            other, known = first.setdefault(layer, (expert, pair))
            if known.widths != pair.widths:
                raise CheckpointError(
                    f"Layer {layer!r} has input {tuple(known.a.shape[1:])} and output "
                    f"{known.b.shape[0]} in {other.source}, but {tuple(pair.a.shape[1:])} and "
                    f"{pair.b.shape[0]} in {expert.source}: they belong to different base models."
                )


def check_others(experts: list[Expert], *, allow_different_bases: bool = False) -> None:
    """Saved embeddings of the base model must be the same for all.

    Raises:
        CheckpointError: if they differ, or only some adapters bring them.
    """
    keys = sorted({key for expert in experts for key in expert.others})
    for key in keys:
        found = [expert for expert in experts if key in expert.others]
        first = found[0].others[key]
        if not all(torch.equal(expert.others[key], first) for expert in found):
            raise CheckpointError(
                f"Tensor {key!r} is no part of a LoRA and differs between {found[0].source} and "
                "others, so no one model can hold both."
            )
        if len(found) < len(experts) and not allow_different_bases:
            without = next(expert.source for expert in experts if key not in expert.others)
            raise CheckpointError(
                f"{found[0].source} brings the base model's tensor {key!r}, {without} does not. If "
                "it is that of the same base model, pass allow_different_bases "
                "(--allow-different-bases)."
            )


def _ranks(experts: list[Expert]) -> dict[str, int]:
    """The largest rank of each layer."""
    ranks: dict[str, int] = {}
    for expert in experts:
        for layer, pair in expert.layers.items():
            ranks[layer] = max(pair.rank, ranks.get(layer, 1))
    return ranks


def _notes(experts: list[Expert]) -> Iterator[str]:
    layers = {layer for expert in experts for layer in expert.layers}
    if any(isinstance(e.config, MoELoraConfig) and e.config.has_router for e in experts):
        yield "The routers of mixtures among the sources are not kept: the new router is for all."
    for expert in experts:
        if not any(pair.b.any() and pair.a.any() for pair in expert.layers.values()):
            yield f"Expert {expert.name!r} is zero: was it ever trained?"
        if len(expert.layers) < len(layers):
            yield (
                f"Expert {expert.name!r} adapts {len(expert.layers)} of {len(layers)} layers and "
                "adds zero in the others."
            )


def _told(expert: Expert) -> ComposedExpert:
    rank = max(pair.rank for pair in expert.layers.values())
    return ComposedExpert(expert.name, expert.source, rank, len(expert.layers))


# What is written -----------------------------------------------------------------------------


def _config(
    experts: list[Expert],
    ranks: dict[str, int],
    stacked: Stack,
    router: str,
    top_k: int | None,
    temperature: float | None,
) -> MoELoraConfig:
    number = len(experts)
    if router == "zeros" and top_k not in (None, number):
        raise ConfigError(
            f"top_k must be {number}, the number of experts, with router='zeros', got {top_k!r}: "
            "equal logits are ties, which a smaller top_k gives to the same experts every time."
        )
    dropouts = _values(experts, "lora_dropout")
    fields: dict[str, Any] = {}
    if temperature is not None or router == "arrow":
        fields["router_temperature"] = _ARROW_TEMPERATURE if temperature is None else temperature
    if router == "arrow":
        fields["router_hidden_size"] = 2 * number
    for name in ("base_model_name_or_path", "revision", "task_type"):
        fields[name] = next(iter(_values(experts, name)), None)
    return MoELoraConfig(
        **stacked.fields,
        **target_fields(experts, ranks),
        **fields,
        lora_dropout=dropouts[0] if len(dropouts) == 1 else 0.0,
        fan_in_fan_out=any(expert.config.fan_in_fan_out for expert in experts),
        num_experts=number,
        expert_names=[expert.name for expert in experts],
        top_k_experts=(number if router == "zeros" else 2) if top_k is None else top_k,
        router_type="learned",
        router_scope="module",
        inference_mode=True,
    )


def _routers(
    experts: list[Expert], layers: Iterable[str], router: str, seed: int, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of every layer's router, at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        pairs = [expert.layers.get(layer) for expert in experts]
        key = f"{PREFIX}{layer}.lora_router"
        width = next(pair.a.shape[1] for pair in pairs if pair is not None)
        if router == "arrow":
            weight, hidden_weight = arrow_router([_prototype(pair, width) for pair in pairs])
            tensors[f"{key}.hidden_weight"] = hidden_weight.to(dtype)
        else:
            weight = torch.zeros(len(pairs), width, dtype=torch.float64)
        if router == "train":
            weight.normal_(std=ROUTER_INIT_STD, generator=generator)
        tensors[f"{key}.weight"] = weight.to(dtype)
    return tensors


def _prototype(pair: LoraPair | None, width: int) -> Tensor:
    if pair is None:
        return torch.zeros(width, dtype=torch.float64)
    # over a constant input, which is what the router of a convolution reads, its kernel sums up
    a = pair.a.double().flatten(2).sum(dim=2) if pair.a.ndim > 2 else pair.a
    return top_right_singular_vector(a, pair.b.flatten(1))


def _write(
    folder: Path,
    config: MoELoraConfig,
    tensors: dict[str, Tensor],
    routers: dict[str, Tensor],
    experts: list[Expert],
) -> None:
    config.save_pretrained(str(folder))
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / _peft.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_router_file(folder, routers, kind=MIXTURE, experts=[expert.name for expert in experts])
    write_card(folder, config.base_model_name_or_path)
    add_to_model_card(folder, {"default": config})
    # the same checks as loading makes, before the folder gets its name
    check_folder(folder)


def write_card(folder: Path, base_model: str | None) -> None:
    """Write the ``README.md`` that PEFT would have written: what the hub needs to know."""
    lines = ["library_name: peft"]
    if base_model and not Path(base_model).is_absolute():
        lines.insert(0, f"base_model: {base_model!r}")
    ModelCard("\n".join(["---", *lines, "---", ""])).save(folder / "README.md")
