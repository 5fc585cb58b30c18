"""From a built variant and conditions to the step that is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.baselines import Built, Variant, build
from benchmarks.cases import Conditions
from benchmarks.shapes import BaseModels
from benchmarks.timing import Step, capture, do_nothing

#: Positions of a static cache beyond the prompt.
_ROOM = 16
_NEW_TOKENS = 32


def token_ids(vocabulary: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Random tokens, the same for every variant."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, vocabulary, (batch, tokens), generator=generator).to(device)


def build_for(conditions: Conditions, variant: Variant, bases: BaseModels) -> Built:
    """The variant over the base model that its conditions name, ready to run."""
    base = bases.copy_of(conditions.shape, conditions.dtype)
    tokens = 1 if conditions.kind == "decode" else conditions.tokens
    built = build(variant, base, batch=conditions.batch, tokens=tokens)
    training = conditions.kind in {"train", "leak"}
    built.model.train(training)
    if training and conditions.checkpointing:
        checkpoint(built, conditions)
        # as the Trainer does: recomputation needs an input that asks for a gradient
        built.model.enable_input_require_grads()
    return built


def checkpoint(built: Built, conditions: Conditions) -> None:
    """Switch gradient checkpointing on, of the kind that the conditions name."""
    kwargs = {"use_reentrant": conditions.checkpointing == "reentrant"}
    if conditions.mode == "graph":
        # while a graph is recorded the generator's state cannot be read; nothing here is random
        kwargs["preserve_rng_state"] = False
    built.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def base_model_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compiled(built: Built, conditions: Conditions) -> Callable[..., Any]:
    """The forward as the mode asks: torch.compile, or as it is."""
    if conditions.mode == "compile":
        return torch.compile(built.call)
    if conditions.mode == "reduce-overhead":
        return torch.compile(built.call, mode="reduce-overhead")
    return built.call


def make_step(built: Built, conditions: Conditions) -> Step:
    """The step to time, recorded in a CUDA graph if the mode asks for it."""
    device = next(built.model.parameters()).device
    makers = {"train": _training, "leak": _training, "prefill": _prefill, "decode": _decode}
    makers["generate"] = _generate
    step = makers[conditions.kind](built, conditions, device)
    return capture(step) if conditions.mode == "graph" else step


def training_inputs(
    built: Built, conditions: Conditions, device: torch.device
) -> dict[str, Tensor]:
    """Tokens with labels. A frozen model gets embeddings that ask for a gradient instead.

    So the base line is what a training step costs without adapters: forward, and backward through
    every layer to its input.
    """
    model = base_model_of(built.model)
    ids = token_ids(model.config.vocab_size, conditions.batch, conditions.tokens, device)
    if built.trainable:
        return {"input_ids": ids, "labels": ids}
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return {"inputs_embeds": embeddings, "labels": ids}


def loss_scale(conditions: Conditions) -> float:
    """What the loss is multiplied with before backward: float16 would lose small gradients."""
    return 2.0**12 if conditions.dtype == "fp16" else 1.0


def _training(built: Built, conditions: Conditions, device: torch.device) -> Step:
    inputs = training_inputs(built, conditions, device)
    call = compiled(built, conditions)
    leaves = [*built.trainable, *(value for value in inputs.values() if value.requires_grad)]
    optimizer = None
    if conditions.optimizer:
        fused = device.type == "cuda"
        optimizer = torch.optim.AdamW(built.trainable, lr=1e-5, fused=fused, capturable=fused)

    scale = loss_scale(conditions)

    def run() -> Tensor:
        loss: Tensor = call(**inputs).loss
        (loss if scale == 1 else loss * scale).backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    def forget_gradients() -> None:
        if conditions.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        for leaf in leaves:
            leaf.grad = None

    return Step(run, prepare=forget_gradients)


def _prefill(built: Built, conditions: Conditions, device: torch.device) -> Step:
    model = base_model_of(built.model)
    ids = token_ids(model.config.vocab_size, conditions.batch, conditions.tokens, device)
    call = compiled(built, conditions)

    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = call(input_ids=ids, use_cache=built.cached, logits_to_keep=1).logits
        return logits

    return Step(run, prepare=_mark_step(conditions))


def _mark_step(conditions: Conditions) -> Callable[[], None]:
    if conditions.mode == "reduce-overhead":
        return torch.compiler.cudagraph_mark_step_begin
    return do_nothing


def _decode(built: Built, conditions: Conditions, device: torch.device) -> Step:
    """One token per row, after a prompt whose keys and values lie in a static cache.

    The step that is timed and the slow one read the same cache: a prompt of a thousand tokens run
    twice may send one of them to another expert, by rounding.
    """
    model = base_model_of(built.model)
    length = conditions.tokens
    ids = token_ids(model.config.vocab_size, conditions.batch, length + 1, device)
    if built.prompt is None:
        built.prompt = StaticCache(config=model.config, max_cache_len=length + _ROOM)
        with torch.no_grad():
            built.call(input_ids=ids[:, :length], past_key_values=built.prompt, logits_to_keep=1)
    cache = built.prompt
    last = ids[:, length:].clone()
    call = compiled(built, conditions)
    mark = _mark_step(conditions)

    def rewind() -> None:
        """The cache grows in place with each run; take the token back."""
        mark()
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = call(input_ids=last, past_key_values=cache, use_cache=True).logits
        return logits

    return Step(run, prepare=rewind, rewind=rewind)


def _generate(built: Built, conditions: Conditions, device: torch.device) -> Step:
    """``generate`` as people call it, per token."""
    model = base_model_of(built.model)
    ids = token_ids(model.config.vocab_size, conditions.batch, conditions.tokens, device)
    mask = torch.ones_like(ids)

    def run() -> Tensor:
        made: Tensor = built.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return made

    return Step(run, repeats=_NEW_TOKENS)
