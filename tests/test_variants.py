"""Explicit weights on every LoRA variant: ``base + sum_e w_e (y_e - base)``, exactly, or an error.

``y_e`` is PEFT's own output with that one adapter active, so nothing of a variant is written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from moelora import UnsupportedLayerError
from tests.models import (
    VOCABULARY,
    Block,
    activate,
    adapter_parameters,
    gradients,
    llama_config,
    lora_config,
    lora_model,
    one_layer,
    randomise,
)
from tests.tolerances import assert_close, assert_equal

ROWS, TOKENS = 2, 3


@dataclass(frozen=True)
class Variant:
    """A LoRA variant on a kind of layer.

    Attributes:
        config: the fields that choose it.
        make: the base layer.
        draw: an input.
        beside: fields of the second adapter; a plain LoRA by default.
        per_token: False for convolutions.
    """

    config: dict[str, Any]
    make: Callable[[], nn.Module] = lambda: nn.Linear(8, 6)
    draw: Callable[[], Tensor] = lambda: torch.randn(ROWS, TOKENS, 8)
    beside: dict[str, Any] = field(default_factory=dict)
    per_token: bool = True


DORA = {"use_dora": True}
BLOCKS_A = {"use_bdlora": BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)}
BLOCKS_B = {"use_bdlora": BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2)}
VARIANTS = {
    "DoRA": Variant(DORA),
    "DoRA beside DoRA": Variant(DORA, beside=DORA),
    "DoRA on Conv1D": Variant(DORA, make=lambda: Conv1D(6, 8)),
    "DoRA on an embedding": Variant(
        DORA,
        make=lambda: nn.Embedding(VOCABULARY, 6),
        draw=lambda: torch.randint(0, VOCABULARY, (ROWS, TOKENS)),
    ),
    "DoRA on a 1d convolution": Variant(
        DORA,
        make=lambda: nn.Conv1d(4, 6, 3),
        draw=lambda: torch.randn(ROWS, 4, 6),
        per_token=False,
    ),
    "DoRA on a 2d convolution": Variant(
        DORA,
        make=lambda: nn.Conv2d(4, 6, 3, padding=1),
        draw=lambda: torch.randn(ROWS, 4, 5, 4),
        per_token=False,
    ),
    "DoRA on a 3d convolution": Variant(
        DORA,
        make=lambda: nn.Conv3d(4, 6, 2),
        draw=lambda: torch.randn(ROWS, 4, 3, 3, 3),
        per_token=False,
    ),
    "rsLoRA": Variant({"use_rslora": True}),
    "lora_bias": Variant({"lora_bias": True}, beside={"lora_bias": True}),
    "lora_bias on a convolution": Variant(
        {"lora_bias": True},
        make=lambda: nn.Conv2d(4, 6, 3),
        draw=lambda: torch.randn(ROWS, 4, 5, 4),
        per_token=False,
    ),
    "BD-LoRA, A in blocks": Variant(BLOCKS_A),
    "BD-LoRA, B in blocks": Variant(BLOCKS_B),
    "VeLoRA": Variant({"velora_config": VeloraConfig(num_groups=2, init_type="random")}),
    "VeLoRA of batch averages": Variant({"velora_config": VeloraConfig(num_groups=2)}),
    "KaSA": Variant({"kasa_config": KasaConfig()}, beside={"kasa_config": KasaConfig()}),
    "MonteCLoRA": Variant({"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=3)}),
    "MiCA": Variant({"init_lora_weights": "mica"}),
    "MiCA on an embedding": Variant(
        {"init_lora_weights": "mica"},
        make=lambda: nn.Embedding(VOCABULARY, 6),
        draw=lambda: torch.randint(0, VOCABULARY, (ROWS, TOKENS)),
    ),
}
#: Variants by their field of LoraConfig, or "" for those that are an initialisation.
COVERED = {name for variant in VARIANTS.values() for name in variant.config}
ELSEWHERE = {
    "alora_invocation_tokens": "below, since it needs positions",
    "arrow_config": "below: refused",
    "use_qalora": "only on GPTQ layers, whose kernels need a GPU",
}


def build(variant: Variant, dtype: torch.dtype = torch.float64, **both: Any) -> PeftModel:
    torch.manual_seed(0)
    # made in float32 first: MiCA's decomposition refuses float64
    base = Block(variant.make())
    configs = [
        lora_config(**{**variant.config, **both}),
        lora_config(r=4, lora_alpha=5, **{**variant.beside, **both}),
    ]
    model = lora_model(base, configs).to(dtype)
    # DoRA's magnitude starts as the norm that makes it a plain LoRA: it is drawn anew as well
    randomise(model)
    return model


def inputs_of(variant: Variant, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = variant.draw()
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    lead = (ROWS, TOKENS) if variant.per_token else (ROWS,)
    return x, torch.randn(*lead, 2, dtype=torch.float64, requires_grad=True)


def restart(model: PeftModel) -> None:
    """Let dropout and samplers draw the same again."""
    torch.manual_seed(7)
    for module in model.modules():
        if type(module).__name__ == "MontecloraSampler":
            module.sampler.index = 0


def by_single_adapters(model: PeftModel, x: Tensor, weights: Tensor, names: list[str]) -> Tensor:
    """The law's right-hand side, by PEFT's forward alone."""
    base = one_layer(model).base_layer(x)
    total = base
    for index, name in enumerate(names):
        activate(model, [name])
        factor = weights[..., index]
        shape = (*factor.shape, *(1,) * (base.ndim - factor.ndim))
        restart(model)
        total = total + factor.reshape(shape) * (model(x) - base)
    activate(model, names)
    return total


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_weighted_exactly_with_all_gradients(name: str, training: bool) -> None:
    variant = VARIANTS[name]
    model = build(variant).train(training)
    x, weights = inputs_of(variant)
    differentiable = [x] if x.is_floating_point() else []
    inputs = [weights, *adapter_parameters(model), *differentiable]
    inputs = [value for value in inputs if value.requires_grad]
    expected = by_single_adapters(model, x, weights, ["e0", "e1"])
    wanted = gradients(expected, inputs)
    restart(model)
    output = model(x, routing_weights=weights)
    assert_close(output, expected)
    assert_close(gradients(output, inputs), wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_zero_weights_equal_the_base_to_the_bit(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant)
    x, weights = inputs_of(variant)
    base = one_layer(model).base_layer(x)
    assert_equal(model(x, routing_weights=torch.zeros_like(weights)), base)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_order_of_adapters_does_not_matter(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant).eval()
    x, weights = inputs_of(variant)
    before = model(x, routing_weights=weights)
    activate(model, ["e1", "e0"])
    assert_close(model(x, routing_weights=weights.flip(-1)), before)


@pytest.mark.parametrize("name", ["DoRA", "DoRA on an embedding", "lora_bias", "rsLoRA"])
def test_a_variants_dropout_acts_in_training_only(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant, lora_dropout=0.5).train()
    x, weights = inputs_of(variant)
    activate(model, ["e0"])
    expected = by_single_adapters(model, x, weights[..., :1], ["e0"])
    restart(model)
    assert_close(model(x, routing_weights=weights[..., :1]), expected)
    assert_close(
        model.eval()(x, routing_weights=weights[..., :1]),
        by_single_adapters(model, x, weights[..., :1], ["e0"]),
    )


@pytest.mark.parametrize("name", ["DoRA", "lora_bias", "MiCA", "BD-LoRA, B in blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_variant_in_half_precision_keeps_the_output_dtype(name: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[name]
    model = build(variant, dtype)
    x, weights = inputs_of(variant, dtype)
    output = model(x, routing_weights=weights)
    assert output.dtype == dtype
    expected = by_single_adapters(model.double(), x.double(), weights, ["e0", "e1"])
    assert_close(output, expected, dtype=dtype, check_dtype=False)


# Activated LoRA ---------------------------------------------------------------------------------

INVOCATION = [3, 4]


def _alora() -> tuple[PeftModel, Tensor]:
    torch.manual_seed(0)
    fields = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = lora_model(
        LlamaForCausalLM(llama_config()).double(),
        [
            LoraConfig(r=2, alora_invocation_tokens=INVOCATION, **fields),
            LoraConfig(r=3, alora_invocation_tokens=[9], **fields),
        ],
    )
    randomise(model)
    # invoked in the middle, at the start, and not at all
    ids = torch.tensor([[7, 8, 3, 4, 5], [3, 4, 9, 6, 1], [5, 5, 5, 5, 5]])
    return model, ids


def test_alora_is_weighted_exactly_where_it_is_invoked() -> None:
    model, _ = _alora()
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64)
    offsets = [3, 5, None]
    weights = torch.randn(3, 5, 2, dtype=torch.float64)
    base = layer.base_layer(x)
    expected = base.clone()
    for index, name in enumerate(("e0", "e1")):
        layer.set_adapter([name])
        single = layer(x, alora_offsets=offsets)
        expected = expected + weights[..., index : index + 1] * (single - base)
    layer.set_adapter(["e0", "e1"])
    output = layer(x, alora_offsets=offsets, routing_weights=weights)
    assert_close(output, expected)
    assert_equal(output[2], base[2])
    assert_equal(output[0, :2], base[0, :2])


def test_alora_in_a_model_equals_the_single_adapter_at_one_hot_weights() -> None:
    model, ids = _alora()
    activate(model, ["e0"])
    single = model(input_ids=ids).logits
    assert_close(model(input_ids=ids, routing_weights=torch.ones(1)).logits, single)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert_close(single[2], base[2])
    assert float((single[0, 2:] - base[0, 2:]).detach().abs().max()) > 0
    assert_equal(model(input_ids=ids, routing_weights=torch.zeros(1)).logits, base)


# Refusals and completeness ---------------------------------------------------------------------


def test_arrow_is_refused_by_name() -> None:
    arrow = ArrowConfig(top_k=1)
    # what PEFT's create_arrow_model fills in
    arrow.task_adapter_names, arrow.gks_adapter_names = ["e0"], []
    config = lora_config(arrow_config=arrow)
    model = lora_model(Block(nn.Linear(8, 6)), [lora_config(), config])
    x = torch.randn(ROWS, TOKENS, 8)
    with pytest.raises(
        UnsupportedLayerError, match=r"'e1' of layer 'layer' uses ArrowLinearVariant"
    ):
        model(x, routing_weights=torch.rand(2))
    activate(model, ["e0"])
    before = model(x)
    assert_close(model(x, routing_weights=torch.ones(1)), before)


def test_every_variant_that_peft_has_is_tested() -> None:
    by_field = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    (init,) = [f for f in fields(LoraConfig) if f.name == "init_lora_weights"]
    assert by_field - COVERED - set(ELSEWHERE) == set()
    assert set(init.metadata["lora_variants"]) == {"mica"}
