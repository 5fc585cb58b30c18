"""From texts to directions: the pooled final hidden states of the frozen base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from moelora import _peft
from moelora.binding import base_of
from moelora.errors import SkillError, UnsupportedLayerError
from moelora.places import is_encoder_decoder
from moelora.scope import Frame, RoutingScope, scope_of


def pool_hidden_states(
    hidden_states: Float[Tensor, "batch seq hidden"],
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch hidden"]:
    """The direction of each text: the mean over its real tokens, normalised.

    ``v = mean_t h_t`` over the tokens whose mask is not 0, then ``v / |v|``. Computed in float32;
    whatever stands at padding, even NaN, has no influence.

    Args:
        hidden_states: final hidden states.
        attention_mask: 0 (or False) at padding; None where there is none.

    Raises:
        SkillError: if a text has no real token, or a mean that is zero or not finite.

    Example:
        >>> hidden = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])
        >>> pool_hidden_states(hidden, torch.tensor([[1, 0]]))
        tensor([[0.6000, 0.8000]])
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    mask: Tensor = (
        torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device)
        if attention_mask is None
        else attention_mask.to(wide.device) != 0
    )
    tokens = mask.sum(dim=1, keepdim=True)
    if wide.shape[0] and bool((tokens == 0).any()):
        empty = (tokens[:, 0] == 0).nonzero()[:, 0].tolist()
        raise SkillError(
            f"Texts {empty} have no real token (their attention_mask is 0 throughout)."
        )
    sums = wide.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)
    return unit_rows(sums / tokens, what="The mean of a text's hidden states")


def unit_rows(vectors: Tensor, *, what: str) -> Tensor:
    """Rows of length 1; a row without a direction is an error."""
    if not bool(torch.isfinite(vectors).all()):
        raise SkillError(f"{what} holds NaN or infinity.")
    # by the largest entry first: squares of very large or small entries leave float32's range
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    if bool((largest == 0).any()):
        raise SkillError(f"{what} is zero, so it has no direction.")
    scaled = vectors / largest
    unit: Tensor = scaled / scaled.norm(dim=-1, keepdim=True)
    return unit


def skill_embeddings(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch hidden"]:
    """Embed texts by the frozen base model, whatever adapters it carries.

    Adapters are off and the model is in evaluation mode meanwhile, so the space of the embeddings
    never moves while experts are trained. Of an encoder-decoder model the encoder embeds.

    Args:
        model: a transformers model, or a PEFT model over one.
        input_ids: token ids; moved to the model's device.
        attention_mask: 0 at padding.

    Returns:
        One row of length 1 for each text, at least float32.

    Raises:
        SkillError: if a text has no real token, or adapters are merged into the base.
        UnsupportedLayerError: if the model gives no final hidden states, or its adapters are no
            LoRA and stay in effect.
    """
    base = base_of(model)
    tuner = getattr(model, "base_model", model)
    is_lora = isinstance(tuner, _peft.LoraModel) and not isinstance(tuner, _peft.AdaLoraModel)
    if isinstance(tuner, _peft.BaseTuner) and not is_lora:
        raise UnsupportedLayerError(
            "skill_embeddings needs LoRA adapters or none, but this model's tuner is "
            f"{type(tuner).__name__}."
        )
    merged = {
        n for m in base.modules() if isinstance(m, _peft.LoraLayer) for n in m.merged_adapters
    }
    if merged:
        raise SkillError(
            f"Adapters {sorted(merged)} are merged into the base model, whose own hidden states "
            "are gone. Call unmerge_adapter() first."
        )
    device = base.get_input_embeddings().weight.device  # type: ignore[operator]
    mask = None if attention_mask is None else attention_mask.to(device)
    scope = scope_of(base) or RoutingScope()
    with torch.no_grad(), _evaluating(base), scope.entered(Frame(adapters_off=True)):
        output = _backbone(base)(
            input_ids=input_ids.to(device), attention_mask=mask, return_dict=True
        )
    hidden_states = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden_states, Tensor):
        raise UnsupportedLayerError(
            f"{type(base).__name__} gives no last_hidden_state to embed by."
        )
    return pool_hidden_states(hidden_states, mask)


def _backbone(base: Any) -> nn.Module:
    if is_encoder_decoder(base):
        encoder: nn.Module = base.get_encoder()
        return encoder
    inner = getattr(base, "base_model", base)
    return inner if isinstance(inner, nn.Module) else base


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
