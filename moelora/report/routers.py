"""Which routers a model has, which experts their columns mean, and which layers they serve."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.attached import get_router
from moelora.binding import base_of
from moelora.errors import ReportError
from moelora.layer import binding_of, mixtures_of
from moelora.places import is_encoder_decoder
from moelora.report.names import layer_labels
from moelora.report.statistics import cosines, pair_products
from moelora.scope import ATTACHED, LayerBinding
from moelora.shared import SharedRouters, shared_routers_of

TOKENS, ENCODER, DECODER = "tokens", "encoder tokens", "decoder tokens"
MODEL = "model"


@dataclass(frozen=True)
class RouterPlace:
    """One router: where it stands and what its columns are.

    Attributes:
        name: as :func:`moelora.record_routing` names it.
        block: name of its transformer block, or its own name outside of blocks.
        reads: which tokens it decides over.
        columns: for each of its columns the adapter and the index of the expert in that adapter.
        layers: names of the LoRA layers that it serves.
    """

    name: str
    block: str
    reads: str
    columns: tuple[tuple[str, int], ...]
    layers: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class RoutedModel:
    """All that a report has to know of a model.

    Attributes:
        base: the base model.
        scope: ``"module"``, ``"layer"``, ``"model"``, ``"attached"`` or ``"fixed"``.
        places: routers in the order of the model.
        experts: all experts of those routers, in the order of ``active_adapters``.
        constants: adapters with fixed weights that are active beside learned ones, or alone.
        plain: active adapters that are always on.
        attached: the attached router, if there is one.
        asked: it does not route by itself and has to be asked.
    """

    base: nn.Module
    scope: str
    places: list[RouterPlace]
    experts: list[tuple[str, int]]
    constants: dict[str, tuple[float, ...]]
    plain: list[str]
    attached: nn.Module | None
    asked: bool


def look_at(model: nn.Module) -> RoutedModel:
    """Find the routers of a model's active adapters.

    Args:
        model: a PEFT model with LoRA adapters, or the model they were injected into.

    Raises:
        ReportError: if nothing of it is routed.
    """
    base = base_of(model)
    layers = {binding.name: layer for layer, binding in _bound_layers(base)}
    if not layers:
        raise ReportError(f"{type(model).__name__} has no LoRA adapters, so nothing is routed.")
    first = next(iter(layers.values()))
    if first.disable_adapters or first.merged:
        state = "merged" if first.merged else "disabled"
        raise ReportError(f"The model's adapters are {state}, so nothing is routed.")
    active = list(first.active_adapters)
    experts_of = binding_of(first).experts_of  # type: ignore[union-attr]
    router = get_router(model) if hasattr(model, "base_model") else None
    automatic = base.__dict__.get(ATTACHED)
    attached = automatic if automatic is not None else router
    constants = _constants(layers.values(), active)
    if attached is not None:
        scope, places = "attached", [_whole(layers, active, experts_of)]
    elif places := _learned(base, layers):
        scope = _scope_of(layers, active)
    elif constants:
        scope, places = "fixed", [_whole(layers, list(constants), experts_of)]
    else:
        raise ReportError(
            f"None of the active adapters {active} is routed: a report needs a mixture, or an "
            "attached router over several adapters."
        )
    columns = {column for place in places for column in place.columns}
    routed = {adapter for adapter, _ in columns}
    return RoutedModel(
        base=base,
        scope=scope,
        places=places,
        experts=[(a, e) for a in active for e in range(experts_of.get(a, 1)) if (a, e) in columns],
        constants=constants,
        plain=[a for a in active if a not in routed and a not in constants],
        attached=attached,
        asked=attached is not None and automatic is None,
    )


def _bound_layers(base: nn.Module) -> Iterator[tuple[Any, LayerBinding]]:
    for module in base.modules():
        binding = binding_of(module)
        if isinstance(module, _peft.LoraLayer) and binding is not None:
            yield module, binding


def _constants(layers: Any, active: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The active mixtures with fixed weights."""
    found: dict[str, tuple[float, ...]] = {}
    for layer in layers:
        for name, spec in mixtures_of(layer).items():
            if name in active and spec.routed and not spec.has_router:
                found[name] = spec.fixed_weights
    return {name: found[name] for name in active if name in found}


def _scope_of(layers: dict[str, Any], active: Sequence[str]) -> str:
    for layer in layers.values():
        for name, spec in mixtures_of(layer).items():
            if name in active and spec.has_router:
                return spec.router_scope
    return MODEL


def _whole(
    layers: dict[str, Any], adapters: Sequence[str], experts_of: dict[str, int]
) -> RouterPlace:
    """One router over everything: attached, or constant."""
    columns = tuple((a, e) for a in adapters for e in range(experts_of.get(a, 1)))
    return RouterPlace(MODEL, MODEL, TOKENS, columns, tuple(layers))


def _learned(base: nn.Module, layers: dict[str, Any]) -> list[RouterPlace]:
    """Learned routers, in the order of the modules."""
    two_stacks = is_encoder_decoder(base)

    def reads(decoder: bool) -> str:  # noqa: FBT001 - a predicate's value
        return (DECODER if decoder else ENCODER) if two_stacks else TOKENS

    places = []
    for name, module in base.named_modules():
        shared = shared_routers_of(module)
        if shared is not None and shared.active() and shared.chooses():
            columns = _columns((a, mixtures_of(host)[a]) for a, host in shared.active().items())
            served = tuple(_served_by(shared, layers))
            label = shared.name or MODEL
            places.append(RouterPlace(label, label, reads(shared.reads_decoder), columns, served))
        if name in layers and (columns := _own_columns(module)):
            binding = binding_of(module)
            decoder = binding is not None and binding.reads_decoder
            block = None if binding is None else binding.block_name
            places.append(RouterPlace(name, block or name, reads(decoder), columns, (name,)))
    return places


def _own_columns(layer: Any) -> tuple[tuple[str, int], ...]:
    """The experts that a layer's own routers choose from; none if there is no choice."""
    mixtures = mixtures_of(layer)
    routers = (
        [
            (name, mixtures[name])
            for name in layer.active_adapters
            if name in mixtures and mixtures[name].has_router and name in layer.lora_router
        ]
        if "lora_router" in layer._modules
        else []
    )
    columns = _columns((n, spec) for n, spec in routers if spec.router_scope == "module")
    return columns if len(columns) > 1 else ()


def _columns(mixtures: Any) -> tuple[tuple[str, int], ...]:
    return tuple((name, e) for name, spec in mixtures for e in range(spec.num_experts))


def _served_by(shared: SharedRouters, layers: dict[str, Any]) -> Iterator[str]:
    for name, layer in layers.items():
        inside = not shared.name or name.startswith(f"{shared.name}.")
        if inside and any(a in mixtures_of(layer) for a in shared.active()):
            yield name


def keep_layers(routed: RoutedModel, layers: Sequence[int] | None) -> list[RouterPlace]:
    """Choose the routers of some transformer blocks.

    Args:
        routed: the model.
        layers: numbers of blocks, in any stack; None for every router.

    Raises:
        ReportError: if there is no block of one of these numbers.
    """
    if layers is None:
        return routed.places
    number = {p.name: _block_number(p.block) for p in routed.places}
    known = sorted({n for n in number.values() if n is not None})
    unknown = sorted(set(layers) - set(known))
    if unknown or not layers:
        raise ReportError(
            f"layers must be numbers of routed transformer blocks, {_ranges(known)}, got "
            f"{unknown or list(layers)}."
        )
    return [place for place in routed.places if number[place.name] in layers]


def _block_number(block: str) -> int | None:
    last = block.rsplit(".", 1)[-1]
    return int(last) if last.isdigit() else None


def _ranges(numbers: Sequence[int]) -> str:
    if not numbers:
        return "of which this model has none"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def blocks_of(places: Sequence[RouterPlace]) -> tuple[list[str], list[int]]:
    """Return the layers' labels and, for each router, the position of its layer."""
    blocks = list(dict.fromkeys(place.block for place in places))
    return layer_labels(blocks), [blocks.index(place.block) for place in places]


# Similarity ----------------------------------------------------------------------------------


def similarities(
    routed: RoutedModel, places: Sequence[RouterPlace]
) -> tuple[list[list[list[float | None]] | None], list[list[float | None]] | None, list[str]]:
    """Return the cosines of the experts' updates: of each router, of the whole, and what is amiss.

    The updates of several layers are one long vector: inner products add up. A layer that an expert
    lacks adds nothing to it.

    Args:
        routed: the model.
        places: its routers.
    """
    products = {
        binding.name: _layer_products(layer, routed.experts)
        for layer, binding in _bound_layers(routed.base)
    }
    odd = sorted(name for name, product in products.items() if product is None)
    if odd:
        return (
            [None] * len(places),
            None,
            [f"The similarity of experts is left out: {odd[0]} is more than pairs of A and B."],
        )
    size = len(routed.experts)
    total = torch.zeros(size, size, dtype=torch.float64)
    each: list[list[list[float | None]] | None] = []
    for place in places:
        own = total.new_zeros(size, size)
        for name in place.layers:
            product = products[name]
            own = own if product is None else own + product
        keep = torch.tensor([routed.experts.index(column) for column in place.columns])
        each.append(_rows(cosines(own[keep][:, keep])))
    for product in products.values():
        total = total if product is None else total + product
    return each, _rows(cosines(total)), []


def _layer_products(layer: Any, experts: Sequence[tuple[str, int]]) -> Tensor | None:
    """Inner products of the experts' updates in one layer; None if they are no plain pairs."""
    adapters = [name for name in dict.fromkeys(name for name, _ in experts) if _has(layer, name)]
    plain = not isinstance(layer, _peft.WHOLE_WEIGHT_LAYERS)
    if not plain or any(name in layer.lora_variant for name in adapters):
        return None
    size = len(experts)
    products = torch.zeros(size, size, dtype=torch.float64)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    positions: list[int] = []
    for adapter in adapters:
        pairs += _pairs(layer, adapter)
        positions += [position for position, (name, _) in enumerate(experts) if name == adapter]
    if pairs:
        at = torch.tensor(positions)
        products[at.unsqueeze(1), at.unsqueeze(0)] = pair_products(pairs)
    return products


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _pairs(layer: Any, adapter: str) -> list[tuple[Tensor, Tensor, float]]:
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a, b = a.detach().float().cpu().flatten(1), b.detach().float().cpu().flatten(1)
    spec = mixtures_of(layer).get(adapter)
    number = 1 if spec is None else spec.num_experts
    rank = a.shape[0] // number
    scaling = float(layer.scaling[adapter])
    return [
        (a[e * rank : (e + 1) * rank], b[:, e * rank : (e + 1) * rank], scaling)
        for e in range(number)
    ]


def _rows(values: Tensor) -> list[list[float | None]]:
    return [
        [None if math.isnan(value) else round(value, 6) for value in row] for row in values.tolist()
    ]
