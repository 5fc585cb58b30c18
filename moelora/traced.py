"""What a compiled forward can do: it is traced once, so nobody looks on and nothing is asked later.

Its backward is one graph that always runs whole, with a gradient of zero for an output that nobody
used; and what the Trainer's callback is to see is added up in tensors made beforehand, which a
graph may write to.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora import _peft
from moelora.errors import AuxLossError
from moelora.scope import LayerBinding, TapeEntry

#: The columns before those of the experts: lost slots, entropy, tokens, tokens times experts.
_LOST, _ENTROPY, _TOKENS, _SIZES, _EXPERTS = range(5)


@torch.library.custom_op("moelora::require_used", mutates_args=())
def require_used(used: Tensor, reason: str) -> Tensor:
    """Raise ``AuxLossError(reason)`` in backward unless ``used``; returns 0.

    An op, since a traced backward cannot raise for a value by itself. It waits for the device.

    Args:
        used: one boolean.
        reason: what to say.

    Raises:
        AuxLossError: if ``used`` is false.
    """
    if not bool(used):
        raise AuxLossError(reason)
    return torch.zeros((), device=used.device)


@require_used.register_fake
def _(used: Tensor, reason: str) -> Tensor:  # noqa: ARG001 - the signature is the op's
    return torch.zeros((), device=used.device)


def deliver_traced(
    weighted: Tensor, outputs: tuple[Tensor, ...], *, watched: int, outside_scale: float | str
) -> tuple[Tensor, ...]:
    """Pass the outputs of a traced forward through; attach the auxiliary loss if need be.

    That is if in backward the gradient of each of the first ``watched`` outputs (``aux_loss`` and
    ``loss``) is zero: the caller used neither, but made a loss of his own of the others. A loss
    that he used with a weight of exactly 0 looks the same.

    Args:
        weighted: the auxiliary loss times its coefficient.
        outputs: what the forward returns.
        watched: how many of them hold the auxiliary loss already.
        outside_scale: how a loss of the caller's own is scaled, or why that cannot be known.
    """
    delivered: tuple[Tensor, ...] = _Deliver.apply(weighted, outside_scale, watched, *outputs)
    return delivered


class _Deliver(torch.autograd.Function):
    """The node that :func:`deliver_traced` lets all outputs pass."""

    @staticmethod
    def forward(
        ctx: Any, weighted: Tensor, outside_scale: float | str, watched: int, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.outside_scale, ctx.watched = outside_scale, watched
        ctx.weighted_like = weighted.new_ones(())
        return tuple(t.clone() if t.ndim == 0 else t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        used = torch.zeros((), dtype=torch.bool, device=ctx.weighted_like.device)
        for gradient in grad_outputs[: ctx.watched]:
            used = used | (gradient != 0).to(used.device)
        if isinstance(ctx.outside_scale, str):
            attached = require_used(used, ctx.outside_scale).to(ctx.weighted_like.dtype)
        else:
            attached = torch.where(used, 0.0, ctx.weighted_like * ctx.outside_scale)
        return attached, None, None, *grad_outputs


class TracedSums:
    """What the routers of a model decide in compiled forwards, added up in two tensors.

    Args:
        base: a bound base model; its adapters stay the same while it is looked at.
    """

    def __init__(self, base: nn.Module) -> None:
        names: dict[str, None] = {"model": None}
        experts, device = 1, None
        for layer in (m for m in base.modules() if isinstance(m, _peft.LoraLayer)):
            binding: LayerBinding | None = layer.__dict__.get("_moelora_binding")
            routers = layer._modules.get("lora_router")
            if binding is None or routers is None:
                continue
            names.update(dict.fromkeys(filter(None, (binding.name, binding.block_name))))
            experts = max(experts, sum(binding.experts_of.values()))
            device = device or next((p.device for p in routers.parameters()), None)
        #: layers, blocks and the model itself: one row for each that may have a router
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names), _EXPERTS + experts, device=device)
        #: the auxiliary loss, and of how many forwards
        self.aux_loss = torch.zeros(2, device=device)
        if "torch._dynamo" in sys.modules:
            # else the whole forward would be kept out of CUDA graphs, for writing to its inputs
            for tensor in (self.sums, self.aux_loss):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def add(self, entries: list[TapeEntry], mean: Tensor | None) -> None:
        """Add a forward's decisions; traced."""
        with torch.no_grad():
            rows: dict[str, Tensor] = {}
            for entry in entries:
                if entry.routing is not None:
                    row = self._row(entry)
                    before = rows.get(entry.layer_name)
                    rows[entry.layer_name] = row if before is None else before + row
            nothing = torch.zeros_like(self.sums[0])
            self.sums.add_(torch.stack([rows.get(name, nothing) for name in self.names]))
            if mean is not None:
                values = torch.stack([mean.detach().float(), torch.ones_like(mean).float()])
                self.aux_loss.add_(values.to(self.aux_loss.device))

    def _row(self, entry: TapeEntry) -> Tensor:
        routing: Any = entry.routing
        probs, selected = routing.router_probs, routing.selected_experts
        mask = entry.token_mask
        real = torch.ones_like(probs[:, 0]) if mask is None else mask.to(probs.dtype)
        per_slot = real[:, None].expand(selected.shape)
        slots = torch.zeros_like(probs).scatter(-1, selected, per_slot).sum(dim=0)
        lost = ((routing.routing_weights.gather(-1, selected) == 0) * per_slot).sum()
        entropy = (torch.special.entr(probs).sum(dim=-1) * real).sum()
        tokens, experts = real.sum(), probs.shape[-1]
        ends = torch.stack([lost, entropy, tokens, tokens * experts])
        row = torch.cat([ends, slots]).float().to(self.sums.device)
        return F.pad(row, (0, self.sums.shape[1] - row.shape[0]))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return both tensors as they were; start anew."""
        taken = self.sums.clone(), self.aux_loss.clone()
        self.sums.zero_()
        self.aux_loss.zero_()
        return taken

    def rows_of(self, sums: Tensor) -> dict[str, tuple[list[float], int]]:
        """Per router that saw tokens: slots of each expert, lost, entropy, tokens; and top k."""
        rows = {}
        for name, row in zip(self.names, sums.tolist(), strict=True):
            lost, entropy, tokens, sizes = row[:_EXPERTS]
            if tokens > 0:
                slots = row[_EXPERTS : _EXPERTS + round(sizes / tokens)]
                rows[name] = [*slots, lost, entropy, tokens], round(sum(slots) / tokens)
        return rows
