"""The ways to run experts: N+1 passes, two passes, one pass; and one LoRA and the base beside them.

How DyLoRA-MoE did it: its first release ran the model once for the router and once for each
expert, and mixed the logits by the mean routing weight of each sequence. Its later one runs the
model twice: all experts summed, for the router; then once more with the routing weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora.config import MoELoraConfig

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to run a model.

    Attributes:
        name: short, for JSON.
        label: for people.
        passes: how many passes through the base model it takes.
        prepare: brings the model into the state that every call needs, once.
        run: gives the logits, and the loss where labels are given.
        finish: undoes ``prepare``.
        adapters: names of the adapters whose parameters it needs.
        router: the router beside them, if any.
    """

    name: str
    label: str
    passes: int
    prepare: Callable[[], None]
    run: Callable[[Batch, Tensor | None], tuple[Tensor, Tensor | None]]
    adapters: Sequence[str] = ()
    router: nn.Module | None = None
    finish: Callable[[], None] = lambda: None


def activate(model: Any, names: Sequence[str]) -> None:
    """Make adapters active, in this order.

    Args:
        model: a PEFT model.
        names: of its adapters.
    """
    model.base_model.set_adapter(list(names))


def lm_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """The loss of the next token, as causal models compute it.

    Args:
        logits: ``(batch, seq, vocabulary)``.
        labels: ``(batch, seq)``, or None.
    """
    if labels is None:
        return None
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten())


def final_hidden(model: Any, names: Sequence[str], batch: Batch) -> Tensor:
    """Final hidden states of a pass with these adapters summed, as upstream's router read them.

    Args:
        model: a PEFT model.
        names: the adapters to activate.
        batch: the model's inputs.
    """
    activate(model, names)
    output = model(**batch, output_hidden_states=True, use_cache=False)
    hidden: Tensor = output.hidden_states[-1]
    return hidden


def mixed_logits(model: Any, experts: Sequence[str], weights: Tensor, batch: Batch) -> Tensor:
    """One pass for each expert, whose logits are mixed.

    Args:
        model: a PEFT model.
        experts: names of plain adapters.
        weights: ``(batch, seq or 1, experts)``.
        batch: the model's inputs.
    """
    mixed = torch.zeros(())
    for index, expert in enumerate(experts):
        activate(model, [expert])
        logits = model(**batch, use_cache=False).logits
        weighted = logits * weights[..., index : index + 1].to(logits.dtype)
        mixed = weighted if index == 0 else mixed + weighted
    if torch.is_grad_enabled():
        # PEFT freezes what is not active, and backward would leave out all experts but the last
        activate(model, experts)
    return mixed


def all_ways(
    model: Any,
    experts: Sequence[str],
    *,
    router: nn.Module,
    mixtures: Sequence[str],
) -> list[Way]:
    """Every way to run these experts, the base and one LoRA first.

    Args:
        model: a PEFT model.
        experts: names of plain adapters.
        router: from final hidden states to routing weights, for the ways of several passes.
        mixtures: the adapters of the single pass, routed in each layer; none leaves it out.
        automatic: switches automatic routing by an attached router on.
    """
    number = len(experts)

    def plain(batch: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = model(**batch, use_cache=False).logits
        return logits, lm_loss(logits, labels)

    def one_pass(batch: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # labels go in, so that the router's own loss is part of a training step
        output = model(**batch, labels=labels, use_cache=False)
        return output.logits, output.loss

    def n_plus_1(batch: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weights = router(final_hidden(model, experts, batch)).mean(dim=1, keepdim=True)
        logits = mixed_logits(model, experts, weights, batch)
        return logits, lm_loss(logits, labels)

    def two_passes(batch: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weights = router(final_hidden(model, experts, batch))
        logits = model(**batch, routing_weights=weights, use_cache=False).logits
        return logits, lm_loss(logits, labels)

    def attach() -> None:
        activate(model, experts)
        model.attach_router(router, automatic_config(number))

    ways = [
        Way(
            "base",
            "base model alone",
            1,
            model.base_model.disable_adapter_layers,
            plain,
            finish=model.base_model.enable_adapter_layers,
        ),
        Way("lora", "one LoRA", 1, lambda: activate(model, experts[:1]), plain, experts[:1]),
        Way(
            "n_plus_1",
            f"{number} + 1 passes (DyLoRA-MoE, first)",
            number + 1,
            lambda: activate(model, experts),
            n_plus_1,
            experts,
            router,
        ),
        Way(
            "two_passes",
            "2 passes (DyLoRA-MoE, later)",
            2,
            lambda: activate(model, experts),
            two_passes,
            experts,
            router,
        ),
        Way(
            "attached",
            "2 passes (moelora, attached router)",
            2,
            attach,
            one_pass,
            experts,
            router,
            finish=model.detach_router,
        ),
    ]
    if mixtures:
        ways.append(
            Way(
                "one_pass",
                "1 pass (moelora, router in each layer)",
                1,
                lambda: activate(model, mixtures),
                one_pass,
                mixtures,
            )
        )
    return ways


def trainable(model: Any, way: Way) -> list[nn.Parameter]:
    """The parameters that this way trains: its adapters' and its router's.

    Args:
        model: a PEFT model.
        way: one of :func:`all_ways`.
    """
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if any(f".{adapter}." in name or name.endswith(f".{adapter}") for adapter in way.adapters)
    ]
    return found + ([] if way.router is None else list(way.router.parameters()))


def automatic_config(experts: int) -> MoELoraConfig:
    """The config that lets an attached router route every forward.

    Args:
        experts: their number.
    """
    return MoELoraConfig(num_experts=experts, top_k_experts=1, router_aux_loss_coef=0.0)


def seeded_weights(
    rows: int, length: int, experts: int, *, seed: int, device: torch.device
) -> Tensor:
    """Random routing weights per token that sum to 1, float32.

    Args:
        rows: batch size.
        length: tokens per row.
        experts: number of weights.
        seed: of the draw.
        device: of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, length, experts, generator=generator)
    return logits.softmax(dim=-1).to(device)
