"""Explicit routing weights: what is accepted, and how they meet the tokens of one layer."""

from typing import Any

import torch
from torch import Tensor

from moelora.errors import RoutingWeightsError
from moelora.scope import Frame

_FORMS = "[batch, seq, E], [batch, 1, E], [batch, E], [E] or [batch, seq, layers, E]"


def check_routing_weights(weights: Any, *, num_experts: int, adapters: list[str]) -> Tensor:
    """Return ``weights`` if they are finite floats of a known form for these experts.

    Raises:
        RoutingWeightsError: if they are no tensor, not of a float dtype, of an unknown number of
            axes, of another E than the active adapters have, empty, or not finite.
    """
    if not isinstance(weights, Tensor):
        raise RoutingWeightsError(
            f"routing_weights must be a torch.Tensor {_FORMS}, got {type(weights).__name__}."
        )
    if weights.layout != torch.strided or weights.is_meta:
        kind = "on the meta device" if weights.is_meta else f"of layout {weights.layout}"
        raise RoutingWeightsError(f"routing_weights must be dense and hold values, got one {kind}.")
    if not weights.is_floating_point():
        raise RoutingWeightsError(
            f"routing_weights must have a floating point dtype, got {weights.dtype}."
        )
    if not 1 <= weights.ndim <= 4:
        raise RoutingWeightsError(
            f"routing_weights must be {_FORMS}, got shape {tuple(weights.shape)}."
        )
    if weights.shape[-1] != num_experts:
        raise RoutingWeightsError(
            f"routing_weights must have E={num_experts} experts in the last axis, those of the "
            f"active adapters {adapters}, got shape {tuple(weights.shape)}."
        )
    # one synchronisation per forward with explicit weights buys an error instead of a NaN loss
    if not _is_tracing(weights) and not bool(torch.isfinite(weights).all()):
        raise RoutingWeightsError("routing_weights must be finite, got NaN or infinity in them.")
    return weights


def _is_tracing(weights: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return weights.is_cuda and torch.cuda.is_current_stream_capturing()


def slice_positions(weights: Tensor, *, start: int | Tensor, length: int) -> Tensor:
    """The weights of ``length`` positions from ``start`` on; past the last given one, that one.

    Args:
        weights: ``(batch, seq, ...)``.
        start: number of positions already in the KV cache.
        length: number of positions in this step.
    """
    if weights.shape[1] == 1:
        return weights
    positions = start + torch.arange(length, device=weights.device)
    return weights.index_select(1, positions.clamp(max=weights.shape[1] - 1))


def align_routing_weights(
    weights: Tensor,
    lead: tuple[int, ...],
    *,
    layer_name: str,
    frame: Frame | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Shape explicit weights so that they broadcast against a layer's ``(*lead, E)``.

    Args:
        weights: checked weights of any accepted form.
        lead: the axes of the layer's input before its features, e.g. ``(batch, seq)``.
        layer_name: for messages.
        frame: the forward they came with; None if the layer was called directly.
        block: the transformer block of the layer, for weights with a layers axis.

    Raises:
        RoutingWeightsError: if tokens and weights do not correspond; the message names the layer.
    """
    if weights.ndim == 1:
        return weights
    if weights.ndim == 4:
        weights = _select_block(weights, layer_name=layer_name, block=block)
    per_token = weights if weights.ndim == 3 else weights.unsqueeze(1)
    if weights.ndim == 2 and frame is None and len(lead) == 1 and weights.shape[0] == lead[0]:
        return weights
    if not lead:
        raise RoutingWeightsError(_misaligned(weights, lead, layer_name))
    if len(lead) == 1:
        return _align_flat(per_token, lead[0], layer_name=layer_name, frame=frame)
    per_token = _repeat_rows(per_token, lead[0], frame)
    rows, positions = per_token.shape[:2]
    inner = 1
    for size in lead[1:]:
        inner *= size
    if rows not in (1, lead[0]) or positions not in (1, inner):
        raise RoutingWeightsError(_misaligned(weights, lead, layer_name))
    shape = (1,) * (len(lead) - 1) if positions == 1 else lead[1:]
    return per_token.reshape(rows, *shape, weights.shape[-1])


def _align_flat(per_token: Tensor, tokens: int, *, layer_name: str, frame: Frame | None) -> Tensor:
    """Weights for an input flattened to ``[batch * seq]``, or with one row per sample."""
    batch, seq = (None, None) if frame is None else (frame.batch_shape or (None, None))
    if batch is None or seq is None:
        batch, seq = per_token.shape[:2]
        if seq == 1 and tokens != batch and batch != 1:
            raise RoutingWeightsError(_misaligned(per_token, (tokens,), layer_name))
    per_token = _repeat_rows(per_token, batch, frame)
    rows, positions = per_token.shape[:2]
    if rows == 1 and positions == 1:
        return per_token.reshape(1, -1)
    if tokens == batch and positions == 1 and rows in (1, batch):
        return per_token.reshape(rows, -1)
    if tokens == batch * seq and rows in (1, batch) and positions in (1, seq):
        return per_token.expand(batch, seq, -1).reshape(tokens, -1)
    raise RoutingWeightsError(_misaligned(per_token, (tokens,), layer_name))


def _repeat_rows(per_token: Tensor, rows: int, frame: Frame | None) -> Tensor:
    """Repeat each row for its beams, as generate repeats the inputs."""
    given = per_token.shape[0]
    if frame is None or frame.row_repeats == 1 or given in (1, rows):
        return per_token
    if given * frame.row_repeats == rows:
        return per_token.repeat_interleave(frame.row_repeats, dim=0)
    return per_token


def _select_block(weights: Tensor, *, layer_name: str, block: tuple[int, int] | None) -> Tensor:
    if block is None:
        raise RoutingWeightsError(
            f"routing_weights with a layers axis, got shape {tuple(weights.shape)}, cannot be "
            f"given to {layer_name!r}, which lies in no transformer block."
        )
    index, number = block
    if weights.shape[2] != number:
        raise RoutingWeightsError(
            f"routing_weights must have {number} layers in axis 2, one per transformer block "
            f"around {layer_name!r}, got shape {tuple(weights.shape)}."
        )
    return weights[:, :, index]


def _misaligned(weights: Tensor, lead: tuple[int, ...], layer_name: str) -> str:
    return (
        f"routing_weights of shape {tuple(weights.shape)} cannot be aligned with the input of "
        f"layer {layer_name!r}, whose axes before the features are {lead}. Per-token weights need "
        "the same batch and seq; [batch, E], [batch, 1, E] and [E] broadcast over seq."
    )
