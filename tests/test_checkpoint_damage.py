"""Files of a mixture that are missing, damaged or edited: refused, with the model untouched."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora import CheckpointError
from tests.lm import (
    assert_same_snapshot,
    lora_config,
    mixture,
    perturb,
    snapshot,
    tiny_llama,
    token_ids,
    trainable,
)
from tests.tolerances import assert_equal

CONFIG, ADAPTER, ROUTER = "adapter_config.json", "adapter_model.safetensors", "router.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved mixture."""
    mixture().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# Damage ----------------------------------------------------------------------------------------


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def edit_header(path: Path, **values: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **values}
    save_file(load_file(path), path, metadata=metadata)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop(kind: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if f".{kind}." in key]:
            del tensors[key]

    return change


def drop_first(kind: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(key for key in sorted(tensors) if f".{kind}." in key)]

    return change


def change_first(kind: str, new: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if f".{kind}." in key)
        tensors[key] = new(tensors[key]).contiguous()

    return change


def add_unknown(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(6, 16)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1.0]}))


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


ROUTER_DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda folder: truncate(folder / ROUTER),
    "zero_bytes": lambda folder: zero_bytes(folder / ROUTER),
    "garbage": lambda folder: garbage(folder / ROUTER),
    "a_pickle": lambda folder: as_pickle(folder / ROUTER),
    "a_directory": lambda folder: a_directory(folder / ROUTER),
    "wrong_digest": lambda folder: edit_header(folder / ROUTER, sha256="0" * 64),
    "newer_format": lambda folder: edit_header(folder / ROUTER, moelora_format="2"),
    "no_version": lambda folder: edit_header(folder / ROUTER, moelora_format="one"),
    "huge_version": lambda folder: edit_header(folder / ROUTER, moelora_format="9" * 5000),
    "odd_digit_version": lambda folder: edit_header(folder / ROUTER, moelora_format="²"),
    "one_value_changed": lambda folder: edit_tensors(
        folder / ROUTER, change_first("lora_router", lambda t: t + 1)
    ),
    "a_tensor_missing": lambda folder: edit_tensors(folder / ROUTER, drop_first("lora_router")),
    "foreign_safetensors": lambda folder: save_file({"a": torch.zeros(1)}, folder / ROUTER),
}
ADAPTER_DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda folder: truncate(folder / ADAPTER),
    "zero_bytes": lambda folder: zero_bytes(folder / ADAPTER),
    "garbage": lambda folder: garbage(folder / ADAPTER),
    "a_pickle": lambda folder: as_pickle(folder / ADAPTER),
    "missing": lambda folder: (folder / ADAPTER).unlink(),
    "no_router": lambda folder: edit_tensors(folder / ADAPTER, drop("lora_router")),
    "a_router_missing": lambda folder: edit_tensors(folder / ADAPTER, drop_first("lora_router")),
    "an_expert_missing": lambda folder: edit_tensors(folder / ADAPTER, drop_first("lora_A")),
    "unknown_layer": lambda folder: edit_tensors(folder / ADAPTER, add_unknown),
    "wrong_shape": lambda folder: edit_tensors(
        folder / ADAPTER, change_first("lora_B", lambda t: t[:, :-1])
    ),
    "wrong_router_shape": lambda folder: edit_tensors(
        folder / ADAPTER, change_first("lora_router", lambda t: t[:-1])
    ),
    "integers": lambda folder: edit_tensors(
        folder / ADAPTER, change_first("lora_A", lambda t: t.long())
    ),
    "nan": lambda folder: edit_tensors(
        folder / ADAPTER, change_first("lora_B", lambda t: torch.full_like(t, float("nan")))
    ),
    "nan_in_the_router": lambda folder: edit_tensors(
        folder / ADAPTER, change_first("lora_router", lambda t: torch.full_like(t, float("inf")))
    ),
}
# a clear error is one of ours, or PEFT's about a field that PEFT owns
CONFIG_EDITS: dict[str, dict[str, Any]] = {
    "more_experts": {"num_experts": 4},
    "fewer_experts": {"num_experts": 2},
    "one_expert": {"num_experts": 1},
    "no_experts": {"num_experts": 0},
    "huge_number_of_experts": {"num_experts": 10**12},
    "text_for_experts": {"num_experts": "three"},
    "fraction_of_experts": {"num_experts": 3.0},
    "no_number_of_experts": {"num_experts": None},
    "list_of_experts": {"num_experts": [3]},
    "flag_for_experts": {"num_experts": True},
    "unknown_router_type": {"router_type": "telepathic"},
    "list_for_router_type": {"router_type": ["learned"]},
    "no_router_type": {"router_type": None},
    "top_k_too_large": {"top_k_experts": 4},
    "huge_top_k": {"top_k_experts": 10**30},
    "top_k_zero": {"top_k_experts": 0},
    "text_for_top_k": {"top_k_experts": "2"},
    "newer_format": {"moelora_format": 2},
    "text_for_format": {"moelora_format": "1"},
    "no_format": {"moelora_format": None},
    "negative_temperature": {"router_temperature": -1.0},
    "infinite_temperature": {"router_temperature": float("inf")},
    "temperature_beyond_floats": {"router_temperature": 10**400},
    "text_for_temperature": {"router_temperature": "hot"},
    "nan_coefficient": {"router_aux_loss_coef": float("nan")},
    "capacity_of_zero": {"expert_capacity_factor": 0},
    "dropout_of_one": {"expert_dropout": 1.0},
    "unknown_loss": {"load_balance_loss_type": "entropy"},
    "unknown_scope": {"router_scope": "planet"},
    "scope_of_the_block": {"router_scope": "layer"},
    "scope_of_the_model": {"router_scope": "model"},
    "text_for_routing": {"use_moe_routing": "yes"},
    "hidden_size_of_text": {"router_hidden_size": "16"},
    "hidden_size_unlike_the_tensors": {"router_hidden_size": 5},
    "huge_hidden_size": {"router_hidden_size": 10**12},
    "other_rank": {"r": 3},
    "huge_rank": {"r": 10**12},
    "negative_rank": {"r": -1},
    "text_for_rank": {"r": "2"},
    "no_rank": {"r": None},
    "text_for_alpha": {"lora_alpha": "4"},
    "no_alpha": {"lora_alpha": None},
    "dora": {"use_dora": True},
    "fixed_weights_for_a_learned_router": {"fixed_routing_weights": [1.0, 1.0, 1.0]},
    "no_targets": {"target_modules": None},
    "number_for_targets": {"target_modules": 5},
    "unknown_targets": {"target_modules": ["no_such_module"]},
    "targets_that_cannot_be_adapted": {"target_modules": ["q_proj", "input_layernorm"]},
    "more_targets": {"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]},
    "fewer_targets": {"target_modules": ["q_proj"]},
}


def assert_refused(folder: Path, *, match: str | None, error: Any = CheckpointError) -> None:
    """Loading ``folder`` fails both ways, and leaves base and model as they were."""
    ids = token_ids()
    base = tiny_llama()
    before, logits = snapshot(base), base(ids).logits
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(base, folder)
    assert_same_snapshot(snapshot(base), before)
    assert_equal(base(ids).logits, logits)

    model = mixture(num_experts=2, target_modules=["q_proj", "up_proj"])
    model.add_adapter("beside", lora_config())
    before, logits = snapshot(model), model(ids).logits
    active = list(model.active_adapters)
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "loaded")
    assert_same_snapshot(snapshot(model), before)
    assert list(model.peft_config) == ["default", "beside"]
    assert list(model.active_adapters) == active
    assert_equal(model(ids).logits, logits)


@pytest.mark.parametrize("damage", ROUTER_DAMAGE)
def test_a_damaged_router_file_is_refused_by_its_name(damage: str, saved: Path) -> None:
    ROUTER_DAMAGE[damage](saved)
    assert_refused(saved, match=r"router\.safetensors")


@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_a_damaged_adapter_file_is_refused(damage: str, saved: Path) -> None:
    ADAPTER_DAMAGE[damage](saved)
    assert_refused(saved, match=None)


@pytest.mark.parametrize("damage", [name for name in ADAPTER_DAMAGE if "router" in name])
def test_a_damaged_adapter_file_is_refused_without_the_router_file_too(
    damage: str, saved: Path
) -> None:
    (saved / ROUTER).unlink()
    ADAPTER_DAMAGE[damage](saved)
    assert_refused(saved, match=None)


@pytest.mark.parametrize("written", ["layer", "model"])
def test_a_missing_shared_router_is_refused_everywhere(written: str, tmp_path: Path) -> None:
    mixture(router_scope=written).save_pretrained(tmp_path)
    (tmp_path / ROUTER).unlink()
    edit_tensors(tmp_path / ADAPTER, drop_first("lora_router"))
    assert_refused(tmp_path, match="router")
    with pytest.raises(CheckpointError, match="router"):
        tiny_llama().load_adapter(tmp_path)


def test_routers_that_differ_are_refused_with_both_names(saved: Path) -> None:
    edit_tensors(saved / ADAPTER, change_first("lora_router", lambda t: t * 2))
    assert_refused(saved, match=r"(?s)router\.safetensors.*adapter_model\.safetensors")


def test_a_router_file_beside_a_fixed_mixture_is_refused(saved: Path, tmp_path: Path) -> None:
    mixture(router_type="fixed").save_pretrained(tmp_path / "fixed")
    shutil.copy(saved / ROUTER, tmp_path / "fixed" / ROUTER)
    assert_refused(tmp_path / "fixed", match=r"router\.safetensors")


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_a_config_edited_by_hand_is_refused(edit: str, saved: Path) -> None:
    edit_config(saved, **CONFIG_EDITS[edit])
    assert_refused(saved, match=None, error=(ValueError, TypeError))


OWN_FIELDS = [
    name
    for name, values in CONFIG_EDITS.items()
    if not values.keys() & {"r", "lora_alpha", "target_modules"}
]


@pytest.mark.parametrize("edit", OWN_FIELDS)
def test_an_edited_field_of_ours_is_refused_with_the_files_name_or_the_tensors(
    edit: str, saved: Path
) -> None:
    edit_config(saved, **CONFIG_EDITS[edit])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json|Tensor|tensors"):
        PeftModel.from_pretrained(tiny_llama(), saved)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "MOELORA"', "\x00"])
def test_a_config_that_is_no_json_object_is_refused(content: str, saved: Path) -> None:
    (saved / CONFIG).write_text(content)
    assert_refused(saved, match=None, error=(ValueError, TypeError, KeyError))


@pytest.mark.parametrize("file", [ADAPTER, ROUTER])
def test_transformers_own_loading_refuses_a_missing_or_other_router(file: str, saved: Path) -> None:
    (saved / ROUTER).unlink()
    if file == ADAPTER:
        edit_tensors(saved / ADAPTER, drop("lora_router"))
    else:
        edit_tensors(saved / ADAPTER, drop_first("lora_router"))
    with pytest.raises((CheckpointError, RuntimeError), match="router"):
        tiny_llama().load_adapter(saved)


def test_transformers_own_loading_refuses_routers_that_differ(saved: Path) -> None:
    edit_tensors(saved / ADAPTER, change_first("lora_router", lambda t: t * 2))
    with pytest.raises(CheckpointError, match=r"router\.safetensors"):
        tiny_llama().load_adapter(saved)


def test_a_refused_reload_into_an_existing_adapter_leaves_it_alone(saved: Path) -> None:
    model = mixture()
    perturb(model, seed=9)
    before = snapshot(model)
    edit_tensors(saved / ADAPTER, drop_first("lora_router"))
    (saved / ROUTER).unlink()
    with pytest.raises(CheckpointError, match="no router tensors of layer"):
        model.load_adapter(saved, "default")
    assert_same_snapshot(snapshot(model), before)


def test_after_a_refused_load_the_right_folder_loads(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "broken")
    edit_tensors(tmp_path / "broken" / ADAPTER, drop_first("lora_A"))
    base = tiny_llama()
    with pytest.raises(CheckpointError, match="lacks"):
        PeftModel.from_pretrained(base, tmp_path / "broken")
    loaded = PeftModel.from_pretrained(base, saved)
    assert_equal(loaded(token_ids()).logits, mixture().eval()(token_ids()).logits)


def test_a_refused_load_into_a_training_model_leaves_it_training(saved: Path) -> None:
    edit_tensors(saved / ADAPTER, drop_first("lora_A"))
    model = mixture().train()
    with pytest.raises(CheckpointError, match="lacks"):
        model.load_adapter(saved, "other")
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
