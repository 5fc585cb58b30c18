"""Other ways into PEFT: injection, transformers' own methods, mixed models, other tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import (
    LoHaConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from moelora import CheckpointError, UnsupportedLayerError
from tests.compatibility.registry import (
    EXPLICIT,
    MIXTURE,
    Area,
    Kind,
    Refusal,
    of_tuner,
)
from tests.lm import lora_layers, perturb, tiny_llama, token_ids
from tests.tolerances import assert_equal

AREA = Area("Other ways in")


@AREA.works(
    "`inject_adapter_in_model`",
    "the injected base routes, or takes weights, as the whole model does",
    covers=of_tuner("inject_adapter"),
)
def _(kind: Kind, _folder: Path) -> None:
    expected = kind.model()
    base = inject_adapter_in_model(kind.config(), tiny_llama())
    if kind is EXPLICIT:
        base = inject_adapter_in_model(kind.config(), base, adapter_name="second")
        for layer in lora_layers(base).values():
            layer.set_adapter(kind.adapters)
    own = expected.get_base_model().state_dict()
    base.load_state_dict(own)
    assert_equal(kind.logits(base.eval()), kind.logits(expected))


@AREA.works(
    "`inject_adapter_in_model(state_dict=)`",
    "as the adapter that the tensors come from",
)
def _(kind: Kind, _folder: Path) -> None:
    expected = kind.model()
    expected.set_adapter("default")
    state = get_peft_model_state_dict(expected)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    base = inject_adapter_in_model(kind.config(), tiny_llama(), state_dict=state)
    assert not set_peft_model_state_dict(base, state).unexpected_keys
    assert_equal(kind.logits(base.eval(), experts=1), kind.logits(expected, experts=1))


@AREA.works(
    "transformers' `model.load_adapter(hotswap=True)`",
    "gives the other adapter's logits to the bit",
)
def _(kind: Kind, folder: Path) -> None:
    base, other = _base_to_swap(kind, folder)
    base.load_adapter(folder / "other", adapter_name="default", hotswap=True)
    assert_equal(kind.logits(base.eval(), experts=1), kind.logits(other, experts=1))


def _base_to_swap(kind: Kind, folder: Path, **fields: Any) -> tuple[Any, PeftModel]:
    """A base with one adapter loaded, and the model whose adapter is in ``folder / "other"``."""
    for name, model in (("one", kind.model(seed=5)), ("other", kind.model(seed=6, **fields))):
        model.set_adapter("default")
        model.save_pretrained(folder / name, selected_adapters=["default"])
    base = tiny_llama()
    base.load_adapter(folder / "one", adapter_name="default")
    return base.eval(), model


@AREA.refuses(
    "transformers' `model.load_adapter(hotswap=True)`, other routing",
    "Adapter 'default' cannot be hot-swapped: ",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    base, _ = _base_to_swap(kind, folder, top_k_experts=1)
    return Refusal(
        lambda: base.load_adapter(folder / "other", adapter_name="default", hotswap=True), base
    )


@AREA.works(
    "transformers' `model.load_adapter(hotswap=True)`, other routing",
    "no question: the weights are given",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    base, other = _base_to_swap(kind, folder)
    base.load_adapter(folder / "other", adapter_name="default", hotswap=True)
    weights = torch.tensor([-0.5], dtype=torch.float64)
    expected = other(token_ids(), routing_weights=weights).logits
    assert_equal(base(token_ids(), routing_weights=weights).logits, expected)


@AREA.refuses(
    "transformers' `model.load_adapter(hotswap=True)`, other scaling",
    "Adapter 'default' cannot be hot-swapped: ",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    base, _ = _base_to_swap(kind, folder, lora_alpha=7)
    return Refusal(
        lambda: base.load_adapter(folder / "other", adapter_name="default", hotswap=True), base
    )


@AREA.works(
    "transformers' `model.load_adapter(hotswap=True)`, other scaling",
    "transformers' own: it keeps the scaling that was there",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    base, _ = _base_to_swap(kind, folder, lora_alpha=7)
    base.load_adapter(folder / "other", adapter_name="default", hotswap=True)
    assert {layer.scaling["default"] for layer in lora_layers(base).values()} == {2.0}


@AREA.refuses(
    "transformers' `model.load_adapter(adapter_state_dict=)`, tensors missing",
    "The checkpoint of mixture 'default' lacks 6 router tensors, e.g. ",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    state = get_peft_model_state_dict(kind.model())
    state = {key: value for key, value in state.items() if ".lora_router." not in key}
    base = tiny_llama().eval()
    return Refusal(
        lambda: base.load_adapter(
            adapter_name="default", peft_config=kind.config(), adapter_state_dict=state
        ),
        base,
    )


@AREA.works(
    "transformers' `model.load_adapter(adapter_state_dict=)`, tensors missing",
    "transformers' own: a layer without tensors stays zero",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    state = get_peft_model_state_dict(kind.model())
    state = {key: value for key, value in state.items() if ".lora_B." not in key}
    base = tiny_llama().eval()
    base.load_adapter(adapter_name="default", peft_config=kind.config(), adapter_state_dict=state)
    assert_equal(kind.logits(base.eval(), experts=1), tiny_llama()(token_ids()).logits)


@AREA.works(
    "transformers' `model.load_adapter(adapter_state_dict=)`",
    "equal logits to the bit",
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    model.set_adapter("default")
    state = get_peft_model_state_dict(model)
    base = tiny_llama().eval()
    base.load_adapter(adapter_name="default", peft_config=kind.config(), adapter_state_dict=state)
    assert_equal(kind.logits(base.eval(), experts=1), kind.logits(model, experts=1))


@AREA.works(
    "transformers' `model.add_adapter`, `set_adapter`, `active_adapters`",
    "as through PEFT",
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    for name in kind.adapters:
        base.add_adapter(kind.config(), adapter_name=name)
    base.set_adapter(kind.adapters)
    assert base.active_adapters() == kind.adapters
    expected = kind.model()
    base.load_state_dict(expected.get_base_model().state_dict())
    assert_equal(kind.logits(base.eval()), kind.logits(expected))
    base.set_adapter("default")
    expected.set_adapter("default")
    assert_equal(kind.logits(base, experts=1), kind.logits(expected, experts=1))


@AREA.works("transformers' `model.load_adapter`", "equal logits to the bit")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.save_pretrained(folder)
    base = tiny_llama()
    base.load_adapter(folder, adapter_name="default")
    if kind is EXPLICIT:
        base.load_adapter(folder / "second", adapter_name="second")
        base.set_adapter(kind.adapters)
    assert_equal(kind.logits(base.eval()), kind.logits(model))


@AREA.works("transformers' `model.save_pretrained`", "writes the adapter, which PEFT loads")
def _(kind: Kind, folder: Path) -> None:
    base = tiny_llama()
    base.add_adapter(kind.config(), adapter_name="default")
    perturb(base)
    base.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    assert_equal(kind.logits(loaded, experts=1), kind.logits(base, experts=1))


@AREA.works(
    "transformers' `model.disable_adapters`, `enable_adapters`",
    "the base model's output, and back",
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    base.add_adapter(kind.config(), adapter_name="default")
    perturb(base)
    before = kind.logits(base.eval(), experts=1)
    base.disable_adapters()
    assert_equal(kind.logits(base, experts=1), tiny_llama()(token_ids()).logits)
    base.enable_adapters()
    assert_equal(kind.logits(base, experts=1), before)


@AREA.works(
    "transformers' `model.get_adapter_state_dict`, `delete_adapter`",
    "all tensors, routers included; nothing is left",
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    base.add_adapter(kind.config(), adapter_name="default")
    base.add_adapter(kind.config(), adapter_name="other")
    state = base.get_adapter_state_dict("other")
    per_layer = 3 if kind is MIXTURE else 2
    assert len(state) == per_layer * 6
    base.delete_adapter("other")
    assert not [key for key in base.state_dict() if ".other" in key]
    base.set_adapter("default")
    assert kind.logits(base.eval(), experts=1).isfinite().all()


@AREA.refuses(
    "`PeftMixedModel` (`mixed=True`)",
    "A mixture cannot be part of a PeftMixedModel (mixed=True).",
    error=UnsupportedLayerError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return Refusal(lambda: get_peft_model(tiny_llama(), kind.config(), mixed=True))


def _with_weights(model: torch.nn.Module) -> Refusal:
    weights = torch.ones(1, dtype=torch.float64)
    return Refusal(lambda: model(token_ids(), routing_weights=weights), model)


@AREA.refuses(
    "`PeftMixedModel` (`mixed=True`)",
    "routing_weights need LoRA adapters, but this model's tuner is MixedModel, which would ignore "
    "them.",
    error=UnsupportedLayerError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    return _with_weights(get_peft_model(tiny_llama(), kind.config(), mixed=True).eval())


@AREA.refuses(
    "other tuners (LoHa)",
    "routing_weights need LoRA adapters, but this model's tuner is LoHaModel, which would ignore "
    "them.",
    error=UnsupportedLayerError,
    kinds=(EXPLICIT,),
)
def _(_kind: Kind, _folder: Path) -> Refusal:
    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return _with_weights(get_peft_model(tiny_llama(), config).eval())


@AREA.refuses(
    "other tuners (LoHa)",
    "Cannot combine adapters with different peft types. Found PeftType.LORA and PeftType.LOHA.",
    error=ValueError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return Refusal(lambda: model.add_adapter("other", config), model)


def _prompt_config() -> Any:
    return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)


@AREA.refuses(
    "prompt learning",
    "routing_weights need LoRA adapters, but this model's tuner is ",
    error=UnsupportedLayerError,
    kinds=(EXPLICIT,),
)
def _(_kind: Kind, _folder: Path) -> Refusal:
    return _with_weights(get_peft_model(tiny_llama(), _prompt_config()).eval())


@AREA.refuses(
    "prompt learning",
    "Cannot combine adapters with different peft types. Found PeftType.LORA and "
    "PeftType.PROMPT_TUNING.",
    error=ValueError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: model.add_adapter("other", _prompt_config()), model)
