"""How far a plain LoRA is from a routed model, measured on texts."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moelora import _peft
from moelora.attached import get_moe_config
from moelora.config import MoELoraConfig
from moelora.errors import MergeError
from moelora.expert_folders import SavedModel

_MERGED = "moelora_merged"


@dataclass(frozen=True)
class RoutedDistance:
    """How far a merged LoRA is from the routed model, on given texts.

    Attributes:
        texts: how many were read.
        tokens: predicted tokens in all of them.
        routed_loss: mean negative log-likelihood of the next token, in nats, by the routed model.
        merged_loss: the same by the merged LoRA.
        mean_kl: mean over tokens of ``KL(routed || merged)`` of the next-token distributions.
        largest_kl: the largest of these.
        agreement: the share of tokens for which both find the same token the most likely.
    """

    texts: int
    tokens: int
    routed_loss: float
    merged_loss: float
    mean_kl: float
    largest_kl: float
    agreement: float


def routed_distance(
    saved: SavedModel,
    merged: Path,
    *,
    base_model: nn.Module,
    inputs: Sequence[Tensor],
    show_progress: bool = False,
) -> RoutedDistance:
    """Compare the next-token distributions of the routed model and of a plain LoRA.

    ``KL(p || q) = sum p (log p - log q)`` in nats, at every position that has a next token, in
    float32 or the model's own dtype where that is wider.

    Args:
        saved: the adapters whose routing is the reference.
        merged: the folder of the plain LoRA.
        base_model: a causal language model without adapters; left as it was.
        inputs: token ids ``(batch, seq)`` without padding.
        show_progress: a bar on standard error.

    Raises:
        MergeError: if nothing saved routes these adapters, or the model is no causal language model
            without adapters.
    """
    _check_base(base_model)
    with _loaded(saved, merged, base_model) as model:
        names = list(saved.adapters)
        parts = [
            _compare(model, names, ids)
            for ids in tqdm(inputs, desc="texts", disable=not show_progress, leave=False)
        ]
    total = sum(part.tokens for part in parts)
    if total == 0:
        raise MergeError("The distance needs texts of at least two tokens, got none.")

    def mean(name: str) -> float:
        return sum(float(getattr(part, name)) * part.tokens for part in parts) / total

    return RoutedDistance(
        texts=sum(part.texts for part in parts),
        tokens=total,
        routed_loss=mean("routed_loss"),
        merged_loss=mean("merged_loss"),
        mean_kl=mean("mean_kl"),
        largest_kl=max(part.largest_kl for part in parts if part.tokens),
        agreement=mean("agreement"),
    )


def _check_base(base_model: nn.Module) -> None:
    if isinstance(base_model, _peft.PeftModel) or any(
        isinstance(module, _peft.BaseTunerLayer) for module in base_model.modules()
    ):
        raise MergeError("base_model must have no adapters: give the model they were trained on.")
    if getattr(getattr(base_model, "config", None), "is_encoder_decoder", False):
        raise MergeError(
            "The distance is measured on causal language models; "
            f"{type(base_model).__name__} has an encoder and a decoder."
        )
    can_generate: Any = getattr(base_model, "can_generate", lambda: True)
    if not can_generate():
        raise MergeError(
            "The distance is measured on causal language models; "
            f"{type(base_model).__name__} predicts no next token."
        )


@contextmanager
def _loaded(saved: SavedModel, merged: Path, base_model: nn.Module) -> Iterator[Any]:
    """The base model with all adapters and the merged one; without them afterwards."""
    training = base_model.training
    trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    (first, folder), *others = saved.adapters.items()
    model = _peft.PeftModel.from_pretrained(base_model, folder, adapter_name=first)
    try:
        for name, where in others:
            model.load_adapter(where, adapter_name=name)
        _check_routed(saved, model)
        model.load_adapter(os.fspath(merged), adapter_name=_MERGED)
        model.eval()
        yield model
    finally:
        model.unload()
        base_model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _check_routed(saved: SavedModel, model: Any) -> None:
    """Refuse adapters that no saved router weighs by itself.

    Raises:
        MergeError: if so.
    """
    configs = [model.peft_config[name] for name in saved.adapters]
    routed = any(isinstance(one, MoELoraConfig) and one.routed for one in configs)
    if not routed and get_moe_config(model) is None:
        raise MergeError(
            "The distance cannot be measured: no router that is saved with these adapters routes "
            "them by itself. Pass unmeasured (--yes) to merge without it."
        )


@torch.no_grad()
def _compare(model: Any, names: list[str], ids: Tensor) -> RoutedDistance:
    """The distance on one batch."""
    ids = ids.to(next(model.parameters()).device)
    model.base_model.set_adapter(names, inference_mode=True)
    routed = _log_probs(model(input_ids=ids))
    model.base_model.set_adapter([_MERGED], inference_mode=True)
    # explicit weights, since an attached router would want to weigh this adapter as well
    merged = _log_probs(model(input_ids=ids, routing_weights=torch.ones(1)))
    targets = ids[:, 1:].unsqueeze(-1)
    tokens = targets.numel()
    if tokens == 0:
        return RoutedDistance(ids.shape[0], 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    kl = (routed.exp() * (routed - merged)).sum(dim=-1)
    same = routed.argmax(dim=-1) == merged.argmax(dim=-1)
    return RoutedDistance(
        texts=ids.shape[0],
        tokens=tokens,
        routed_loss=-float(routed.gather(-1, targets).mean()),
        merged_loss=-float(merged.gather(-1, targets).mean()),
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        agreement=float(same.double().mean()),
    )


def _log_probs(output: Any) -> Tensor:
    """Log-probabilities of the next token at every position but the last."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise MergeError(
            "The distance is measured on causal language models, whose output has logits of shape "
            f"(batch, seq, vocabulary); got {type(output).__name__}."
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[:, :-1].to(wide).log_softmax(dim=-1)
