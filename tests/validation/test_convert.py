"""A converted checkpoint is the old one, in moelora's files, loadable by moelora's own calls."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moelora import ExpertManager
from moelora.errors import CheckpointError, SkillError
from moelora.gate_router import GateRouter
from moelora.skill_library import SkillLibrary
from moelora.validation.convert import Conversion, convert_checkpoint
from tests.validation.old_checkpoints import LAYOUTS, OldGate, old_gate, old_model, save_old
from tests.validation.tiny import VOCABULARY, tiny_base, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = ["expert_0", "expert_1", "expert_2"]


@pytest.fixture(scope="module")
def model() -> Any:
    return old_model()


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(1, VOCABULARY, (2, 9))


def load(folder: Path, base: Any = None) -> PeftModel:
    loaded = PeftModel.from_pretrained(
        tiny_base() if base is None else base, folder / NAMES[0], adapter_name=NAMES[0]
    )
    for name in NAMES[1:]:
        if (folder / name).is_dir():
            loaded.load_adapter(folder / name, adapter_name=name)
    return loaded.eval()


def two_passes(model: PeftModel, gate: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Upstream's later forward: all experts summed, the router, and a pass with its weights."""
    model.base_model.set_adapter(list(model.peft_config))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
        return model(tokens, routing_weights=gate(hidden)).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_new_files_compute_what_the_old_ones_did(
    layout: str, model: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    gate = old_gate()
    old = save_old(tmp_path / "old", model, layout=layout, router="pt", gate=gate)
    conversion = convert_checkpoint(old, tmp_path / "new")
    assert (conversion.experts, conversion.router, conversion.skills) == (NAMES, "converted", 3)
    loaded = load(tmp_path / "new")
    assert isinstance(loaded.router, GateRouter)
    expected = two_passes(model, gate, tokens)
    torch.testing.assert_close(two_passes(loaded, loaded.router, tokens), expected)


def test_an_immature_expert_stays_immature(
    model: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    gate: OldGate = old_gate(temperature=0.5)
    gate.expert_maturity[2] = 0
    convert_checkpoint(save_old(tmp_path / "old", model, router="pt", gate=gate), tmp_path / "new")
    loaded = load(tmp_path / "new")
    assert loaded.router.mature.tolist() == [True, True, False]
    torch.testing.assert_close(
        two_passes(loaded, loaded.router, tokens), two_passes(model, gate, tokens)
    )


def test_the_folder_holds_adapters_router_skills_and_where_they_came_from(
    model: Any, tmp_path: Path
) -> None:
    old = save_old(tmp_path / "old", model)
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    conversion = convert_checkpoint(old, tmp_path / "new", base_model="some/base")
    new = tmp_path / "new"
    assert sorted(path.name for path in new.iterdir()) == [
        "conversion.json",
        *NAMES,
        "router.safetensors",
        "skill_library.safetensors",
    ]
    library = SkillLibrary.load(new)
    assert library.names == NAMES
    assert library.metadata("expert_1") == {"expert": "expert_1"}
    embedding = torch.load(old / "skill_library.pt", weights_only=True)[1]
    torch.testing.assert_close(library.embedding("expert_1"), embedding / embedding.norm())
    content = json.loads((new / "conversion.json").read_text())
    source = "peft_adapters/expert_0/expert_0/adapter_model.safetensors"
    digest = hashlib.sha256((old / source).read_bytes()).hexdigest()
    assert content["experts"]["expert_0"] == {"file": source, "sha256": digest}
    assert content["base_model"] == conversion.base_model == "some/base"
    config = json.loads((new / "expert_2" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == (
        "LORA",
        8,
        "some/base",
    )
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file()} == before


def test_no_router_is_no_random_router(model: Any, tmp_path: Path) -> None:
    old = save_old(tmp_path / "old", model, router=None, skills=None)
    conversion = convert_checkpoint(old, tmp_path / "new")
    assert (conversion.router, conversion.skills) == ("none", None)
    assert not (tmp_path / "new" / "router.safetensors").exists()
    assert load(tmp_path / "new").router is None


def test_a_router_that_cannot_be_expressed_is_kept_and_told_of(model: Any, tmp_path: Path) -> None:
    old = save_old(tmp_path / "old", model, router=None)
    state = {"gate.0.weight": torch.ones(8, 32), "gate.2.weight": torch.ones(3, 8)}
    torch.save(state, old / "router.pt")
    conversion = convert_checkpoint(old, tmp_path / "new")
    assert conversion.router == "kept"
    assert any("is more than a linear gate" in note for note in conversion.notes)
    kept = load_file(tmp_path / "new" / "router_original.safetensors")
    assert all(torch.equal(kept[key], state[key]) for key in state)
    assert load(tmp_path / "new").router is None


def test_a_trained_output_layer_is_written_beside_the_adapters(
    tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = old_model(2)
    head = model.get_base_model().lm_head
    torch.manual_seed(8)
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    conversion = convert_checkpoint(save_old(tmp_path / "old", model, layout="pt"), tmp_path / "n")
    assert any("The output layer was trained with the experts" in n for n in conversion.notes)
    base = tiny_base()
    base.load_state_dict(load_file(tmp_path / "n" / "lm_head.safetensors"), strict=False)
    loaded = load(tmp_path / "n", base)
    gate = old_gate(2)
    torch.testing.assert_close(two_passes(loaded, gate, tokens), two_passes(model, gate, tokens))


def test_a_conv1d_model_is_converted_too(tokens: torch.Tensor, tmp_path: Path) -> None:
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    model, gate = old_model(2, base=tiny_gpt2(), **fields), old_gate(2)
    convert_checkpoint(save_old(tmp_path / "old", model), tmp_path / "new")
    loaded = load(tmp_path / "new", tiny_gpt2())
    torch.testing.assert_close(two_passes(loaded, gate, tokens), two_passes(model, gate, tokens))


def test_a_folder_in_the_way_is_refused_and_left_alone(model: Any, tmp_path: Path) -> None:
    old = save_old(tmp_path / "old", model)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for out in (full, full / "mine.txt", old, tmp_path):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert_checkpoint(old, out)
    assert (full / "mine.txt").read_text() == "mine"


def test_an_interruption_leaves_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moelora.validation.convert._write_metadata", stop)
    old = save_old(tmp_path / "old", model)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(old, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_conversion_tells_what_it_did(model: Any, tmp_path: Path) -> None:
    conversion = convert_checkpoint(save_old(tmp_path / "old", model), tmp_path / "new")
    assert isinstance(conversion, Conversion)
    assert any("all experts were active and summed" in note for note in conversion.notes)
    assert any("all are taken as mature" in note for note in conversion.notes)


def test_a_skill_without_direction_is_refused(model: Any, tmp_path: Path) -> None:
    old = save_old(tmp_path / "old", model)
    torch.save({0: torch.zeros(32)}, old / "skill_library.pt")
    with pytest.raises(SkillError, match="An embedding"):
        convert_checkpoint(old, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_expert_manager_takes_the_new_folder_over(
    model: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    gate = old_gate()
    old = save_old(tmp_path / "old", model, router="pt", gate=gate)
    convert_checkpoint(old, tmp_path / "new")
    manager = ExpertManager.load(tiny_base(), tmp_path / "new")
    assert manager.get_all_adapter_names() == NAMES
    loaded = manager.model.eval()
    torch.testing.assert_close(
        two_passes(loaded, loaded.router, tokens), two_passes(model, gate, tokens)
    )
