"""Experts as tensors: read from adapter folders, the hub or a model, without a base model.

An adapter of PEFT's LoRA holds one expert, a mixture holds several. Here each becomes an
:class:`Expert`, the pairs ``(A, B)`` of every layer with their scaling, whatever it was read from.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.adapter_folder import Locator, read_folder
from moelora.config import DISK_PEFT_TYPE, MoELoraConfig, is_int, is_number
from moelora.errors import CheckpointError, ConfigError, UnsupportedLayerError
from moelora.router_file import read_tensors

PREFIX = "base_model.model."
_NAMES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# options with which an adapter is more than A and B, or less than an update of the base weight
_MORE_THAN_A_PAIR = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
    "megatron_config",
)
#: Initialisations that leave the base weight as it is.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
# what wrappers put between the parts of a layer's name
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class LoraPair:
    """One layer's part of an expert: it adds ``scaling * B A x``.

    Attributes:
        a: ``(R, D_in)``; for a convolution ``(R, D_in, *kernel)``.
        b: ``(D_out, R)``; for a convolution ``(D_out, R, 1, ...)``.
        scaling: what multiplies the product.
        embedding: the layer is an embedding, whose input are indices.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    @property
    def widths(self) -> tuple[Any, ...]:
        """All that experts of one layer have in common: input, output, and kind of layer."""
        return (tuple(self.a.shape[1:]), self.b.shape[0], tuple(self.b.shape[2:]), self.embedding)

    def rows(self, index: Tensor | slice) -> "LoraPair":
        """The same pair with only some of its ranks."""
        return replace(self, a=self.a[index], b=self.b[:, index])


@dataclass(frozen=True)
class Expert:
    """One expert, wherever it came from.

    Attributes:
        name: a plain folder name.
        source: the folder, hub id or adapter it was read from, for messages.
        config: the config of its adapter.
        layers: its pairs by the layer's name in the base model.
        others: tensors of the adapter that belong to no pair (saved base embeddings).
        mature: whether it was marked mature; None if that is not tracked.
    """

    name: str
    source: str
    config: Any
    layers: dict[str, LoraPair]
    others: dict[str, Tensor] = field(default_factory=dict)
    mature: bool | None = None


def read_experts(source: "str | os.PathLike[str]") -> list[Expert]:
    """Read the experts of a LoRA adapter or mixture from a folder or from the hub.

    Args:
        source: a folder; or a hub id, ``owner/name`` or ``owner/name/subfolder``.

    Raises:
        CheckpointError: if files are missing, damaged, no safetensors, contradict each other, or
            hold something else than LoRA.
        UnsupportedLayerError: if the adapter is more than pairs of A and B (DoRA, biases ...).
    """
    locate = adapter_locator(source)
    config = read_lora_config(locate)
    check_plain(config, locate.where)
    weights = locate(_peft.SAFETENSORS_WEIGHTS_NAME)
    if weights is None:
        raise CheckpointError(f"{locate.where} {_no_safetensors(locate)}")
    tensors = read_tensors(weights)
    layers, others = _pairs(tensors, weights)
    for name, pair in layers.items():
        _check_pair(name, pair, str(weights))
    layers = {name: _scaled(name, pair, config, weights) for name, pair in layers.items()}
    name = Path(locate.subfolder or locate.model_id).resolve().name
    if not isinstance(config, MoELoraConfig):
        return [Expert(name, locate.where, config, layers, others)]
    return _split(name, locate, config, layers, others, _maturity(tensors))


def read_lora_config(locate: Locator) -> Any:
    """Read the config of a LoRA adapter or mixture, as PEFT reads it.

    Raises:
        CheckpointError: if there is none, or it is no LoRA's.
    """
    path = locate(_peft.CONFIG_NAME)
    if path is None:
        raise CheckpointError(_no_config(locate))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    peft_type = content.get("peft_type") if isinstance(content, dict) else None
    if peft_type == DISK_PEFT_TYPE:
        config, _ = read_folder(locate.model_id, subfolder=locate.subfolder)
        _check_base_name(config, path)
        return config
    if peft_type != "LORA":
        raise CheckpointError(
            f"{path} describes an adapter of peft_type {peft_type!r}, must be 'LORA' or "
            f"{DISK_PEFT_TYPE!r}."
        )
    try:
        config = _peft.PeftConfig.from_pretrained(str(path.parent))
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_numbers(config, path)
    _check_base_name(config, path)
    return config


def check_plain(config: Any, where: str) -> None:
    """Refuse an adapter whose update is more than ``scaling * B A``.

    Raises:
        UnsupportedLayerError: naming the option.
    """
    for name in _MORE_THAN_A_PAIR:
        value = getattr(config, name, None)
        if value:
            raise UnsupportedLayerError(
                f"{where} uses {name}={_short(value)}, so it is more than pairs of A and B and "
                "cannot be stacked or unstacked exactly. As an adapter of its own it works under "
                "explicit routing_weights."
            )
    if config.bias != "none":
        raise UnsupportedLayerError(
            f"{where} trains biases of the base model (bias={config.bias!r}), which experts cannot "
            "share. Only bias='none' can be stacked."
        )
    init = config.init_lora_weights
    if not any(init is one or init == one for one in _HARMLESS_INITS):
        raise UnsupportedLayerError(
            f"{where} was made with init_lora_weights={init!r}, which changes the base weights. "
            "Save it with path_initial_model_for_weight_conversion= to get an ordinary LoRA first."
        )


def experts_of_model(model: nn.Module, adapter_name: str) -> list[Expert]:
    """The experts of one adapter of a live model; their tensors are the model's own, detached.

    Raises:
        ConfigError: if the model has no such LoRA adapter.
        UnsupportedLayerError: if the adapter is more than pairs of A and B, or its tensors are
            not all in this process.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, _peft.LoraConfig):
        known = [name for name, one in configs.items() if isinstance(one, _peft.LoraConfig)]
        raise ConfigError(
            f"adapter must be one of the model's LoRA adapters {known}, got {adapter_name!r}."
        )
    where = f"Adapter {adapter_name!r}"
    check_plain(config, where)
    layers: dict[str, LoraPair] = {}
    mature = None
    for name, layer in _named_lora_layers(model):
        pair = _pair_of_layer(name, layer, adapter_name)
        if pair is None:
            continue
        _check_pair(name, pair, where)
        layers[name] = pair
        routers: Any = layer._modules.get("lora_router", {})
        buffer = routers[adapter_name].mature if adapter_name in routers else None
        mature = mature if buffer is None else buffer.tolist()
    if not layers:
        raise ConfigError(f"{where} has no layers in this model.")
    if not isinstance(config, MoELoraConfig):
        return [Expert(adapter_name, where, config, layers)]
    names = config.expert_names or numbered(adapter_name, config.num_experts)
    return _slices(names, where, config, layers, {}, mature)


def find_expert(names: list[str], expert: int | str) -> int:
    """The index of an expert given by index or name; a name comes first.

    Raises:
        ConfigError: if there is none, or ``expert`` is neither.

    Example:
        >>> find_expert(["sql", "french"], "french")
        1
    """
    if isinstance(expert, str):
        if names.count(expert) > 1:
            raise ConfigError(
                f"expert {expert!r} is the name of several of {names}: give an index."
            )
        if expert in names:
            return names.index(expert)
        # 0 to 9 only: isdigit() alone takes other scripts' digits and superscripts too
        if not re.fullmatch("[0-9]{1,9}", expert):
            raise ConfigError(f"expert must be one of {names} or an index, got {expert!r}.")
        expert = int(expert)
    if not is_int(expert) or not 0 <= expert < len(names):
        raise ConfigError(
            f"expert must be an index in [0, {len(names)}) or one of {names}, got {expert!r}."
        )
    return expert


def numbered(adapter: str, number: int) -> list[str]:
    """Names for the experts of an adapter that gives them none; a single one has the adapter's.

    Example:
        >>> numbered("sql", 1), numbered("skills", 2)
        (['sql'], ['skills.0', 'skills.1'])
    """
    return [adapter] if number == 1 else [f"{adapter}.{index}" for index in range(number)]


# Folders -------------------------------------------------------------------------------------


def adapter_locator(source: "str | os.PathLike[str]") -> Locator:
    """Return what finds the files of an adapter in a folder or on the hub.

    Raises:
        CheckpointError: if ``source`` is neither.
    """
    text = os.fspath(source)
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"An adapter is given by its folder or hub id, got {source!r}.")
    if Path(text).is_dir():
        return Locator(text, None, {})
    parts = text.split("/")
    is_hub_id = len(parts) >= 2 and all(re.fullmatch(r"[\w.-]+", p) and p.strip(".") for p in parts)
    if Path(text).exists() or not is_hub_id:
        raise CheckpointError(f"{text} is neither a folder nor a hub id (owner/name).")
    return Locator("/".join(parts[:2]), "/".join(parts[2:]) or None, {})


def _no_config(locate: Locator) -> str:
    if not locate.local.is_dir():
        return (
            f"{locate.where} is no folder here, and the hub has no adapter of that name or cannot "
            "be reached (offline?)."
        )
    inner = sorted(p.parent.name for p in locate.local.glob(f"*/{_peft.CONFIG_NAME}"))
    hint = f" Its subfolders {inner} hold adapters: give those." if inner else ""
    return f"{locate.where} holds no {_peft.CONFIG_NAME}, so it is no adapter.{hint}"


def _no_safetensors(locate: Locator) -> str:
    text = f"holds no {_peft.SAFETENSORS_WEIGHTS_NAME}."
    if locate(_peft.WEIGHTS_NAME) is None:
        return text
    return (
        f"{text} {_peft.WEIGHTS_NAME} is a pickle, which can run code and is not read: load it "
        "with PEFT where you trust it, and save it again."
    )


def _check_numbers(config: Any, path: Path) -> None:
    """Refuse fields whose type PEFT does not check."""
    if not is_int(config.r) or config.r < 1:
        raise CheckpointError(f"{path}: r must be an integer of at least 1, got {config.r!r}.")
    if not is_number(config.lora_alpha):
        raise CheckpointError(
            f"{path}: lora_alpha must be a finite number, got {config.lora_alpha!r}."
        )
    for name, is_right in (("rank_pattern", is_int), ("alpha_pattern", is_number)):
        pattern: Any = getattr(config, name)
        if pattern is not None and (
            not isinstance(pattern, dict) or not all(map(is_right, pattern.values()))
        ):
            raise CheckpointError(f"{path}: {name} must map names to numbers, got {pattern!r}.")
    _check_names(config, path)


def _check_base_name(config: Any, path: Path) -> None:
    name = config.base_model_name_or_path
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path must be a string, got {name!r}.")


def _check_names(config: Any, path: Path) -> None:
    """Refuse targets and patterns that are no names, or no regular expressions."""
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets or [])
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    try:
        for name in [*names, *patterns]:
            re.compile(name)
    except (TypeError, re.error) as error:
        raise CheckpointError(
            f"{path}: a target or pattern is no module name or regular expression: {error}."
        ) from error


def _pairs(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, LoraPair], dict[str, Tensor]]:
    """The file's pairs by layer, and what belongs to none; scalings are filled in later."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        layer, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if not layer:
            others[key] = tensor
        elif f"lora_{half}" in _NAMES and key.startswith(PREFIX):
            halves.setdefault(layer, {})[half] = tensor
        elif not half.startswith("router."):
            raise CheckpointError(
                f"Tensor {key!r} of {path} is no A or B of a LoRA, and its config says nothing "
                "of it."
            )
    if not halves:
        raise CheckpointError(f"{path} holds no LoRA tensors.")
    return {layer: _pair(layer, found, path) for layer, found in halves.items()}, others


def _pair(layer: str, found: dict[str, Tensor], path: Path) -> LoraPair:
    for a, b, embedding in (
        ("A.weight", "B.weight", False),
        ("embedding_A", "embedding_B", True),
    ):
        if found.keys() == {a, b}:
            return LoraPair(found[a], found[b], 1.0, embedding)
    raise CheckpointError(
        f"Layer {layer!r} of {path} has the tensors {sorted(found)}, must have one A and one B."
    )


def _check_pair(layer: str, pair: LoraPair, where: str) -> None:
    shapes = f"A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)}"
    if pair.a.ndim < 2 or pair.b.ndim != pair.a.ndim or pair.b.shape[1] != pair.a.shape[0]:
        raise CheckpointError(f"Layer {layer!r} of {where} has {shapes}, which do not fit.")
    for half, tensor in (("A", pair.a), ("B", pair.b)):
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{half} of layer {layer!r} of {where} has dtype {tensor.dtype}, must be one of "
                f"{', '.join(map(str, _DTYPES))}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{half} of layer {layer!r} of {where} holds NaN or infinity.")


def _scaled(name: str, pair: LoraPair, config: Any, path: Path) -> LoraPair:
    """Take rank and scaling from the config, by PEFT's own rules for patterns."""
    r = _by_pattern(config.rank_pattern, name, config.r)
    alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
    total = r * getattr(config, "num_experts", 1)
    if pair.rank != total:
        raise CheckpointError(
            f"Layer {name!r} of {path} has rank {pair.rank}, but its config asks for {total}."
        )
    return replace(pair, scaling=alpha / (math.sqrt(r) if config.use_rslora else r))


def _by_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(_peft.get_pattern_key(list(pattern), name), default)


def _maturity(tensors: dict[str, Tensor]) -> list[bool] | None:
    buffers = [value for key, value in tensors.items() if key.endswith(".lora_router.mature")]
    return buffers[0].bool().tolist() if buffers else None


def _split(
    name: str,
    locate: Locator,
    config: MoELoraConfig,
    layers: dict[str, LoraPair],
    others: dict[str, Tensor],
    mature: list[bool] | None,
) -> list[Expert]:
    names = config.expert_names or numbered(name, config.num_experts)
    return _slices(names, locate.where, config, layers, others, mature)


def _slices(
    names: list[str],
    where: str,
    config: MoELoraConfig,
    layers: dict[str, LoraPair],
    others: dict[str, Tensor],
    mature: list[bool] | None,
) -> list[Expert]:
    def part(pair: LoraPair, index: int) -> LoraPair:
        r = pair.rank // config.num_experts
        return pair.rows(slice(index * r, (index + 1) * r))

    return [
        Expert(
            name=name,
            source=f"{where}, expert {index}",
            config=config,
            layers={layer: part(pair, index) for layer, pair in layers.items()},
            others=others,
            mature=None if mature is None else mature[index],
        )
        for index, name in enumerate(names)
    ]


# Live models ---------------------------------------------------------------------------------


def _named_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """LoRA layers by their name in the base model, as PEFT saves them."""
    for name, module in model.named_modules():
        if isinstance(module, _peft.LoraLayer):
            name = _WRAPPERS.sub("", name)
            # a PeftModel holds its LoraModel as base_model, and that the base model as model
            start = PREFIX if isinstance(model, _peft.PeftModel) else "model."
            is_tuner = isinstance(model, _peft.PeftModel | _peft.BaseTuner)
            yield name.removeprefix(start) if is_tuner else name, module


def _pair_of_layer(name: str, layer: Any, adapter: str) -> LoraPair | None:
    embedding = adapter in layer.lora_embedding_A
    if not embedding and adapter not in layer.lora_A:
        return None
    if isinstance(layer, _peft.WHOLE_WEIGHT_LAYERS) or adapter in layer.lora_variant:
        raise UnsupportedLayerError(
            f"Layer {name!r} ({type(layer).__name__}) is more than a pair of A and B."
        )
    if embedding:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if a.numel() == 0 or "meta" in (a.device.type, b.device.type):
        raise UnsupportedLayerError(
            f"The tensors of layer {name!r} are not in this process (sharded or meta). Save the "
            "adapter and read its folder."
        )
    scaling = float(layer.scaling[adapter])
    return LoraPair(a.detach().cpu(), b.detach().cpu(), scaling, embedding)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
