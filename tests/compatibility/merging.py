"""Merging adapters into the base, combining and converting them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model

from moelora import MergeError, RoutingWeightsError
from tests.compatibility.registry import (
    EXPLICIT,
    MIXTURE,
    Area,
    Kind,
    Refusal,
    both,
    of_tuner,
)
from tests.lm import lora_layers, tiny_llama, token_ids
from tests.tolerances import assert_close, assert_equal

AREA = Area("Merging and converting")
FIXED = {"router_type": "fixed", "fixed_routing_weights": [0.5, -1.0, 2.0]}
_NO_MERGED = (
    "Adapter(s) ['default'] cannot be merged: a routed mixture has no single merged weight, its "
    "update depends on the token."
)


@AREA.refuses(
    "`merge_adapter`, `unmerge_adapter`",
    _NO_MERGED,
    error=MergeError,
    covers=of_tuner("merge_adapter", "unmerge_adapter"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: model.merge_adapter(), model)


@AREA.works(
    "`merge_adapter`, `unmerge_adapter`",
    "PEFT's own; unmerging brings the weights back",
    covers=of_tuner("merge_adapter", "unmerge_adapter"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before, summed = kind.logits(model), model(token_ids()).logits
    model.merge_adapter()
    assert_close(model(token_ids()).logits, summed, dtype=torch.float32)
    model.unmerge_adapter()
    assert_close(kind.logits(model), before, dtype=torch.float32)


@AREA.refuses(
    "a call while adapters are merged",
    "routing_weights cannot be applied while adapters ['default', 'second'] are merged.",
    error=RoutingWeightsError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    model.merge_adapter()
    return Refusal(lambda: kind.logits(model), model)


@AREA.works(
    "a call while adapters are merged",
    "a mixture of fixed routing, whose weights are in the base",
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model(**FIXED)
    before = kind.logits(model)
    model.merge_adapter()
    assert_close(kind.logits(model), before, dtype=torch.float32)
    model.unmerge_adapter()
    assert_close(kind.logits(model), before, dtype=torch.float32)


@AREA.refuses(
    "`merge_and_unload`",
    _NO_MERGED,
    error=MergeError,
    covers=of_tuner("merge_and_unload"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: model.merge_and_unload(), model)


@AREA.works(
    "`merge_and_unload`",
    "PEFT's own: the sum of the active adapters",
    covers=of_tuner("merge_and_unload"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    summed = model(token_ids(), routing_weights=torch.ones(2)).logits
    merged = model.merge_and_unload()
    assert not lora_layers(merged)
    assert_close(merged(token_ids()).logits, summed, dtype=torch.float32)


@AREA.works(
    "`merge_and_unload` of constant weights",
    "fixed routing merges its weighted sum",
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model(**FIXED)
    expected = kind.logits(model)
    assert_close(model.merge_and_unload()(token_ids()).logits, expected, dtype=torch.float32)


@AREA.works(
    "`merge_and_unload` of constant weights",
    "by `add_weighted_adapter` with the same weights, then merged",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = model(token_ids(), routing_weights=weights).logits
    model.add_weighted_adapter(["default", "second"], weights.tolist(), "sum", "cat")
    model.set_adapter("sum")
    assert_close(model.merge_and_unload()(token_ids()).logits, expected, dtype=torch.float32)


@AREA.works(
    "`unload`",
    "the original model, its hooks gone too",
    covers=of_tuner("unload"),
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    model = kind.model(base)
    kind.logits(model)
    unloaded = model.unload()
    assert unloaded is base
    hooks = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()
    assert_equal(base(token_ids()).logits, tiny_llama()(token_ids()).logits)


@AREA.refuses(
    "`add_weighted_adapter`",
    "Adapter(s) ['default'] are mixtures of experts and cannot be combined by "
    "add_weighted_adapter: activate them together instead, set_adapter([...]).",
    error=MergeError,
    covers=of_tuner("add_weighted_adapter"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: model.add_weighted_adapter(["default"], [0.5], "half"), model)


@AREA.works(
    "`add_weighted_adapter`",
    "PEFT's own; concatenated it equals the same constant weights",
    covers=of_tuner("add_weighted_adapter"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = model(token_ids(), routing_weights=weights).logits
    model.add_weighted_adapter(["default", "second"], weights.tolist(), "sum", "cat")
    model.set_adapter("sum")
    assert_close(model(token_ids()).logits, expected, dtype=torch.float32)
    ones = torch.ones(1, dtype=torch.float64)
    assert_close(model(token_ids(), routing_weights=ones).logits, expected, dtype=torch.float32)


@AREA.refuses(
    "`convert_to_lora`",
    "Adapter(s) ['default'] cannot be merged: a routed mixture has no single merged weight, its "
    "update depends on the token.",
    error=MergeError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: convert_to_lora(model, rank=4), model)


@AREA.works("`convert_to_lora`", "PEFT's own, one plain adapter at a time", kinds=(EXPLICIT,))
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    model.set_adapter("default")
    config, state = convert_to_lora(model, rank=2)
    assert config.r == 2
    converted = get_peft_model(tiny_llama(), config).eval()
    own = {key.replace("lora_A.", "lora_A.default."): value for key, value in state.items()}
    own = {key.replace("lora_B.", "lora_B.default."): value for key, value in own.items()}
    missing, unexpected = converted.load_state_dict(own, strict=False)
    assert not unexpected
    assert not [key for key in missing if ".lora_" in key]
    # PEFT's singular values are float32's
    found = converted(token_ids()).logits
    assert_close(found, model(token_ids()).logits, dtype=torch.float16)


@AREA.works(
    "`supports_lora_conversion`",
    "True: a plain adapter can be converted",
    covers=both("supports_lora_conversion"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    assert model.supports_lora_conversion()
    assert model.base_model.supports_lora_conversion()


@AREA.works(
    "`supports_lora_conversion`",
    "False: no single LoRA equals routed experts",
    covers=both("supports_lora_conversion"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    assert not model.supports_lora_conversion()
    assert not model.base_model.supports_lora_conversion()


def _converted(model: PeftModel, folder: Path) -> Path:
    """Save ``model`` as the difference to what it was when it was saved to ``folder/initial``."""
    initial = folder / "initial"
    model.save_pretrained(
        folder / "converted", path_initial_model_for_weight_conversion=str(initial)
    )
    return folder / "converted"


@AREA.works(
    "`subtract_mutated_init`, `save_pretrained(path_initial_model_for_weight_conversion=)`",
    "PEFT's own, for PiSSA and OLoRA adapters",
    covers=of_tuner("subtract_mutated_init"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    base = tiny_llama(dtype=torch.float32)
    model = get_peft_model(base, kind.config(init_lora_weights="olora")).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial")
    model.peft_config["default"].init_lora_weights = "olora"
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.add_(0.1)
    expected = model(token_ids()).logits
    plain = tiny_llama(dtype=torch.float32)
    converted = PeftModel.from_pretrained(plain, _converted(model, folder)).eval()
    one = torch.ones(1)
    found = converted(token_ids(), routing_weights=one).logits
    assert_close(found, expected, dtype=torch.float16)


@AREA.refuses(
    "`subtract_mutated_init`, `save_pretrained(path_initial_model_for_weight_conversion=)`",
    "Adapter 'default' is a mixture of experts, whose update cannot be converted by subtracting "
    "its initial values.",
    error=MergeError,
    covers=of_tuner("subtract_mutated_init"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    model = kind.model()
    model.save_pretrained(folder / "initial")

    def call() -> None:
        with pytest.raises(MergeError, match="by subtracting its initial"):
            model.base_model.subtract_mutated_init({}, "default", {})
        _converted(model, folder)

    return Refusal(call, model)
