"""What is compared: the frozen base, PEFT's ways, naive ways, and moelora. Each builds a model.

All adapters are drawn at random and far from zero, since a fresh LoRA adds nothing and would hide a
wrong result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn

from benchmarks.shapes import GPT2_LINEARS, LLAMA_LINEARS, adapted_layers
from moelora import MoELoraConfig, Router, prepare_for_inference

_STD_A, _STD_B = 0.02, 0.1
#: Tokens of the mixed pass when a variant decides by a first pass of its own.
_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        kind: a key of :data:`BUILDERS`.
        experts: experts or adapters.
        top_k: experts with a weight per token.
        r: rank of each.
        adapter_dtype: ``""`` for PEFT's default (float32 over a half-precision base), ``base`` for
            the base model's dtype.
        detail: what distinguishes it further: the router's scope or type, or ``prepared``.
    """

    kind: str
    experts: int = 1
    top_k: int = 1
    r: int = 16
    adapter_dtype: str = ""
    detail: str = ""

    @property
    def name(self) -> str:
        """As in case names, e.g. ``moelora-e8-k2-r16``."""
        if self.kind == "base":
            return "base"
        parts = [self.kind]
        if self.kind not in {"lora", "dora"}:
            parts += [f"e{self.experts}", f"k{self.top_k}"]
        parts.append(f"r{self.r}")
        if self.adapter_dtype:
            parts.append("halfadapters")
        if self.detail:
            parts.append(self.detail)
        return "-".join(parts)


@dataclass
class Built:
    """A model to measure.

    Attributes:
        model: runs by ``call(**inputs)``.
        call: its forward.
        weights: of the adapters per token, where the caller gives them, as ``(batch, seq, E)``.
        explicit: whether ``weights`` are handed to moelora as ``routing_weights``.
        trains: whether it can be trained.
        cached: whether it works with a KV cache.
        prompt: the cache that all steps of decoding read, see :mod:`benchmarks.steps`.
    """

    model: Any
    call: Callable[..., Any]
    weights: Tensor | None = None
    explicit: bool = False
    trains: bool = True
    cached: bool = True
    prompt: Any = None
    keep: list[Any] = field(default_factory=list)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What gets gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]


def build(variant: Variant, base: Any, *, batch: int, tokens: int) -> Built:
    """Put ``variant`` on ``base``.

    Args:
        variant: what to build.
        base: a frozen transformers model, changed in place.
        batch: rows of the input it will get.
        tokens: positions of the input it will get.

    Raises:
        KeyError: for an unknown kind.
    """
    torch.manual_seed(1)
    built = BUILDERS[variant.kind](variant, base, batch, tokens)
    draw_adapters(built.model)
    return built


def draw_adapters(model: nn.Module) -> None:
    """Draw A and B of every adapter anew, and everything of routers by their own rule."""
    for layer in adapted_layers(model).values():
        with torch.no_grad():
            for lora_a in layer.lora_A.values():
                lora_a.weight.normal_(std=_STD_A)
            for lora_b in layer.lora_B.values():
                lora_b.weight.normal_(std=_STD_B)
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight.mul_(1.0 + 0.1 * torch.rand_like(magnitude.weight))


def sparse_weights(
    batch: int, tokens: int, experts: int, top_k: int, device: torch.device
) -> Tensor:
    """Random weights ``(batch, tokens, experts)``, ``top_k`` per token, that sum to 1."""
    generator = torch.Generator(device=device).manual_seed(2)
    logits = torch.randn(batch, tokens, experts, generator=generator, device=device)
    kept, index = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, index, kept.softmax(dim=-1))


def targets_of(base: Any) -> list[str]:
    """The linears of a base model that get adapters."""
    is_gpt2 = any(name.endswith("c_attn") for name, _ in base.named_modules())
    return list(GPT2_LINEARS if is_gpt2 else LLAMA_LINEARS)


def lora_config(variant: Variant, base: Any, **fields: Any) -> LoraConfig:
    """A plain adapter."""
    return LoraConfig(
        r=variant.r,
        lora_alpha=2 * variant.r,
        target_modules=targets_of(base),
        task_type="CAUSAL_LM",
        fan_in_fan_out="c_attn" in targets_of(base),
        **fields,
    )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _base(_variant: Variant, base: Any, _batch: int, _tokens: int) -> Built:
    return Built(base, base)


def _lora(variant: Variant, base: Any, _batch: int, _tokens: int, **fields: Any) -> Built:
    model = get_peft_model(
        base,
        lora_config(variant, base, **fields),
        autocast_adapter_dtype=variant.adapter_dtype != "base",
    )
    return Built(model, model)


def _adapters(variant: Variant, base: Any, **fields: Any) -> Any:
    """Plain adapters ``0`` to ``E - 1``, all active and trainable."""
    fields_of_call: Any = {"autocast_adapter_dtype": variant.adapter_dtype != "base"}
    model = get_peft_model(base, lora_config(variant, base, **fields), "e0", **fields_of_call)
    for number in range(1, variant.experts):
        model.add_adapter(f"e{number}", lora_config(variant, base, **fields), **fields_of_call)
    model.base_model.set_adapter([f"e{number}" for number in range(variant.experts)])
    return model


def _explicit(variant: Variant, base: Any, batch: int, tokens: int, **fields: Any) -> Built:
    """Plain PEFT adapters, weighted by moelora's ``routing_weights``."""
    model = _adapters(variant, base, **fields)
    weights = sparse_weights(batch, tokens, variant.experts, variant.top_k, _device(base))
    return Built(model, partial(model, routing_weights=weights), weights, explicit=True)


def loop_forward(layer: Any, x: Tensor, *args: Any, weights: Tensor, **kwargs: Any) -> Tensor:
    """A mixture the naive way: PEFT's own steps, once per adapter, times its weight."""
    result = layer.base_layer(x, *args, **kwargs)
    dtype = result.dtype
    for number, adapter in enumerate(layer.active_adapters):
        lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
        inputs = layer.lora_dropout[adapter](x.to(lora_a.weight.dtype))
        delta = lora_b(lora_a(inputs)) * layer.scaling[adapter]
        result = result + delta * weights[..., number : number + 1].to(delta.dtype)
    mixed: Tensor = result.to(dtype)
    return mixed


def _loop(variant: Variant, base: Any, batch: int, tokens: int) -> Built:
    model = _adapters(variant, base)
    weights = sparse_weights(batch, tokens, variant.experts, variant.top_k, _device(base))
    for layer in adapted_layers(model).values():
        layer.forward = partial(loop_forward, layer, weights=weights)
    return Built(model, model, weights)


def _moelora(variant: Variant, base: Any, batch: int, tokens: int) -> Built:
    fields: dict[str, Any] = {}
    if variant.detail in {"layer", "model"}:
        fields["router_scope"] = variant.detail
    elif variant.detail == "fixed":
        fields["router_type"] = "fixed"
    elif variant.detail not in {"", "given", "prepared"}:
        raise KeyError(variant.detail)
    config = MoELoraConfig(
        r=variant.r,
        lora_alpha=2 * variant.r,
        num_experts=variant.experts,
        top_k_experts=variant.top_k,
        target_modules=targets_of(base),
        task_type="CAUSAL_LM",
        fan_in_fan_out="c_attn" in targets_of(base),
        **fields,
    )
    model = get_peft_model(
        base,
        config,
        autocast_adapter_dtype=variant.adapter_dtype != "base",
    )
    if variant.detail == "given":
        weights = sparse_weights(batch, tokens, variant.experts, variant.top_k, _device(base))
        return Built(model, partial(model, routing_weights=weights), weights, explicit=True)
    if variant.detail == "prepared":
        prepare_for_inference(model)
    return Built(model, model)


def _save_adapter(variant: Variant, base: Any, folder: str, *, count: int) -> list[str]:
    """Save ``count`` different adapters, since X-LoRA and Arrow take theirs from files only.

    ``base`` is as before afterwards.
    """
    model = get_peft_model(base, lora_config(variant, base))
    paths = []
    for number in range(count):
        draw_adapters(model)
        path = Path(folder) / str(number)
        model.save_pretrained(str(path))
        paths.append(str(path))
    model.unload()
    # PEFT leaves its config behind, and warns at the next adapter
    base.__dict__.pop("peft_config", None)
    return paths


def _xlora(variant: Variant, base: Any, _batch: int, _tokens: int) -> Built:
    """PEFT's X-LoRA with trainable experts.

    Its experts must be named 0, 1, ...; more than a few different files would only cost time.
    """
    base.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        paths = _save_adapter(variant, base, folder, count=1)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(number): paths[0] for number in range(variant.experts)},
            use_trainable_adapters=True,
            layerwise_scalings=True,
            top_k_lora=variant.top_k if variant.top_k < variant.experts else None,
        )
        model = get_peft_model(base, config)
    return Built(model, model, cached=False)


def _arrow(variant: Variant, base: Any, _batch: int, _tokens: int) -> Built:
    """PEFT's Arrow: routes by prototypes, so nothing is trained."""
    with tempfile.TemporaryDirectory() as folder:
        paths = _save_adapter(variant, base, folder, count=variant.experts)
        config = ArrowConfig(top_k=variant.top_k, router_temperature=1.0)
        model = create_arrow_model(base, paths, config)
    return Built(model, model, trains=False)


def _many_passes(variant: Variant, base: Any, _batch: int, _tokens: int) -> Built:
    """One pass without adapters for the router, then one whole pass per expert, logits mixed."""
    model = _adapters(variant, base)
    router = Router(base.config.hidden_size, num_experts=variant.experts, top_k=variant.top_k)
    router.to(_device(base))
    names = [f"e{number}" for number in range(variant.experts)]

    def call(**inputs: Any) -> Any:
        labels = inputs.pop("labels", None)
        inputs.pop("use_cache", None)
        with torch.no_grad(), model.disable_adapter():
            first = model(**inputs, output_hidden_states=True, use_cache=False)
        weights = router(first.hidden_states[-1].float())[:, -inputs.get("logits_to_keep", 0) :]
        mixed: Any = 0
        for number, name in enumerate(names):
            model.base_model.set_adapter(name)
            logits = model(**inputs, use_cache=False).logits
            mixed = mixed + weights[..., number : number + 1].to(logits.dtype) * logits
        model.base_model.set_adapter(names)
        output = first
        output.logits = mixed
        output.hidden_states = None
        if labels is not None:
            vocabulary = mixed.shape[-1]
            output.loss = base.loss_function(logits=mixed, labels=labels, vocab_size=vocabulary)
        return output

    return Built(model, call, cached=False, keep=[router])


BUILDERS: dict[str, Callable[..., Built]] = {
    "base": _base,
    "lora": _lora,
    "dora": partial(_lora, use_dora=True),
    "loop": _loop,
    "xlora": _xlora,
    "arrow": _arrow,
    "npasses": _many_passes,
    "explicit": _explicit,
    "doraexplicit": partial(_explicit, use_dora=True),
    "moelora": _moelora,
}
