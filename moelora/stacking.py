"""Experts of unequal rank and scaling as one LoRA: padding, folding, stacking, and the targets.

Nothing here needs the base model: the tensors' shapes and the adapters' configs say all.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelora import _peft
from moelora.expert_tensors import PREFIX, Expert, LoraPair

_HALF_PRECISION = (torch.float16, torch.bfloat16)
_RESTRICTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Stack:
    """Tensors and the fields of the config that say how they are used.

    Attributes:
        tensors: A and B by their key in an adapter file.
        fields: ``r``, ``lora_alpha`` and their patterns, per expert.
        rounding: the largest relative change of an entry of a stored B (against the largest entry
            of its expert's B in that layer) by folding scalings into it; 0 if all is exact.
        dtype: of the tensors.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    rounding: float
    dtype: torch.dtype


def common_scaling(scalings: Iterable[float]) -> float:
    """The scaling that the most experts can have without rounding, given theirs.

    B of an expert is multiplied by its own scaling over the common one; where that is a power of
    two, nothing is rounded.

    Example:
        >>> common_scaling([2.0, 3.0, 0.5])
        2.0
    """
    counts = Counter(scalings)

    def exact(candidate: float) -> tuple[int, int]:
        kept = sum(n for one, n in counts.items() if _is_exact(one, candidate))
        return kept, counts[candidate]

    usable = [scaling for scaling in counts if scaling != 0]
    return max(usable, key=exact) if usable else 1.0


def _is_exact(scaling: float, common: float) -> bool:
    mantissa, _ = math.frexp(scaling / common)
    return abs(mantissa) in (0.0, 0.5)


def stack(
    experts: Sequence[dict[str, LoraPair]], *, ranks: dict[str, int], one_scaling: bool = False
) -> Stack:
    """Stack experts into one LoRA; ranks and layers that an expert lacks are zero.

    Args:
        experts: each one's pairs by layer.
        ranks: the rank of every expert in each layer, not less than that of any.
        one_scaling: the same scaling in all layers, without patterns.
    """
    layers = sorted(ranks, key=_natural)
    pairs = {layer: [e[layer] for e in experts if layer in e] for layer in layers}
    if one_scaling:
        every = common_scaling(pair.scaling for found in pairs.values() for pair in found)
        wanted = dict.fromkeys(layers, every)
    else:
        wanted = {n: common_scaling(pair.scaling for pair in found) for n, found in pairs.items()}
    alphas = {layer: _tidy(wanted[layer] * ranks[layer]) for layer in layers}
    # what PEFT will compute from the config, which may differ in the last bit
    number = len(experts)
    scalings = {n: (alphas[n] * number) / (ranks[n] * number) for n in layers}
    dtype = _widest(pair for found in pairs.values() for pair in found)
    if dtype in _HALF_PRECISION and _rounding(pairs, scalings, dtype) > 0:
        dtype = torch.float32
    tensors = {}
    for layer in layers:
        a, b = _stacked(experts, layer, ranks[layer], scalings[layer], dtype)
        names = _half_names(pairs[layer][0])
        tensors.update({f"{PREFIX}{layer}.{names[0]}": a, f"{PREFIX}{layer}.{names[1]}": b})
    return Stack(tensors, _fields(ranks, alphas), _rounding(pairs, scalings, dtype), dtype)


def _half_names(pair: LoraPair) -> tuple[str, str]:
    if pair.embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _stacked(
    experts: Sequence[dict[str, LoraPair]],
    layer: str,
    rank: int,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    first = next(e[layer] for e in experts if layer in e)
    number = len(experts)
    a = torch.zeros(number * rank, *first.a.shape[1:], dtype=dtype)
    b = torch.zeros(first.b.shape[0], number * rank, *first.b.shape[2:], dtype=dtype)
    for index, expert in enumerate(experts):
        pair = expert.get(layer)
        if pair is not None:
            own = slice(index * rank, index * rank + pair.rank)
            a[own] = pair.a.to(dtype)
            b[:, own] = folded(pair, scaling).to(dtype)
    return a, b


def folded(pair: LoraPair, scaling: float) -> Tensor:
    """B of an expert for use with another scaling, so that the product stays; float64."""
    ratio = pair.scaling / scaling
    # a scaling that the config can only give to its last bit is that scaling
    if abs(ratio - 1) <= 4 * torch.finfo(torch.float64).eps:
        ratio = 1.0
    return pair.b.double() * ratio


def _rounding(
    pairs: dict[str, list[LoraPair]], scalings: dict[str, float], dtype: torch.dtype
) -> float:
    worst = 0.0
    for layer, found in pairs.items():
        for pair in found:
            exact = folded(pair, scalings[layer])
            largest = float(exact.abs().max())
            if largest > 0:
                error = float((exact.to(dtype).double() - exact).abs().max())
                worst = max(worst, error / largest)
    return worst


def _widest(pairs: Iterable[LoraPair]) -> torch.dtype:
    dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _fields(ranks: dict[str, int], alphas: dict[str, int | float]) -> dict[str, Any]:
    """The commonest rank and alpha, and exact patterns for layers that have others."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(n): rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(n): one for n, one in alphas.items() if one != alpha},
    }


def _exactly(layer: str) -> str:
    """A pattern that PEFT matches with this layer alone."""
    return f"^{re.escape(layer)}"


def _tidy(number: float) -> int | float:
    """An integer where it is one, as people write it."""
    return int(number) if float(number).is_integer() else number


def _natural(name: str) -> list[Any]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]


# Ranks that hold nothing ---------------------------------------------------------------------


def used_ranks(pair: LoraPair) -> Tensor:
    """Indices of the ranks that are not zero in both A and B: the others were padding.

    Taking the others away changes nothing, to the bit.
    """
    in_a = pair.a.flatten(1).any(dim=1)
    in_b = pair.b.transpose(0, 1).flatten(1).any(dim=1)
    return (in_a | in_b).nonzero().flatten()


def without_padding(layers: dict[str, LoraPair]) -> dict[str, LoraPair]:
    """Strip ranks and layers in which both factors are zero.

    An expert that is zero everywhere keeps one zero rank in every layer.
    """
    stripped = {name: pair.rows(used_ranks(pair)) for name, pair in layers.items()}
    used = {name: pair for name, pair in stripped.items() if pair.rank > 0}
    return used or {name: pair.rows(slice(0, 1)) for name, pair in layers.items()}


# Targets -------------------------------------------------------------------------------------


def target_fields(experts: Sequence[Expert], layers: Iterable[str]) -> dict[str, Any]:
    """The fields of a config that target exactly ``layers`` in the base model of these experts.

    The adapters' own short names (or pattern) are kept where they mean exactly these layers, which
    can be told without the base model; otherwise every layer is named in full.

    Args:
        experts: at least one; what their configs target is known by their layers.
        layers: some or all of their layers.
    """
    wanted = set(layers)
    known = {layer for expert in experts for layer in expert.layers}
    configs = [expert.config for expert in experts]
    short = _short_targets(experts, known, wanted)
    restrictions = [{name: getattr(c, name) for name in _RESTRICTIONS} for c in configs]
    if short is not None and all(one == restrictions[0] for one in restrictions):
        return {"target_modules": short, **restrictions[0]}
    return {"target_modules": sorted(wanted, key=_natural)}


def _short_targets(experts: Sequence[Expert], known: set[str], wanted: set[str]) -> Any:
    """Common short targets, or None if there are none for exactly ``wanted``."""
    targets = [expert.config.target_modules for expert in experts]
    if not all(_says_its_layers(expert) for expert in experts):
        return None
    if any(isinstance(one, str) for one in targets):
        same = all(one == targets[0] for one in targets)
        return targets[0] if same and wanted == known else None
    union = {target for one in targets for target in one}
    kept = [t for t in union if all(n in wanted for n in known if _matches(n, t))]
    covered = {n for n in known if any(_matches(n, t) for t in kept)}
    return sorted(kept) if covered == wanted else None


def _says_its_layers(expert: Expert) -> bool:
    """Whether a config's targets are those of its file: none without a layer, no layer without."""
    config = expert.config
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return False
    if not all(_peft.check_target_module_exists(config, name) for name in expert.layers):
        return False
    return isinstance(targets, str) or all(
        any(_matches(name, target) for name in expert.layers) for target in targets
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
