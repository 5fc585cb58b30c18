"""Every layout DyLoRA-MoE's own code saves is read, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from moelora.errors import CheckpointError
from moelora.validation.old_checkpoint import is_old_checkpoint, read_old_checkpoint
from tests.validation.old_checkpoints import LAYOUTS, old_gate, old_model, save_old
from tests.validation.tiny import tiny_base, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.fixture(scope="module")
def model() -> Any:
    return old_model()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_to_the_bit(layout: str, model: Any, tmp_path: Path) -> None:
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model, layout=layout))
    assert [expert.name for expert in checkpoint.experts] == ["expert_0", "expert_1", "expert_2"]
    for expert, rank in zip(checkpoint.experts, (4, 4, 8), strict=True):
        expected = get_peft_model_state_dict(model, adapter_name=expert.name)
        assert expert.tensors.keys() == expected.keys()
        assert all(torch.equal(expert.tensors[key], expected[key]) for key in expected)
        config = expert.lora_config()
        assert (config.r, config.lora_alpha) == (rank, 8)
        assert set(config.target_modules) == {"q_proj", "v_proj", "o_proj"}
    assert checkpoint.lm_head == {}


@pytest.mark.parametrize("layout", ["nested", "pt"])
@pytest.mark.parametrize("kind", ["safetensors", "state", "pt"])
def test_a_router_decides_as_it_did(layout: str, kind: str, model: Any, tmp_path: Path) -> None:
    gate = old_gate(top_k=2, temperature=0.7) if kind == "pt" else old_gate()
    folder = save_old(tmp_path / "old", model, layout=layout, router=kind, gate=gate)
    router = read_old_checkpoint(folder).router
    assert router is not None
    assert router.router is not None
    hidden = torch.randn(2, 5, 32)
    torch.testing.assert_close(router.router(hidden), gate(hidden))


def test_maturity_is_read_from_the_file_that_has_it(model: Any, tmp_path: Path) -> None:
    gate = old_gate(temperature=0.7)
    gate.expert_maturity[1] = 0
    folder = save_old(tmp_path / "old", model, router="pt", gate=gate)
    checkpoint = read_old_checkpoint(folder)
    assert checkpoint.router is not None
    assert checkpoint.router.router is not None
    hidden = torch.randn(2, 5, 32)
    torch.testing.assert_close(checkpoint.router.router(hidden), gate(hidden))
    assert checkpoint.notes == []


def test_a_router_file_without_maturity_is_told_of(model: Any, tmp_path: Path) -> None:
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model))
    assert checkpoint.notes == [
        "router.safetensors does not say which experts are mature; all are taken as mature."
    ]


def test_a_checkpoint_without_a_router_is_read_and_told_of(model: Any, tmp_path: Path) -> None:
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model, router=None))
    assert checkpoint.router is None
    assert checkpoint.notes == ["The checkpoint holds no router."]


def test_a_router_that_is_no_linear_gate_keeps_its_tensors(model: Any, tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", model, router=None)
    state = {"gate.0.weight": torch.ones(8, 32), "gate.2.weight": torch.ones(3, 8)}
    torch.save(state, folder / "router.pt")
    checkpoint = read_old_checkpoint(folder)
    assert checkpoint.router is not None
    assert checkpoint.router.router is None
    assert checkpoint.router.tensors.keys() == state.keys()
    assert (
        "is more than a linear gate (it holds gate.0.weight, gate.2.weight)"
        in (checkpoint.notes[0])
    )


@pytest.mark.parametrize("layout", ["nested", "pt"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_skills_keep_their_expert(layout: str, kind: str, model: Any, tmp_path: Path) -> None:
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model, layout=layout, skills=kind))
    assert checkpoint.skills is not None
    assert sorted(checkpoint.skills) == ["expert_0", "expert_1", "expert_2"]
    generator = torch.Generator().manual_seed(9)
    for index in range(3):
        expected = torch.randn(32, generator=generator)
        assert torch.equal(checkpoint.skills[f"expert_{index}"], expected)


def test_the_state_beside_the_folder_and_the_folder_above_are_found(
    model: Any, tmp_path: Path
) -> None:
    folder = save_old(tmp_path / "run" / "best_model", model, layout="pt", router="pt")
    (folder / "dylo_moe_state").rename(tmp_path / "run" / "dylo_moe_state")
    for place in (folder, tmp_path / "run"):
        assert is_old_checkpoint(place)
        checkpoint = read_old_checkpoint(place)
        assert checkpoint.router is not None
        assert checkpoint.skills is not None


def test_the_folder_of_save_lora_experts_alone_is_a_checkpoint(model: Any, tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", model, layout="pt") / "peft_adapters"
    (folder.parent / "config.json").unlink()
    assert is_old_checkpoint(folder)
    with pytest.raises(CheckpointError, match="does not say lora_alpha.*--lora-alpha"):
        read_old_checkpoint(folder)
    checkpoint = read_old_checkpoint(folder, lora_alpha=32.0)
    assert checkpoint.experts[0].lora_config().lora_alpha == 32


def test_expert_1_does_not_take_what_belongs_to_expert_10(tmp_path: Path) -> None:
    model = old_model(11, target_modules=["q_proj"])
    folder = save_old(tmp_path / "old", model, layout="pt", router=None)
    # upstream selects by substring: with all experts trainable, expert_1.pt holds expert_10 too
    model.base_model.set_adapter([f"expert_{i}" for i in range(11)])
    mixed = {k: p.data.clone() for k, p in model.named_parameters() if "expert_1" in k}
    torch.save(mixed, folder / "peft_adapters" / "expert_1.pt")
    expert = read_old_checkpoint(folder).experts[1]
    expected = get_peft_model_state_dict(model, adapter_name="expert_1")
    assert expert.tensors.keys() == expected.keys()
    assert all(torch.equal(expert.tensors[key], expected[key]) for key in expected)


def test_a_trained_output_layer_is_kept_apart(tmp_path: Path) -> None:
    model = old_model()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model, layout="pt"))
    assert checkpoint.lm_head.keys() == {"lm_head.weight"}
    assert torch.equal(checkpoint.lm_head["lm_head.weight"], tiny_base().lm_head.weight)


def test_conv1d_experts_are_read_too(tmp_path: Path) -> None:
    model = old_model(2, base=tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    checkpoint = read_old_checkpoint(save_old(tmp_path / "old", model, layout="pt"))
    assert checkpoint.experts[0].lora_config().target_modules == {"c_attn"}


def test_the_base_model_is_taken_from_where_it_is_told(model: Any, tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", model, config={"base_model_name_or_path": "some/base"})
    assert read_old_checkpoint(folder).base_model == "some/base"
    config = json.loads((folder / "config.json").read_text())
    del config["base_model_name_or_path"]
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "peft_adapters" / "expert_0" / "expert_0" / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "base_model_name_or_path": "other/base"}))
    assert read_old_checkpoint(folder).base_model == "other/base"


def test_other_folders_are_no_old_checkpoints(tmp_path: Path) -> None:
    assert not is_old_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_old_checkpoint(tmp_path)
    assert not is_old_checkpoint(tmp_path / "absent")
