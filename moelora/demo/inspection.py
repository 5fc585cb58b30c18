"""Watching a trained mixture at work on the validation texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moelora import record_routing
from moelora._peft import PeftModel
from moelora.demo.batches import Batch, Encoded
from moelora.demo.results import TokenView, Usage
from moelora.demo.train import completion_loss
from moelora.demo.usage import (
    clearest_routers,
    example_shares,
    layer_shares,
    separation,
    shuffled_separation,
    skill_shares,
    stack_routing_weights,
)
from moelora.report.names import layer_of, spell_tokens

DIGITS = 4


@dataclass(frozen=True)
class Watched:
    """Losses of a mixture and the routing behind them."""

    losses: dict[str, float]
    routers: list[str]
    shares: Float[Tensor, "examples routers experts"]
    skills: Int[Tensor, " examples"]


def watch_mixture(model: PeftModel, valid: Mapping[str, Sequence[Batch]]) -> Watched:
    """Measure the completion loss of each skill and record the routing of the same forwards.

    Args:
        model: a mixture in evaluation mode.
        valid: batches of each skill.
    """
    losses: dict[str, float] = {}
    shares: list[Tensor] = []
    skills: list[int] = []
    with record_routing(model) as record:
        for position, (name, batches) in enumerate(valid.items()):

            def collect(batch: Batch, position: int = position) -> None:
                weights = stack_routing_weights(record.routing, batch.attention_mask)
                shares.append(example_shares(weights))
                skills.extend([position] * len(weights))

            losses[name] = completion_loss(model, batches, on_batch=collect)
        routers = list(record.routing)
    return Watched(losses, routers, torch.cat(shares), torch.tensor(skills))


def summarise_usage(
    watched: Watched,
    model: PeftModel,
    texts: Mapping[str, tuple[Encoded, Batch]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Usage:
    """Boil recorded routing down to what the report shows.

    Args:
        watched: of the validation texts.
        model: the same mixture, to route the single texts.
        texts: one of each skill, alone in its batch.
        tokenizer: to spell their tokens.
        seed: of the shuffled baseline.
    """
    layers = [layer_of(name) for name in watched.routers]
    by_skill = skill_shares(watched.shares, watched.skills)
    separations = separation(by_skill)
    shown = list(clearest_routers(separations, layers).values())
    shuffled = shuffled_separation(watched.shares, watched.skills, seed=seed)
    return Usage(
        skills=_rounded(by_skill.mean(dim=1)),
        layers=_rounded(layer_shares(by_skill, layers)),
        shown=[watched.routers[router] for router in shown],
        shown_skills=_rounded(by_skill[:, shown].transpose(0, 1)),
        separations=_rounded(separations[shown]),
        mean_separation=round(separations.mean().item(), DIGITS),
        shuffled_separation=round(shuffled.mean().item(), DIGITS),
        tokens=[
            _token_view(name, example, batch, model, tokenizer, shown=shown)
            for name, (example, batch) in texts.items()
        ],
    )


@torch.no_grad()
def _token_view(
    skill: str,
    example: Encoded,
    batch: Batch,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shown: Sequence[int],
) -> TokenView:
    with record_routing(model) as record:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        weights = stack_routing_weights(record.routing, batch.attention_mask)[0]
    percent = (100 * weights[:, list(shown)]).round().int()
    # routers x tokens x experts
    return TokenView(
        skill,
        spell_tokens([*example.prompt, *example.completion], tokenizer),
        percent.transpose(0, 1).tolist(),
    )


def _rounded(values: Tensor) -> Any:
    # nested lists as deep as the tensor has axes
    return (values.double() * 10**DIGITS).round().div(10**DIGITS).tolist()
