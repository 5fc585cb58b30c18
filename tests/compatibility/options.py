"""Options of ``LoraConfig`` and of PEFT's loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraRuntimeConfig, PeftModel, get_peft_model

from moelora import ConfigError, UnsupportedLayerError
from tests.compatibility.registry import EXPLICIT, MIXTURE, Area, Kind, Refusal, of_model
from tests.lm import lora_layers, perturb, tiny_llama, token_ids, trainable
from tests.tolerances import assert_close, assert_equal

AREA = Area("Options")


def _layer(model: PeftModel, name: str) -> Any:
    return next(layer for key, layer in lora_layers(model).items() if key.endswith(name))


def _round_trip(kind: Kind, model: PeftModel, folder: Path) -> None:
    """What is saved and loaded again gives the same."""
    model.set_adapter("default")
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    assert_equal(kind.logits(loaded, experts=1), kind.logits(model, experts=1))


@AREA.works(
    "`modules_to_save`",
    "trained whole beside the experts, saved and loaded",
    covers=of_model("modules_to_save"),
)
def _(kind: Kind, folder: Path) -> None:
    model = get_peft_model(tiny_llama(), kind.config(modules_to_save=["lm_head"])).eval()
    assert model.modules_to_save == {"lm_head"}
    perturb(model)
    before = kind.logits(model, experts=1)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert_close(kind.logits(model, experts=1), 2 * before, dtype=torch.float32)
    assert any("modules_to_save" in name for name in trainable(model))
    _round_trip(kind, model, folder)


@AREA.works("`trainable_token_indices`", "those rows are trained, saved and loaded")
def _(kind: Kind, folder: Path) -> None:
    tokens = token_ids()[0, :2].tolist()
    model = get_peft_model(tiny_llama(), kind.config(trainable_token_indices=tokens)).eval()
    perturb(model)
    before = kind.logits(model, experts=1)
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert len(deltas) == 1
    assert deltas[0].requires_grad
    with torch.no_grad():
        deltas[0].mul_(3)
    assert not torch.equal(kind.logits(model, experts=1), before)
    _round_trip(kind, model, folder)


@AREA.works("`layer_replication`", "the copies of a block have experts and routers of their own")
def _(kind: Kind, folder: Path) -> None:
    model = get_peft_model(tiny_llama(), kind.config(layer_replication=[(0, 2), (0, 1)])).eval()
    perturb(model)
    layers = lora_layers(model)
    assert len(layers) == 9
    kinds = ["lora_A", "lora_B", *(["lora_router"] if kind is MIXTURE else [])]
    for name in kinds:
        pointers = {getattr(m, name)["default"].weight.data_ptr() for m in layers.values()}
        assert len(pointers) == 9
    first, copied = (
        _layer(model, "layers.0.self_attn.q_proj"),
        _layer(model, "layers.2.self_attn.q_proj"),
    )
    assert first.base_layer.weight.data_ptr() == copied.base_layer.weight.data_ptr()
    # a model with these blocks written out
    whole = tiny_llama(num_hidden_layers=3)
    state = tiny_llama().state_dict()
    copies = {k.replace("layers.0.", "layers.2."): v for k, v in state.items() if "layers.0." in k}
    whole.load_state_dict({**state, **copies})
    expected = get_peft_model(whole, kind.config()).eval()
    own = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    expected.load_state_dict(own, strict=False)
    assert_equal(kind.logits(model, experts=1), kind.logits(expected, experts=1))
    _round_trip(kind, model, folder)


@AREA.works("`rank_pattern`, `alpha_pattern`", "per expert: rank and scaling of the named layers")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 3, "v_proj": 6})
    experts = 3 if kind is MIXTURE else 1
    for name, rank, scaling in (("q_proj", 5, 3 / 5), ("v_proj", 2, 3.0), ("down_proj", 2, 2.0)):
        layer = _layer(model, name)
        assert layer.lora_A["default"].weight.shape[0] == experts * rank
        assert layer.lora_B["default"].weight.shape[1] == experts * rank
        assert abs(layer.scaling["default"] - scaling) < 1e-12
        assert layer.r["default"] == experts * rank
    assert model.peft_config["default"].rank_pattern == {"q_proj": 5}
    _round_trip(kind, model, folder)


@AREA.works("`use_rslora`", "an expert's scaling is alpha / sqrt(its rank)")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(use_rslora=True, r=4)
    for layer in lora_layers(model).values():
        assert abs(layer.scaling["default"] - 4 / 2) < 1e-12
    _round_trip(kind, model, folder)


@AREA.works("`exclude_modules`", "the named modules have no experts")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(exclude_modules=["v_proj", "layers.1.self_attn.q_proj"])
    names = {name.split("layers.")[1] for name in lora_layers(model)}
    assert names == {"0.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj"}
    _round_trip(kind, model, folder)


@AREA.works("`layers_to_transform`", "only those blocks have experts")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(layers_to_transform=[1])
    assert all("layers.1." in name for name in lora_layers(model))
    assert len(lora_layers(model)) == 3
    _round_trip(kind, model, folder)


@AREA.works('`target_modules="all-linear"` or a pattern', "as PEFT finds them")
def _(kind: Kind, folder: Path) -> None:
    assert len(lora_layers(kind.model(target_modules="all-linear"))) == 14
    model = kind.model(target_modules=r".*layers\.0\..*_proj")
    assert len(lora_layers(model)) == 7
    _round_trip(kind, model, folder)


@AREA.works("`target_modules` with an embedding", "routed by token id, or weighted")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(target_modules=["embed_tokens"])
    assert not torch.equal(kind.logits(model), tiny_llama()(token_ids()).logits)
    _round_trip(kind, model, folder)


@AREA.works("`lora_dropout`", "in training only")
def _(kind: Kind, _folder: Path) -> None:
    fields = {} if kind is EXPLICIT else {"expert_capacity_factor": None}
    model, plain = kind.model(lora_dropout=0.5, **fields), kind.model(**fields)
    plain.load_state_dict(model.state_dict())
    assert_equal(kind.logits(model), kind.logits(plain))
    assert not torch.equal(kind.logits(model.train()), kind.logits(plain))


@AREA.works('`bias="lora_only"`', "biases of adapted layers are trained and saved")
def _(kind: Kind, folder: Path) -> None:
    base = tiny_llama(attention_bias=True)
    model = get_peft_model(base, kind.config(bias="lora_only", target_modules=["q_proj"])).eval()
    perturb(model)
    assert sum(name.endswith("base_layer.bias") for name in trainable(model)) == 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.fill_(0.5)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), folder).eval()
    assert_equal(kind.logits(loaded, experts=1), kind.logits(model, experts=1))


@AREA.works(
    "`autocast_adapter_dtype`",
    "True keeps experts and routers float32 over a bfloat16 base, False takes its dtype",
)
def _(kind: Kind, _folder: Path) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = tiny_llama(dtype=torch.bfloat16)
        model = get_peft_model(base, kind.config(), autocast_adapter_dtype=autocast).eval()
        own = {p.dtype for name, p in model.named_parameters() if ".lora_" in name}
        assert own == {dtype}
        logits = kind.logits(model, experts=1)
        assert logits.dtype == torch.bfloat16
        assert_equal(logits, tiny_llama(dtype=torch.bfloat16)(token_ids()).logits)


@AREA.works("`ephemeral_gpu_offload`", "changes nothing where there is nothing to offload")
def _(kind: Kind, _folder: Path) -> None:
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    model, plain = kind.model(runtime_config=runtime), kind.model()
    assert all(layer.ephemeral_gpu_offload for layer in lora_layers(model).values())
    assert_equal(kind.logits(model), kind.logits(plain))


@AREA.works('`init_lora_weights="gaussian"`', "each expert as a single adapter would be drawn")
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama(hidden_size=512, num_attention_heads=2)
    config = kind.config(init_lora_weights="gaussian", r=4, target_modules=["q_proj"])
    layer = _layer(get_peft_model(base, config), "q_proj")
    assert abs(layer.lora_A["default"].weight.std().item() - 1 / 4) < 0.02
    assert not layer.lora_B["default"].weight.any()


def _refused_config(kind: Kind, **fields: Any) -> Refusal:
    return Refusal(lambda: kind.config(**fields))


@AREA.refuses(
    "`init_lora_weights` from the base's weights (PiSSA, OLoRA)",
    "init_lora_weights must be one of True, False, 'gaussian' in a mixture, got 'pissa': "
    "data-driven initialisations assume one update that is always on.",
    error=ConfigError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return _refused_config(kind, init_lora_weights="pissa")


@AREA.works(
    "`init_lora_weights` from the base's weights (PiSSA, OLoRA)",
    "weight 1 gives the base, as without weights",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama(dtype=torch.float32)
    expected = base(token_ids()).logits
    model = get_peft_model(base, kind.config(init_lora_weights="olora")).eval()
    found = model(token_ids(), routing_weights=torch.ones(1)).logits
    assert_close(found.double(), expected.double(), dtype=torch.float16)


@AREA.refuses(
    "`use_dora`",
    "use_dora is not supported in a mixture of num_experts=3 experts, got True.",
    error=ConfigError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return _refused_config(kind, use_dora=True)


@AREA.works(
    "`use_dora`",
    "the weight multiplies what the variant adds to the base",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = get_peft_model(tiny_llama(), kind.config(use_dora=True)).eval()
    perturb(model)
    expected = model(token_ids()).logits
    one = torch.ones(1, dtype=torch.float64)
    assert_close(model(token_ids(), routing_weights=one).logits, expected, dtype=torch.float32)
    zero = model(token_ids(), routing_weights=0 * one).logits
    assert_equal(zero, tiny_llama()(token_ids()).logits)


@AREA.refuses(
    "`lora_bias`",
    "lora_bias is not supported in a mixture of num_experts=3 experts, got True.",
    error=ConfigError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return _refused_config(kind, lora_bias=True)


@AREA.works("`lora_bias`", "weighted with its expert", kinds=(EXPLICIT,))
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model(lora_bias=True)
    zeros = torch.zeros(2, dtype=torch.float64)
    found = model(token_ids(), routing_weights=zeros).logits
    assert_close(found, tiny_llama()(token_ids()).logits, dtype=torch.float32)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = model(token_ids(), routing_weights=one).logits
    model.set_adapter("default")
    assert_close(found, model(token_ids()).logits, dtype=torch.float32)


@AREA.refuses(
    "`target_parameters`",
    "target_parameters is not supported in a mixture of num_experts=3 experts, got ",
    error=ConfigError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return _refused_config(kind, target_parameters=["mlp.down_proj.weight"])


@AREA.refuses(
    "`target_parameters`",
    "Layer 'model.layers.0.mlp.down_proj' (lora.ParamWrapper) cannot be routed: it adapts a whole "
    "parameter, for which weights per token or sample have no meaning.",
    error=UnsupportedLayerError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    fields = {"target_modules": ["v_proj"], "target_parameters": ["mlp.down_proj.weight"]}
    model = get_peft_model(tiny_llama(), kind.config(**fields)).eval()
    perturb(model)
    return Refusal(lambda: kind.logits(model, experts=1), model)


@AREA.refuses(
    "a target that cannot be routed (`nn.MultiheadAttention`)",
    "A mixture cannot adapt 'attention': nn.MultiheadAttention uses its whole weight at once, so "
    "its tokens cannot be routed.",
    error=UnsupportedLayerError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    base = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
    config = kind.config(target_modules=["attention"], task_type=None)
    return Refusal(lambda: get_peft_model(base, config))


@AREA.works(
    "a target that cannot be routed (`nn.MultiheadAttention`)",
    "constant weights `[E]`",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.attention(x, x, x)[0]
            return output

    base = Attending().double().eval()
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    expected = base(x)
    model = get_peft_model(base, kind.config(target_modules=["attention"], task_type=None)).eval()
    perturb(model)
    one = torch.ones(1, dtype=torch.float64)
    assert_close(model(x, routing_weights=one), model(x))
    assert_close(model(x, routing_weights=0 * one), expected)
