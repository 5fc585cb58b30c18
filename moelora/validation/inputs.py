"""What goes into the model, and which weights the checkpoint gives it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moelora.validation.candidate import Candidate
from moelora.validation.errors import ValidationError
from moelora.validation.own_routing import own_weights
from moelora.validation.ways import Batch, final_hidden, seeded_weights

MAX_TEXT_BYTES = 64 * 2**20


def tokens_of(
    candidate: Candidate, *, text: Path | None, seed: int, number: int
) -> tuple[Tensor, str]:
    """Token ids to run, and where they come from.

    Args:
        candidate: the checkpoint.
        text: a UTF-8 file, read with the base model's tokenizer; None draws random tokens.
        seed: of the random tokens.
        number: of random tokens.

    Raises:
        ValidationError: if the text cannot be read, is empty, or there is no tokenizer.
    """
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(1, candidate.vocabulary, (number,), generator=generator)
        return drawn.to(candidate.device), "random tokens"
    try:
        if text.stat().st_size > MAX_TEXT_BYTES:
            raise ValidationError(f"--text {text} is larger than {MAX_TEXT_BYTES} bytes.")
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"--text {text} cannot be read: {error}") from error
    location = candidate.model.get_base_model().config._name_or_path
    try:
        ids = AutoTokenizer.from_pretrained(location)(content)["input_ids"]
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValidationError(f"--text needs the tokenizer of {location}: {reason}") from error
    if not ids:
        raise ValidationError(f"--text {text} is empty.")
    return torch.tensor(ids, device=candidate.device), f"text {text.name}"


def weights_for(candidate: Candidate, batch: Batch, *, seed: int) -> tuple[Tensor, str]:
    """Routing weights for the comparisons, and where they come from.

    Args:
        candidate: the checkpoint.
        batch: the model's inputs.
        seed: of the random ones.
    """
    tokens = batch["input_ids"]
    number = len(candidate.experts)
    if candidate.router is not None:
        with torch.no_grad():
            hidden = final_hidden(candidate.model, candidate.experts, batch)
            weights: Tensor = candidate.router(hidden)
        return weights, "the checkpoint's router"
    rows, length = tokens.shape
    random = seeded_weights(rows, length, number, seed=seed, device=tokens.device)
    return random, "random (softmax of normal scores)"


def batches_of(
    tokens: Tensor, *, rows: int, length: int, number: int
) -> Iterator[dict[str, Tensor]]:
    """Cut a row of tokens into batches, beginning anew at its end.

    Args:
        tokens: one axis.
        rows: of each batch.
        length: of each row.
        number: of batches.
    """
    need = rows * length * number
    repeated = tokens.repeat(-(-need // len(tokens)))[:need]
    for part in repeated.reshape(number, rows, length):
        yield {"input_ids": part, "attention_mask": torch.ones_like(part)}


def routing_over_time(candidate: Candidate, batches: Sequence[Batch]) -> list[Tensor]:
    """The checkpoint's own routing weights, ``(tokens, experts)`` for each batch.

    Those of a router in each layer are taken together, one after the other.

    Args:
        candidate: the checkpoint.
        batches: the model's inputs, in order.

    Returns:
        One tensor for each batch on the CPU; none if the checkpoint has no router.
    """
    if candidate.router is None and not candidate.mixtures:
        return []
    with torch.no_grad():
        found = [_routing(candidate, batch) for batch in batches]
    return [weights.float().cpu() for weights in found if weights is not None]


def _routing(candidate: Candidate, batch: Batch) -> Tensor | None:
    model: Any = candidate.model
    if candidate.router is not None:
        weights: Tensor = candidate.router(final_hidden(model, candidate.experts, batch))
        return weights.flatten(0, -2)
    configs = [model.peft_config[name] for name in candidate.mixtures]
    if not any(config.has_router for config in configs):
        # constant weights are decided by nobody
        return None
    return torch.cat(list(own_weights(candidate, batch)[1].values()))
