"""``merge_experts``: one plain LoRA for fixed weights, and how far it is from the routed model."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.composition import check_others
from moelora.config import MoELoraConfig, is_int, is_number
from moelora.distance import RoutedDistance, routed_distance
from moelora.errors import ConfigError, MergeError
from moelora.expert_folders import SavedModel, find_experts
from moelora.expert_tensors import Expert, LoraPair
from moelora.export import write_lora
from moelora.new_folder import check_new_folder
from moelora.stacking import common_scaling, folded, stack, without_padding


@dataclass(frozen=True)
class MergedExperts:
    """What :func:`merge_experts` has written.

    Attributes:
        folder: the LoRA adapter.
        weights: of every expert by name.
        r: the rank of the LoRA.
        truncation_error: relative Frobenius error of the whole update by truncating it to ``rank``;
            0 if it was not truncated.
        worst_layer_error: the same of the layer where it is largest.
        exact: the LoRA is the mixture, since its routing is fixed to these very weights.
        distance: from the routed model; None if it was not measured.
    """

    folder: Path
    weights: dict[str, float]
    r: int
    truncation_error: float
    worst_layer_error: float
    exact: bool
    distance: RoutedDistance | None


def merge_experts(
    source: "str | os.PathLike[str]",
    out: "str | os.PathLike[str]",
    *,
    weights: Sequence[int | float] | None = None,
    rank: int | None = None,
    base_model: nn.Module | None = None,
    inputs: Sequence[Tensor] = (),
    unmeasured: bool = False,
    force: bool = False,
    show_progress: bool = False,
) -> MergedExperts:
    """Write one plain LoRA that adds ``sum_e w_e scaling_e B_e A_e``, the same for every token.

    A routed mixture gives every token other weights, so this is another model; how different is
    measured on ``inputs``, and never passed over: without them the call is refused unless
    ``unmeasured`` says that the distance may stay unknown. Only for ``router_type="fixed"`` with
    these very weights is it the same, and nothing needs to be measured.

    Experts of weight 0 are left out. Without ``rank`` the LoRA is exact, of the sum of the other
    experts' ranks (without padding); with it each layer's update is truncated to its best
    approximation of that rank (by the singular value decomposition, in rank space), and the error
    is told.

    Args:
        source: the folder or hub id of a mixture, or a folder of several adapters.
        out: the folder to write.
        weights: one number per expert, used as they are; None for those of
            ``router_type="fixed"``.
        rank: truncate to this rank; None for the exact LoRA.
        base_model: to measure with; it is used in eval mode and left without adapters.
        inputs: token ids ``(batch, seq)`` of the texts to measure on, without padding.
        unmeasured: allow the distance to stay unknown.
        force: replace an adapter that is in ``out``.
        show_progress: a bar over the inputs on standard error.

    Raises:
        ConfigError: if the weights or the rank are not allowed, or inputs come without a base
            model.
        MergeError: if the distance would stay unknown without being allowed to, or cannot be
            measured; nothing is written then.
        CheckpointError: if the source cannot be read, or ``out`` not written.
        UnsupportedLayerError: if an adapter is more than pairs of A and B (DoRA, biases ...).

    Example:
        >>> merged = merge_experts(
        ...     "my-mixture", "mean", weights=[0.5, 0.5], base_model=base, inputs=batches
        ... )  # doctest: +SKIP
        >>> merged.distance.mean_kl  # doctest: +SKIP
        0.0123
    """
    target = check_new_folder(out, force=force, sources=[source])
    saved = find_experts(source)
    constant = _constant_weights(saved)
    chosen = _checked_weights(saved, constant if weights is None else weights)
    if rank is not None and (not is_int(rank) or rank < 1):
        raise ConfigError(f"rank must be None or an integer of at least 1, got {rank!r}.")
    exact = rank is None and constant == chosen
    _check_measure(base_model, inputs, unmeasured=unmeasured or exact)
    experts = saved.read_all()
    check_others(experts)
    layers = _weighted_sum(experts, chosen)
    errors = [(0.0, 0.0)]
    if rank is not None:
        cut = {name: _truncated(pair, rank) for name, pair in layers.items()}
        layers = {name: pair for name, (pair, _) in cut.items()}
        errors = [error for _, error in cut.values()]
    r = max(pair.rank for pair in layers.values())
    stacked = stack([layers], ranks=dict.fromkeys(layers, r), one_scaling=True)
    measure = None
    if base_model is not None and len(inputs) > 0:
        measure = partial(
            routed_distance,
            saved,
            base_model=base_model,
            inputs=inputs,
            show_progress=show_progress,
        )
    distance = write_lora(target, experts, stacked, layers=layers, check=measure)
    return MergedExperts(
        folder=Path(out),
        weights=dict(zip(saved.names, chosen, strict=True)),
        r=r,
        truncation_error=_relative(errors),
        worst_layer_error=max(_relative([error]) for error in errors),
        exact=exact,
        distance=distance,
    )


def _constant_weights(saved: SavedModel) -> list[float] | None:
    """The weights that every token has anyway; None where they depend on the token."""
    config = saved.places[0].config
    if len(saved.adapters) > 1 or saved.attached is not None:
        return None
    if not isinstance(config, MoELoraConfig) or not config.use_moe_routing:
        return [1.0] * len(saved.places)
    if config.has_router:
        return None
    return list(config.fixed_routing_weights or [1 / config.num_experts] * config.num_experts)


def _checked_weights(saved: SavedModel, weights: Any) -> list[float]:
    if weights is None:
        raise ConfigError(
            f"weights must be given, one for each of {saved.names}: the routing depends on the "
            "token, so there are none to take."
        )
    found = list(weights) if isinstance(weights, Iterable) and not isinstance(weights, str) else []
    if len(found) != len(saved.places) or not all(map(is_number, found)):
        raise ConfigError(
            f"weights must be {len(saved.places)} finite numbers, one for each of {saved.names}, "
            f"got {weights!r}."
        )
    if not any(found):
        raise ConfigError("weights must not all be 0: nothing would be left to merge.")
    return [float(weight) for weight in found]


def _check_measure(
    base_model: nn.Module | None, inputs: Sequence[Tensor], *, unmeasured: bool
) -> None:
    if len(inputs) > 0 and base_model is None:
        raise ConfigError("inputs need a base_model to measure with.")
    for ids in inputs:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ConfigError(
                "inputs must be token ids of shape (batch, seq), got "
                f"{tuple(ids.shape) if isinstance(ids, Tensor) else ids!r}."
            )
    if len(inputs) == 0 and not unmeasured:
        raise MergeError(
            "A merged LoRA is not the routed model, and without texts its distance is unknown. "
            "Give inputs and base_model (--data, --base), or accept that with unmeasured (--yes)."
        )


def _weighted_sum(experts: list[Expert], weights: list[float]) -> dict[str, LoraPair]:
    """Each layer's experts side by side, with their weights and scalings in B."""
    chosen = [
        (without_padding(expert.layers), weight)
        for expert, weight in zip(experts, weights, strict=True)
        if weight != 0
    ]
    names = dict.fromkeys(name for layers, _ in chosen for name in layers)
    return {
        name: _side_by_side([(layers[name], w) for layers, w in chosen if name in layers])
        for name in names
    }


def _side_by_side(parts: list[tuple[LoraPair, float]]) -> LoraPair:
    first = parts[0][0]
    scaling = common_scaling(abs(pair.scaling * weight) for pair, weight in parts)
    dtype = torch.float32
    for pair, _ in parts:
        dtype = torch.promote_types(dtype, torch.promote_types(pair.a.dtype, pair.b.dtype))
    b = [folded(pair, scaling / weight) for pair, weight in parts]
    return LoraPair(
        torch.cat([pair.a.to(dtype) for pair, _ in parts]),
        torch.cat(b, dim=1).to(dtype),
        scaling,
        first.embedding,
    )


def _truncated(pair: LoraPair, rank: int) -> tuple[LoraPair, tuple[float, float]]:
    """The best approximation of ``B A`` of a rank, and the squared norms of what is lost and all.

    With ``A.T = Q R`` and ``B = P S``: ``B A = P (S R.T) Q.T``, whose singular values are those of
    the small middle. Each factor gets the square root of the values.
    """
    q, r = torch.linalg.qr(pair.a.double().flatten(1).T)
    p, s = torch.linalg.qr(pair.b.double().flatten(1))
    left, values, right = torch.linalg.svd(s @ r.T, full_matrices=False)
    root = values[:rank].sqrt()
    b = (p @ left[:, :rank]) * root
    a = root.unsqueeze(1) * (q @ right[:rank].T).T
    kept = LoraPair(
        a.reshape(-1, *pair.a.shape[1:]).to(pair.a.dtype),
        b.reshape(pair.b.shape[0], -1, *pair.b.shape[2:]).to(pair.b.dtype),
        pair.scaling,
        pair.embedding,
    )
    squares = values.square() * pair.scaling**2
    return kept, (float(squares[rank:].sum()), float(squares.sum()))


def _relative(errors: Iterable[tuple[float, float]]) -> float:
    """The relative Frobenius error, from squared norms of what is lost and of all."""
    lost, total = map(sum, zip(*errors, strict=True))
    return float((lost / total) ** 0.5) if total else 0.0
