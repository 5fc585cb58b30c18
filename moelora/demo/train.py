"""Training one adapter, and measuring its completion loss."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from moelora.demo.batches import IGNORED, Batch

LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.1
LARGEST_GRADIENT_NORM = 1.0


def train_adapter(
    model: nn.Module, steps: Sequence[Batch], *, on_step: Callable[[float], None]
) -> None:
    """Train the trainable parameters of a model on the given batches, one step each.

    AdamW without weight decay; the rate climbs linearly to 2e-3 over the first tenth of the steps
    and falls linearly to zero; gradients are clipped to norm 1. Every contender of the demo is
    trained by this function, on the same batches in the same order.

    Args:
        model: returns outputs with a ``loss`` when called with labels.
        steps: the batches.
        on_step: told the loss after each step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps=len(steps))
    )
    model.train()
    for batch in steps:
        loss = _loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        on_step(loss.item())
    model.eval()


def learning_rate_share(step: int, *, steps: int) -> float:
    """Return the share of the highest learning rate that a step uses, in ``(0, 1]``.

    Args:
        step: counted from 0; beyond the last step the share is 0.
        steps: the length of the run.
    """
    warmup = max(1, math.ceil(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup + 1)))


@torch.no_grad()
def completion_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> float:
    """Return the mean cross entropy of all completion tokens, in nats per token.

    Args:
        model: in evaluation mode, where its loss holds no auxiliary term.
        batches: at least one completion token in all.
        on_batch: called after the forward of each batch.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        # the first position predicts nothing, since it has nothing before it
        targets = int((batch.labels[:, 1:] != IGNORED).sum())
        total += _loss(model, batch).item() * targets
        tokens += targets
        if on_batch is not None:
            on_batch(batch)
    return total / tokens


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    return loss
