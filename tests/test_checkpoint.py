"""A mixture on disk: saving and loading are the identity, or refused with the model untouched."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moelora import CheckpointError, MoELoraConfig, mark_mature
from tests.lm import (
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    run_python,
    tiny_llama,
    token_ids,
    trainable,
)
from tests.tolerances import assert_equal

CONFIG, ADAPTER, ROUTER = "adapter_config.json", "adapter_model.safetensors", "router.safetensors"
# parts of key names that PEFT filters by, beside an ordinary one.
SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])
NAMES = ["default", "0", "1", "weight", "layers", "lora", "lora_A", "model", "router", "moelora"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved mixture."""
    mixture().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def folder_of(root: Path, name: str) -> Path:
    """Where PEFT saves the adapter of this name."""
    return root if name == "default" else root / name


def adapter_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """All tensors of an adapter by layer and kind, without its name."""
    found: dict[str, Tensor] = {}
    for layer_name, layer in lora_layers(model).items():
        for kind in layer.adapter_layer_names:
            holder = getattr(layer, kind)
            if name not in holder:
                continue
            item = holder[name]
            parts = {"": item} if isinstance(item, Tensor) else item.state_dict()
            found.update({f"{layer_name}.{kind}.{part}": value for part, value in parts.items()})
    return found


def assert_same_adapter(actual: PeftModel, name: str, expected: PeftModel, other: str) -> None:
    """Compare all tensors of two adapters to the bit."""
    found, wanted = adapter_tensors(actual, name), adapter_tensors(expected, other)
    assert found.keys() == wanted.keys()
    assert wanted
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


# Round trips -----------------------------------------------------------------------------------


def test_the_three_files_are_written(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} >= {CONFIG, ADAPTER, ROUTER}


def test_logits_after_from_pretrained_are_equal_to_the_bit(tmp_path: Path) -> None:
    model = mixture().eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


@SCOPES
def test_logits_after_load_adapter_are_equal_to_the_bit(scope: str, tmp_path: Path) -> None:
    model = mixture(router_scope=scope).eval()
    model.save_pretrained(tmp_path)
    other = mixture(num_experts=2, top_k_experts=1)
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    assert_equal(other.eval()(token_ids()).logits, model(token_ids()).logits)


@SCOPES
def test_logits_after_transformers_own_load_adapter_are_equal_to_the_bit(
    scope: str, tmp_path: Path
) -> None:
    model = mixture(router_scope=scope).eval()
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    base.load_adapter(tmp_path)
    assert_equal(base.eval()(token_ids()).logits, model(token_ids()).logits)


def test_logits_with_empty_tensors_first_are_equal_to_the_bit(tmp_path: Path) -> None:
    model = mixture(router_type="learned_with_maturity").eval()
    mark_mature(model, experts=[0], mature=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


_RELOAD = """
import sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
base, adapter = folder / "base", folder / "adapter"

def by_auto_class():
    return AutoPeftModelForCausalLM.from_pretrained(adapter)

def by_peft():
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)

def by_transformers():
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
    return model

ways = {"auto": by_auto_class, "peft": by_peft, "transformers": by_transformers}
for way, load in ways.items():
    try:
        load()
    except (KeyError, ValueError) as error:
        print("refused", way, error)
assert "moelora" not in sys.modules
import moelora
ids = torch.load(folder / "ids.pt")
torch.save({way: load().eval()(ids).logits for way, load in ways.items()}, folder / "logits.pt")
"""
WAYS = pytest.mark.parametrize("way", ["auto", "peft", "transformers"])


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Tensor, str]:
    """Logits of a mixture loaded in a new process, those of this one, and what was printed."""
    folder = tmp_path_factory.mktemp("process")
    base = tiny_llama(dtype=torch.float32)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = mixture(base, router_type="learned_with_maturity", router_hidden_size=5).eval()
    model.save_pretrained(folder / "adapter")
    torch.save(token_ids(), folder / "ids.pt")
    done = run_python(_RELOAD, folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt"), model(token_ids()).logits, done.stdout


@pytest.mark.slow
@WAYS
def test_logits_are_equal_to_the_bit_in_a_new_process(way: str, new_process: Any) -> None:
    found, expected, _ = new_process
    assert_equal(found[way], expected)


@pytest.mark.slow
@WAYS
def test_without_moelora_imported_loading_fails_instead_of_giving_a_wrong_lora(
    way: str, new_process: Any
) -> None:
    _, _, printed = new_process
    (refusal,) = [line for line in printed.splitlines() if line.startswith(f"refused {way}")]
    assert "MOELORA" in refusal


def test_auto_classes_find_base_and_mixture(tmp_path: Path) -> None:
    base = tiny_llama(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = mixture(base).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_any_name_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = mixture(name=name).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder_of(tmp_path, name), adapter_name=name)
    assert_same_adapter(loaded, name, model, name)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[("default", name) for name in NAMES[1:]],
        ("0", "1"),
        ("weight", "default"),
        ("lora", "layers"),
        ("model", "weight"),
    ],
)
def test_two_adapters_of_any_names_survive_saving_and_loading(
    first: str, second: str, tmp_path: Path
) -> None:
    model = mixture(name=first)
    model.add_adapter(second, mixture_config(num_experts=2, r=3))
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder_of(tmp_path, first), adapter_name=first)
    loaded.load_adapter(folder_of(tmp_path, second), second)
    assert_same_adapter(loaded, first, model, first)
    assert_same_adapter(loaded, second, model, second)
    for active in ([first], [second], [first, second]):
        model.base_model.set_adapter(active)
        loaded.base_model.set_adapter(active)
        assert_equal(loaded.eval()(token_ids()).logits, model.eval()(token_ids()).logits)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_may_be_loaded_under_another_name(name: str, tmp_path: Path) -> None:
    model = mixture(name=name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), folder_of(tmp_path, name), adapter_name="renamed"
    )
    assert_same_adapter(loaded, "renamed", model, name)


@pytest.mark.parametrize("plain", ["0", "weight", "layers", "lora"])
def test_a_plain_lora_of_any_name_beside_a_mixture_costs_neither_a_tensor(
    plain: str, tmp_path: Path
) -> None:
    model = mixture()
    model.add_adapter(plain, lora_config())
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / plain, plain)
    assert_same_adapter(loaded, "default", model, "default")
    assert_same_adapter(loaded, plain, model, plain)


@pytest.mark.parametrize("name", ["0", "weight"])
def test_a_mixture_of_any_name_costs_the_plain_lora_beside_it_no_tensor(
    name: str, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    model.add_adapter(name, mixture_config())
    perturb(model)
    try:
        model.save_pretrained(tmp_path)
    except CheckpointError:
        # knowingly refused is as good as kept
        return
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_same_adapter(loaded, "default", model, "default")


@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable_decides_over_experts_and_routers_alike(
    is_trainable: bool, saved: Path
) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=is_trainable)
    flags = {name: p.requires_grad for name, p in loaded.named_parameters() if ".lora_" in name}
    assert set(flags.values()) == {is_trainable}
    assert router_parameters(loaded).keys() <= flags.keys()


def test_a_trainable_reload_trains_on_to_the_same_gradients(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    for each in (model.train(), loaded):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_equal(
        [p.grad for p in trainable(loaded).values()], [p.grad for p in trainable(model).values()]
    )


def test_modules_to_save_come_along(tmp_path: Path) -> None:
    model = mixture(modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_maturity_is_saved(tmp_path: Path) -> None:
    model = mixture(router_type="learned_with_maturity")
    mark_mature(model, experts=[1], mature=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_same_adapter(loaded, "default", model, "default")
    buffers = [b for name, b in loaded.named_buffers() if name.endswith(".mature")]
    assert [b.tolist() for b in buffers] == [[True, False, True]] * 6


def test_a_fixed_mixture_has_no_router_file_and_loads(tmp_path: Path) -> None:
    model = mixture(router_type="fixed", fixed_routing_weights=[0.5, -1.0, 2.0]).eval()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / ROUTER).exists()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_saving_selected_adapters_writes_no_other_router(tmp_path: Path) -> None:
    model = mixture()
    model.add_adapter("second", mixture_config())
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / ROUTER).exists()
    assert (tmp_path / "second" / ROUTER).exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_saving_again_replaces_both_copies_of_the_router(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    perturb(model, seed=5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_same_adapter(loaded, "default", model, "default")


def test_a_folder_may_lie_below_the_one_that_is_named(saved: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), saved.parent, subfolder=saved.name)
    assert router_parameters(loaded)


def test_a_mixture_added_by_transformers_itself_is_saved_and_loaded(tmp_path: Path) -> None:
    base = tiny_llama()
    base.add_adapter(mixture_config())
    perturb(base)
    base.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "MOELORA"
    native, wrapped = tiny_llama(), PeftModel.from_pretrained(tiny_llama(), tmp_path)
    native.load_adapter(tmp_path)
    expected = base(token_ids()).logits
    assert_equal(native.eval()(token_ids()).logits, expected)
    assert_equal(wrapped(token_ids()).logits, expected)


def test_transformers_own_loading_restores_maturity(tmp_path: Path) -> None:
    model = mixture(router_type="learned_with_maturity").eval()
    mark_mature(model, experts=[1], mature=False)
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    base.load_adapter(tmp_path)
    buffers = [b for name, b in base.named_buffers() if name.endswith(".mature")]
    assert [b.tolist() for b in buffers] == [[True, False, True]] * 6
    assert_equal(base.eval()(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases_reload_to_the_bit(autocast: bool, tmp_path: Path) -> None:
    base = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(base, mixture_config(), autocast_adapter_dtype=autocast).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
    )
    assert_same_adapter(loaded, "default", model, "default")
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_state_dict_that_is_handed_in_is_what_is_saved(tmp_path: Path) -> None:
    model = mixture()
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name, parameter in router_parameters(loaded).items():
        assert torch.equal(parameter, 2 * router_parameters(model)[name]), name


def test_saving_what_was_loaded_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    PeftModel.from_pretrained(tiny_llama(), saved).save_pretrained(again)
    for name in (ADAPTER, ROUTER):
        before, after = load_file(saved / name), load_file(again / name)
        assert list(after) == list(before)
        assert_equal(list(after.values()), list(before.values()))
    with safe_open(saved / ROUTER, "pt") as first, safe_open(again / ROUTER, "pt") as second:
        assert second.metadata() == first.metadata()


def test_a_folder_that_does_not_exist_gets_pefts_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "missing")


# What is on disk -------------------------------------------------------------------------------


def test_the_type_is_moelora_on_disk_and_lora_in_memory(saved: Path) -> None:
    assert json.loads((saved / CONFIG).read_text())["peft_type"] == "MOELORA"
    loaded = PeftModel.from_pretrained(tiny_llama(), saved)
    assert loaded.peft_config["default"].peft_type == PeftType.LORA


def test_the_adapter_file_has_the_shapes_of_a_lora_of_the_total_rank(saved: Path) -> None:
    tensors = load_file(saved / ADAPTER)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (6, 16)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (16, 6)
    assert tensors[f"{prefix}.lora_router.weight"].shape == (3, 16)


def test_the_router_file_holds_the_router_alone_with_a_header(saved: Path) -> None:
    with safe_open(saved / ROUTER, framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert keys == {key for key in load_file(saved / ADAPTER) if ".lora_router." in key}
    assert metadata["moelora_format"] == "1"
    assert len(json.loads(metadata["experts"])) == 3
    assert len(metadata["sha256"]) == 64


def test_the_config_on_disk_keeps_every_field(saved: Path) -> None:
    model = mixture()
    loaded = MoELoraConfig.from_pretrained(saved)
    kept = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    assert {**loaded.to_dict(), "inference_mode": True} == {
        key: sorted(value) if key == "target_modules" else value for key, value in kept.items()
    } | {"target_modules": loaded.to_dict()["target_modules"]}


def test_any_config_class_reads_it(saved: Path) -> None:
    assert type(PeftConfig.from_pretrained(saved)) is MoELoraConfig


def test_no_pickle_is_written(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".md"}


# Identity, whatever the config -----------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a mixture for the tiny model."""
    experts = draw(st.integers(2, 5))
    router_type = draw(st.sampled_from(["learned", "learned_with_maturity", "fixed"]))
    weights = st.lists(st.floats(-2, 2, allow_nan=False), min_size=experts, max_size=experts)
    scope = draw(st.sampled_from(["module", "layer", "model"]))
    names = ["q_proj", "o_proj", "down_proj", *(["embed_tokens"] if scope == "module" else [])]
    targets = st.sets(st.sampled_from(names), min_size=1)
    return {
        "num_experts": experts,
        "top_k_experts": draw(st.integers(1, experts)),
        "r": draw(st.integers(1, 3)),
        "lora_alpha": draw(st.integers(1, 9)),
        "use_rslora": draw(st.booleans()),
        "router_type": router_type,
        "router_scope": scope,
        "fixed_routing_weights": draw(weights) if router_type == "fixed" else None,
        "router_hidden_size": draw(st.none() | st.integers(1, 4)),
        "router_temperature": draw(st.floats(0.1, 10)),
        "router_aux_loss_coef": draw(st.floats(0, 1)),
        "expert_capacity_factor": draw(st.none() | st.floats(0.1, 3)),
        "expert_dropout": draw(st.floats(0, 0.9)),
        "load_balance_loss_type": draw(st.sampled_from(["aux_loss", "z_loss", "switch"])),
        "target_modules": sorted(draw(targets)),
        "rank_pattern": draw(st.sampled_from([{}, {"q_proj": 4}])),
        "alpha_pattern": draw(st.sampled_from([{}, {"q_proj": 3}])),
        "save_name": draw(st.sampled_from(NAMES)),
        "load_name": draw(st.sampled_from(NAMES)),
    }


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=configs())
def test_saving_and_loading_are_the_identity(fields: dict[str, Any], tmp_path: Path) -> None:
    save_name, load_name = fields.pop("save_name"), fields.pop("load_name")
    shutil.rmtree(tmp_path)
    with warnings.catch_warnings():
        # PEFT warns of adapted embeddings whose weights are tied or saved
        warnings.simplefilter("ignore")
        model = mixture(name=save_name, **fields).eval()
        model.save_pretrained(tmp_path)
        folder = folder_of(tmp_path, save_name)
        loaded = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name=load_name)
    assert_same_adapter(loaded, load_name, model, save_name)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)
    before, after = model.peft_config[save_name], loaded.peft_config[load_name]
    assert {key: getattr(after, key) for key in fields if key != "target_modules"} == {
        key: value for key, value in fields.items() if key != "target_modules"
    }
    assert set(after.target_modules) == set(before.target_modules)


# Only the two files that PEFT knows ----------------------------------------------------------


def test_without_the_router_file_the_adapter_file_has_the_router(tmp_path: Path) -> None:
    model = mixture().eval()
    model.save_pretrained(tmp_path)
    (tmp_path / ROUTER).unlink()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


# Saving refused --------------------------------------------------------------------------------


def test_pickle_serialisation_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safe_serialization=False"):
        mixture().save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_fixed_mixture_is_not_saved_beside_another_ones_router(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="Save to another folder"):
        mixture(router_type="fixed").save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_plain_lora_is_not_saved_beside_a_stale_router(saved: Path) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    try:
        model.save_pretrained(saved)
    except CheckpointError:
        return
    assert not (saved / ROUTER).exists()


@pytest.mark.parametrize("name", ["a/b", "/absolute", "a\\b"])
def test_names_that_would_leave_the_folder_are_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    name = name.replace("/absolute", f"{tmp_path}/outside".replace(".", "_"))
    model = mixture()
    try:
        model.add_adapter(name, mixture_config())
    except (ValueError, KeyError):
        return
    with pytest.raises(CheckpointError, match="name"):
        model.save_pretrained(tmp_path / "inside")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_save_that_fails_leaves_the_former_files_readable(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / ROUTER).read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        mixture().save_pretrained(saved)
    assert (saved / ROUTER).read_bytes() == before
    assert not list(saved.glob(".*tmp*"))
