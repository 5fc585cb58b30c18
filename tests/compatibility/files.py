"""Saving, loading, exchanging weights, the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from moelora import CheckpointError, UnsupportedLayerError
from tests.compatibility.registry import (
    EXPLICIT,
    MIXTURE,
    Area,
    Kind,
    Refusal,
    of_model,
)
from tests.lm import lora_config, tiny_llama, token_ids
from tests.tolerances import assert_close, assert_equal

AREA = Area("Files and weights")


def reload(kind: Kind, folder: Path, **arguments: Any) -> PeftModel:
    """A new base with what was saved by :meth:`Kind.model`."""
    model = PeftModel.from_pretrained(tiny_llama(), folder, **arguments)
    if kind is EXPLICIT:
        model.load_adapter(folder / "second", "second", **arguments)
        model.base_model.set_adapter(kind.adapters)
    return model.eval()


@AREA.works(
    "`save_pretrained`, `from_pretrained`, `load_adapter`",
    "equal logits to the bit",
    covers=of_model("save_pretrained", "from_pretrained", "load_adapter"),
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.save_pretrained(folder)
    assert_equal(kind.logits(reload(kind, folder)), kind.logits(model))


@AREA.works(
    "another name when loading",
    "the same adapter under that name",
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.set_adapter("default")
    model.save_pretrained(folder)
    renamed = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="renamed")
    assert_equal(kind.logits(renamed, experts=1), kind.logits(model, experts=1))


@AREA.works("`from_pretrained(low_cpu_mem_usage=True)`", "equal logits, nothing left empty")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.save_pretrained(folder)
    loaded = reload(kind, folder, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert_equal(kind.logits(loaded), kind.logits(model))


@AREA.works("`AutoPeftModelForCausalLM`", "finds base and adapter")
def _(kind: Kind, folder: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = kind.model(base)
    model.set_adapter("default")
    model.save_pretrained(folder / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=base.dtype)
    assert_equal(kind.logits(loaded.eval(), experts=1), kind.logits(model, experts=1))


@AREA.works(
    "`get_peft_model_state_dict`, `set_peft_model_state_dict`",
    "all tensors of an adapter, routers included, without its name",
)
def _(kind: Kind, _folder: Path) -> None:
    model, other = kind.model(), kind.model(seed=5)
    expected = kind.logits(model)
    for name in kind.adapters:
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert not any(f".{name}." in key for key in state)
        assert any(".lora_router." in key for key in state) is (kind is MIXTURE)
        result = set_peft_model_state_dict(other, state, adapter_name=name)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if f".{name}." in key]
    assert_equal(kind.logits(other), expected)


@AREA.works("`hotswap_adapter`", "gives the other adapter's logits to the bit, router included")
def _(kind: Kind, folder: Path) -> None:
    model = kind.model(seed=5)
    other = kind.model(seed=6, lora_alpha=7)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    if kind is EXPLICIT:
        hotswap_adapter(model, folder / "second", "second", torch_device="cpu")
    assert_equal(kind.logits(model), kind.logits(other))


def _refused_hotswap(kind: Kind, folder: Path, **fields: Any) -> Refusal:
    model = kind.model(seed=5)
    kind.model(seed=6, **fields).save_pretrained(folder)
    return Refusal(lambda: hotswap_adapter(model, folder, "default", torch_device="cpu"), model)


@AREA.refuses(
    "`hotswap_adapter`, another number of experts",
    "Configs are incompatible: for num_experts, 3 != 2",
    error=ValueError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    return _refused_hotswap(kind, folder, num_experts=2)


@AREA.refuses(
    "`hotswap_adapter`, another number of experts",
    "Configs are incompatible: for num_experts, ",
    error=ValueError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    MIXTURE.model().save_pretrained(folder)
    model = kind.model()
    return Refusal(lambda: hotswap_adapter(model, folder, "default", torch_device="cpu"), model)


@AREA.refuses(
    "`hotswap_adapter`, other routing",
    "Configs are incompatible: for top_k_experts, 2 != 1",
    error=ValueError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    return _refused_hotswap(kind, folder, top_k_experts=1)


@AREA.works(
    "`hotswap_adapter`, other routing",
    "no question: the weights are given",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    other = kind.model(seed=6)
    other.save_pretrained(folder)
    model = kind.model(seed=5)
    model.set_adapter("default")
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    weights = torch.tensor([-0.5], dtype=torch.float64)
    other.set_adapter("default")
    expected = other(token_ids(), routing_weights=weights).logits
    assert_equal(model(token_ids(), routing_weights=weights).logits, expected)


@AREA.refuses(
    "`hotswap_adapter`, another rank",
    "Tensor 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight' has shape "
    "(3, 16) in the checkpoint, but the config asks for (6, 16).",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    return _refused_hotswap(kind, folder, r=1)


@AREA.works(
    "`hotswap_adapter`, another rank", "PEFT's own: the smaller is padded", kinds=(EXPLICIT,)
)
def _(kind: Kind, folder: Path) -> None:
    model, other = kind.model(seed=5), kind.model(seed=6, r=1)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    model.set_adapter("default")
    other.set_adapter("default")
    found = kind.logits(model, experts=1)
    assert_close(found, kind.logits(other, experts=1), dtype=torch.float32)


@AREA.refuses(
    "`hotswap_adapter`, tensors missing",
    "The checkpoint of mixture 'default' lacks 6 router tensors, e.g. ",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> Refusal:
    refusal = _refused_hotswap(kind, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if ".lora_router." not in k}, path)
    (folder / "router.safetensors").unlink()
    return refusal


@AREA.works(
    "`hotswap_adapter`, tensors missing",
    "PEFT's own: a layer without tensors is swapped to zero",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    kind.model(seed=6, target_modules=["q_proj"]).save_pretrained(folder)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    zeros = [p for n, p in model.named_parameters() if ".v_proj.lora_A.default" in n]
    assert zeros
    assert not any(bool(parameter.any()) for parameter in zeros)


@AREA.refuses(
    "`prepare_model_for_compiled_hotswap(target_rank=)`",
    "Adapter(s) ['default'] are mixtures of experts and cannot be padded to another rank.",
    error=UnsupportedLayerError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: prepare_model_for_compiled_hotswap(model, target_rank=12), model)


@AREA.works(
    "`prepare_model_for_compiled_hotswap(target_rank=)`",
    "PEFT's own: padded ranks change nothing",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    assert_close(kind.logits(model), before, dtype=torch.float32)


@AREA.works(
    "`prepare_model_for_compiled_hotswap`",
    "scalings as tensors change nothing; then a swap is exact",
)
def _(kind: Kind, folder: Path) -> None:
    model, other = kind.model(seed=5), kind.model(seed=6)
    before = kind.logits(model)
    prepare_model_for_compiled_hotswap(model)
    assert_close(kind.logits(model), before, dtype=torch.float32)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    if kind is EXPLICIT:
        hotswap_adapter(model, folder / "second", "second", torch_device="cpu")
    assert_close(kind.logits(model), kind.logits(other), dtype=torch.float32)


@AREA.refuses(
    "`set_peft_model_state_dict` of another shape",
    "Tensor 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight' has shape "
    "(3, 16) in the checkpoint, but the config asks for (6, 16).",
    error=CheckpointError,
    kinds=(MIXTURE,),
)
@AREA.refuses(
    "`set_peft_model_state_dict` of another shape",
    "Error(s) in loading state_dict for PeftModelForCausalLM:",
    error=RuntimeError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    state = get_peft_model_state_dict(model)
    state = {key: value[:3] if "lora_A" in key else value for key, value in state.items()}
    if kind is EXPLICIT:
        state = {key: value[:1] if "lora_A" in key else value for key, value in state.items()}
    return Refusal(lambda: set_peft_model_state_dict(model, state), model)


@AREA.works(
    "`push_to_hub`",
    "uploads the files that `save_pretrained` writes",
    covers=of_model("push_to_hub"),
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()

    def upload(_model: Any, working_dir: str, *_: Any, **__: Any) -> str:
        shutil.copytree(working_dir, folder / "hub")
        return "commit"

    with (
        mock.patch("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload),
        mock.patch("transformers.utils.hub.hf_api") as api,
    ):
        api.return_value.create_repo.return_value.repo_id = "someone/mixture"
        model.push_to_hub("someone/mixture")
    assert_equal(kind.logits(reload(kind, folder / "hub")), kind.logits(model))
    assert (folder / "hub" / "router.safetensors").exists() is (kind is MIXTURE)


@AREA.works(
    "`create_or_update_model_card`",
    "PEFT's own; `save_pretrained` adds moelora, how to load, experts and router, once",
    covers=of_model("create_or_update_model_card"),
    kinds=(MIXTURE,),
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.create_or_update_model_card(folder / "alone")
    assert "library_name: peft" in (folder / "alone" / "README.md").read_text()
    for _ in range(2):
        model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    for words in ("import moelora", "3 LoRA experts of rank 2", "learned, in every layer, top 2"):
        assert card.count(words) == 1, words
    front = card.split("---")[1]
    assert "library_name: peft" in front
    assert front.count("moelora") == 1


@AREA.works(
    "`create_or_update_model_card`",
    "PEFT's own card",
    covers=of_model("create_or_update_model_card"),
    kinds=(EXPLICIT,),
)
def _(kind: Kind, folder: Path) -> None:
    model = kind.model()
    model.create_or_update_model_card(folder)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "moelora" not in card


@AREA.works("`load_adapter` of a plain LoRA", "one more adapter; the others unchanged")
def _(kind: Kind, folder: Path) -> None:
    plain = get_peft_model(tiny_llama(), lora_config(r=1), adapter_name="default")
    plain.save_pretrained(folder)
    model = kind.model()
    before = kind.logits(model)
    model.load_adapter(folder, "plain")
    assert_equal(kind.logits(model.eval()), before)
    model.set_adapter("plain")
    assert_equal(model(token_ids()).logits, plain.eval()(token_ids()).logits)
