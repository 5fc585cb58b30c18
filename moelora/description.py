"""``describe``: what is in an adapter folder, from its files alone."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moelora import _peft
from moelora.adapter_folder import ROUTER_KEY, Locator
from moelora.config import MoELoraConfig
from moelora.errors import ReportError, UnsupportedLayerError
from moelora.expert_folders import ExpertPlace, SavedModel, find_experts
from moelora.expert_tensors import Expert, LoraPair, adapter_locator, read_experts
from moelora.report.results import RoutingReport
from moelora.router_file import ROUTER_FILE, read_router_file, read_tensors
from moelora.stacking import used_ranks


@dataclass(frozen=True)
class ExpertLoad:
    """How much of a text an expert served: its share of the routing weight.

    Attributes:
        mean: over the routers and all tokens; the means of all experts sum to 1.
        lowest: in the router that uses it least.
        highest: in the router that uses it most.
        domains: as ``mean``, for the tokens of each domain.
    """

    mean: float
    lowest: float
    highest: float
    domains: dict[str, float]


@dataclass(frozen=True)
class DescribedExpert:
    """One expert of an adapter folder.

    Attributes:
        index: its place in the routing order.
        name: what it is called; its index where it has no name.
        adapter: the adapter it lies in.
        rank: its largest rank in a layer, without padding.
        layers: how many layers it adapts (is not zero in).
        parameters: of A and B, without padding.
        update_norm: Frobenius norm of its whole update, ``sqrt(sum_layers |scaling B A|^2)``;
            None if the adapter is more than A and B.
        mature: None if that is not tracked.
        load: as measured; None where nothing was.
    """

    index: int
    name: str
    adapter: str
    rank: int
    layers: int
    parameters: int
    update_norm: float | None
    mature: bool | None
    load: ExpertLoad | None = None


@dataclass(frozen=True)
class DescribedRouter:
    """The routers of a folder.

    Attributes:
        router_type: the field of that name; ``"attached"`` for a router over several adapters.
        router_scope: ``"module"``, ``"layer"`` or ``"model"``.
        top_k: experts per token; None if only the router itself knows.
        temperature: divides the logits; None if only the router itself knows.
        hidden_size: of the router's hidden layer; None for a linear router.
        routers: how many there are.
        parameters: of all of them.
        digest: SHA-256 of the routers' tensors as ``router.safetensors`` states it, or None.
    """

    router_type: str
    router_scope: str
    top_k: int | None
    temperature: float | None
    hidden_size: int | None
    routers: int
    parameters: int
    digest: str | None


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found.

    Attributes:
        source: the folder or hub id.
        kind: ``"mixture"``, ``"adapters"`` (several, under one attached router or none) or
            ``"lora"``.
        base_model: the name in the config, or None.
        task_type: from the config, or None.
        experts: all of them, in routing order.
        router: None if tokens are not routed by anything saved here.
        layers: adapted layers.
        targets: how many layers have each last name (``q_proj`` ...).
        r: the rank per expert in the config, padding included.
        lora_alpha: from the config.
        dtypes: of the tensors.
        parameters: of all tensors, padding included.
        bytes: of all tensor files.
        digests: SHA-256 of each tensor file, by its path in the folder.
        notes: what is unusual, one sentence each.
        measured: the tokens of each domain that the loads were measured on; None where they were
            not.
    """

    source: str
    kind: str
    base_model: str | None
    task_type: str | None
    experts: tuple[DescribedExpert, ...]
    router: DescribedRouter | None
    layers: int
    targets: dict[str, int]
    r: int
    lora_alpha: int | float
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    digests: dict[str, str]
    notes: tuple[str, ...]
    measured: dict[str, int] | None = None


def describe(
    source: "str | os.PathLike[str]", *, report: RoutingReport | None = None
) -> Description:
    """Tell what a folder holds: experts, ranks, targets, router, sizes, maturity, digests.

    Serves mixtures, several adapters with or without an attached router, and plain LoRAs. Files are
    checked as when they are loaded; no base model is needed, and nothing is changed.

    No file says how much an expert is used: that depends on the text. With a report of the same
    experts on text of yours (:func:`moelora.routing_report`) the measured loads are told too.

    Args:
        source: a folder, or the hub id of one adapter.
        report: what the routers of these experts did.

    Raises:
        CheckpointError: if there is no adapter, or a file is missing, damaged, or contradicts
            another.
        ReportError: if the report is of other experts.

    Example:
        >>> describe("my-mixture").router.top_k  # doctest: +SKIP
        2
    """
    saved = find_experts(source)
    first = saved.places[0].config
    notes: list[str] = []
    experts, pairs = _experts(saved, notes)
    if report is not None:
        loads = _loads(report, [expert.name for expert in experts])
        experts = tuple(replace(e, load=load) for e, load in zip(experts, loads, strict=True))
    files = _files(source, saved)
    shapes = [_sizes(path) for name, path in files.items() if not name.endswith(ROUTER_FILE)]
    layers = {layer for expert in pairs for layer in expert.layers}
    return Description(
        source=os.fspath(source),
        kind=_kind(saved),
        base_model=first.base_model_name_or_path,
        task_type=_plain(first.task_type),
        experts=experts,
        router=_router(saved, files),
        layers=len(layers),
        targets=dict(sorted(Counter(name.rpartition(".")[2] for name in layers).items())),
        r=first.r,
        lora_alpha=first.lora_alpha,
        dtypes=tuple(sorted({dtype for _, found in shapes for dtype in found})),
        parameters=sum(number for number, _ in shapes),
        bytes=sum(path.stat().st_size for path in files.values()),
        digests={name: _digest(path) for name, path in files.items()},
        notes=tuple(notes),
        measured=None if report is None else {each.name: each.tokens for each in report.domains},
    )


def _loads(report: RoutingReport, names: Sequence[str]) -> list[ExpertLoad]:
    """The load of each expert of that name, or in that place where the report only numbers them."""
    numbers = [f"E{index}" for index in range(len(names))]
    if report.experts in (list(names), numbers):
        places = list(range(len(names)))
    elif sorted(report.experts) == sorted(names) and len(set(names)) == len(names):
        places = [report.experts.index(name) for name in names]
    else:
        raise ReportError(
            f"report must be of the experts {list(names)}, it is of {list(report.experts)}."
        )
    return [_load(report, place) for place in places]


def _load(report: RoutingReport, place: int) -> ExpertLoad:
    shares = [
        router.load[router.experts.index(place)]
        for router in report.routers
        if place in router.experts
    ]
    return ExpertLoad(
        mean=report.load[place],
        lowest=min(shares, default=0.0),
        highest=max(shares, default=0.0),
        domains={
            domain.name: load[place]
            for domain, load in zip(report.domains, report.domain_load, strict=True)
        },
    )


def _plain(value: Any) -> str | None:
    """An enum's value, as it stands in the file."""
    return None if value is None else str(getattr(value, "value", value))


def _kind(saved: SavedModel) -> str:
    if len(saved.adapters) > 1 or saved.attached is not None:
        return "adapters"
    return "mixture" if isinstance(saved.places[0].config, MoELoraConfig) else "lora"


def _experts(
    saved: SavedModel, notes: list[str]
) -> tuple[tuple[DescribedExpert, ...], list[Expert]]:
    told, read = [], []
    # every adapter is read once, whatever number of experts it holds
    contents = {folder: _content(folder) for folder in saved.adapters.values()}
    for index, place in enumerate(saved.places):
        content = contents[place.folder]
        if isinstance(content, str):
            notes.append(f"Expert {place.name!r}: {content}")
            told.append(_unread(index, place))
            continue
        expert = content[place.index]
        read.append(expert)
        told.append(_told(index, place, expert))
        if told[-1].update_norm == 0:
            notes.append(f"Expert {place.name!r} is zero: was it ever trained?")
    return tuple(told), read


def _content(folder: str) -> list[Expert] | str:
    """An adapter's experts; or why they cannot be told apart from what else it holds."""
    try:
        return read_experts(folder)
    except UnsupportedLayerError as error:
        return str(error)


def _told(index: int, place: ExpertPlace, expert: Expert) -> DescribedExpert:
    used = {name: pair.rows(used_ranks(pair)) for name, pair in expert.layers.items()}
    used = {name: pair for name, pair in used.items() if pair.rank}
    return DescribedExpert(
        index=index,
        name=place.name,
        adapter=place.adapter,
        rank=max((pair.rank for pair in used.values()), default=0),
        layers=len(used),
        parameters=sum(pair.a.numel() + pair.b.numel() for pair in used.values()),
        update_norm=math.sqrt(sum(map(squared_norm, used.values()))),
        mature=expert.mature,
    )


def _unread(index: int, place: ExpertPlace) -> DescribedExpert:
    """An expert that is more than A and B: only its config is told."""
    return DescribedExpert(index, place.name, place.adapter, place.config.r, 0, 0, None, None)


def squared_norm(pair: LoraPair) -> float:
    """The squared Frobenius norm of ``scaling B A``, in rank space.

    ``|B A|^2 = trace((B.T B) (A A.T))``: no ``[out, in]`` product is formed. Convolutions count
    every entry of their kernel.
    """
    a, b = pair.a.double().flatten(1), pair.b.double().flatten(1)
    return float(((b.T @ b) * (a @ a.T)).sum()) * pair.scaling**2


def _files(source: "str | os.PathLike[str]", saved: SavedModel) -> dict[str, Path]:
    """The tensor files, by their path below the source."""
    files: dict[str, Path] = {}
    for adapter, folder in saved.adapters.items():
        locate = adapter_locator(folder)
        inside = "" if Path(folder) == Path(source) else f"{adapter}/"
        files.update(_found(locate, inside))
    if saved.attached is not None:
        files[ROUTER_FILE] = Path(source) / ROUTER_FILE
    return files


def _found(locate: Locator, inside: str) -> dict[str, Path]:
    paths = {name: locate(name) for name in (_peft.SAFETENSORS_WEIGHTS_NAME, ROUTER_FILE)}
    return {f"{inside}{name}": path for name, path in paths.items() if path is not None}


def _sizes(path: Path) -> tuple[int, set[str]]:
    """Number of parameters and dtypes, from the header alone."""
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
    return sum(math.prod(one.get_shape()) for one in slices), {one.get_dtype() for one in slices}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _router(saved: SavedModel, files: dict[str, Path]) -> DescribedRouter | None:
    if saved.attached is not None:
        return _attached_router(saved)
    config = saved.places[0].config
    if not isinstance(config, MoELoraConfig) or not config.use_moe_routing:
        return None
    tensors: dict[str, Tensor] = {}
    digest = None
    for name, path in files.items():
        if name.endswith(_peft.SAFETENSORS_WEIGHTS_NAME):
            tensors.update(
                {f"{name} {key}": one for key, one in read_tensors(path, only=ROUTER_KEY).items()}
            )
        elif len(saved.adapters) == 1:
            digest = read_router_file(path).metadata.get("sha256")
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return DescribedRouter(
        router_type=config.router_type,
        router_scope=config.router_scope,
        top_k=None if config.router_type == "fixed" else config.top_k_experts,
        temperature=None if config.router_type == "fixed" else config.router_temperature,
        hidden_size=config.router_hidden_size,
        routers=sum(key.endswith(".lora_router.weight") for key in tensors),
        parameters=sum(tensor.numel() for tensor in floats),
        digest=digest,
    )


def _attached_router(saved: SavedModel) -> DescribedRouter:
    file: Any = saved.attached
    settings = _settings(file.metadata.get("router_config"))
    floats = [tensor for tensor in file.tensors.values() if tensor.is_floating_point()]
    return DescribedRouter(
        router_type="attached",
        router_scope="model",
        top_k=settings.get("top_k"),
        temperature=settings.get("temperature"),
        hidden_size=settings.get("hidden_size"),
        routers=1,
        parameters=sum(tensor.numel() for tensor in floats),
        digest=file.metadata.get("sha256"),
    )


def _settings(text: str | None) -> dict[str, Any]:
    """The arguments of the router's class, if it is one of ours."""
    try:
        settings = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
