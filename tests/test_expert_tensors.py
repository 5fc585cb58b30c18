"""Reading experts: what is no stackable LoRA is refused by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from moelora import (
    CheckpointError,
    ConfigError,
    MoELoraError,
    Router,
    UnsupportedLayerError,
    compose,
    export_expert,
)
from moelora.expert_tensors import find_expert, read_experts
from tests.adapters import CONFIG, WEIGHTS, edit_config, edit_tensors, save_lora
from tests.lm import lora_config, mixture, perturb, tiny_llama, two_loras
from tests.models import unchecked_types

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def _set(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({key: change(tensors[key])}))

    return damage


def _add(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(key))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


def _only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


# name: (what is done to the folder, the error, its message)
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "config is no JSON": (_write(CONFIG, b"{"), CheckpointError, "not valid JSON"),
    "config is no text": (_write(CONFIG, b"\xff\xfe"), CheckpointError, "not valid JSON"),
    "config is deep JSON": (
        _write(CONFIG, b"[" * 100_000),
        CheckpointError,
        "not valid JSON",
    ),
    "config is a list": (_write(CONFIG, b"[]"), CheckpointError, "peft_type None, must be 'LORA'"),
    "config is missing": (lambda f: (f / CONFIG).unlink(), CheckpointError, "holds no adapter_con"),
    "another tuner": (
        _config(peft_type="LOHA"),
        CheckpointError,
        "peft_type 'LOHA', must be 'LORA",
    ),
    "a task that is none": (_config(task_type="COOKING"), CheckpointError, "Invalid task type"),
    "r is a string": (_config(r="2"), CheckpointError, "r must be an integer .* got '2'"),
    "r is zero": (_config(r=0), CheckpointError, "r must be an integer of at least 1, got 0"),
    "alpha is a string": (_config(lora_alpha="x"), CheckpointError, "lora_alpha must be a finite"),
    "alpha is infinite": (
        _config(lora_alpha=1e999),
        CheckpointError,
        "lora_alpha must be a finite",
    ),
    "pattern of strings": (
        _config(rank_pattern={"q_proj": "4"}),
        CheckpointError,
        "rank_pattern must map names to numbers",
    ),
    "pattern is a list": (_config(alpha_pattern=[1]), CheckpointError, "alpha_pattern must map"),
    "pattern is no regular expression": (
        _config(alpha_pattern={"q_(": 4}),
        CheckpointError,
        "no module name or regular expression",
    ),
    "targets are numbers": (_config(target_modules=[1]), CheckpointError, "no module name or"),
    "another rank": (_config(r=3), CheckpointError, "has rank 2, but its config asks for 3"),
    "weights are missing": (
        lambda f: (f / WEIGHTS).unlink(),
        CheckpointError,
        "holds no adapter_m",
    ),
    "weights are a pickle": (_only_pickle, CheckpointError, "is a pickle, which can run code"),
    "weights are cut off": (
        _write(WEIGHTS, b"12345678"),
        CheckpointError,
        "cannot be read as safe",
    ),
    "NaN": (_set(f"{Q_PROJ}.lora_A.weight", _nan), CheckpointError, "A of layer .* holds NaN"),
    "infinity": (
        _set(f"{Q_PROJ}.lora_B.weight", lambda t: t / 0),
        CheckpointError,
        "B of layer .* holds NaN or infinity",
    ),
    "integers": (
        _set(f"{Q_PROJ}.lora_B.weight", lambda t: t.long()),
        CheckpointError,
        "has dtype torch.int64, must be one of torch.float16",
    ),
    "B without A": (_drop(f"{Q_PROJ}.lora_A.weight"), CheckpointError, "must have one A and one B"),
    "A and B of unequal rank": (
        _set(f"{Q_PROJ}.lora_B.weight", lambda t: t[:, :1].contiguous()),
        CheckpointError,
        r"has A \(2, 16\) and B \(16, 1\), which do not fit",
    ),
    "A is a vector": (
        _set(f"{Q_PROJ}.lora_A.weight", lambda t: t[0].clone()),
        CheckpointError,
        "which do not fit",
    ),
    "no LoRA tensors": (
        lambda f: edit_tensors(f, lambda t: (t.clear(), t.update({"x": torch.ones(1)}))),
        CheckpointError,
        "holds no LoRA tensors",
    ),
    "a bias that the config hides": (
        _add(f"{Q_PROJ}.lora_B.bias", torch.ones(16)),
        CheckpointError,
        r"'.*lora_B\.bias' of .* is no A or B of a LoRA",
    ),
    "names of another library": (
        lambda f: edit_tensors(
            f, lambda t: [t.update({k.replace("base_model.", "unet."): t.pop(k)}) for k in list(t)]
        ),
        CheckpointError,
        "is no A or B of a LoRA",
    ),
    "DoRA": (_config(use_dora=True), UnsupportedLayerError, "uses use_dora=True, so it is more"),
    "biases": (_config(bias="all"), UnsupportedLayerError, "bias='all'"),
    "a trained head": (
        _config(modules_to_save=["lm_head"]),
        UnsupportedLayerError,
        "modules_to_sav",
    ),
    "trained tokens": (
        _config(trainable_token_indices=[1, 2]),
        UnsupportedLayerError,
        "trainable_token_indices",
    ),
    "adapted parameters": (
        _config(target_parameters=["experts.gate_up_proj"]),
        UnsupportedLayerError,
        "target_parameters",
    ),
    "replicated layers": (
        _config(layer_replication=[[0, 2], [1, 2]]),
        UnsupportedLayerError,
        "layer_replication",
    ),
    "PiSSA": (_config(init_lora_weights="pissa_niter_4"), UnsupportedLayerError, "pissa_niter_4"),
    "OLoRA": (
        _config(init_lora_weights="olora"),
        UnsupportedLayerError,
        "changes the base weights",
    ),
    "an initialisation that is none": (
        _config(init_lora_weights=[1]),
        UnsupportedLayerError,
        "init_lora_weights",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    save_lora(root / "good")
    save_lora(root / "other", seed=1)
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_adapter_is_refused_and_nothing_is_written(
    damage: str, good: Path, tmp_path: Path
) -> None:
    change, error, message = DAMAGES[damage]
    shutil.copytree(good / "good", tmp_path / "bad")
    change(tmp_path / "bad")
    with unchecked_types(), pytest.raises(error, match=message) as caught:
        compose([good / "other", tmp_path / "bad"], tmp_path / "out")
    assert isinstance(caught.value, MoELoraError)
    with unchecked_types(), pytest.raises(MoELoraError):
        export_expert(tmp_path / "bad", tmp_path / "out", expert=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_unknown_config_keys_are_ignored_with_pefts_own_warning(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "good", tmp_path / "new")
    edit_config(tmp_path / "new", from_the_future=1)
    with pytest.warns(UserWarning, match="from_the_future"):
        (expert,) = read_experts(tmp_path / "new")
    assert len(expert.layers) == 6


def test_a_config_of_an_old_peft_is_read(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "good", tmp_path / "old")
    keep = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha")
    content = json.loads((tmp_path / "old" / CONFIG).read_text())
    old = {name: content[name] for name in (*keep, "lora_dropout", "r", "task_type", "peft_type")}
    old.update({"target_modules": content["target_modules"], "modules_to_save": None})
    (tmp_path / "old" / CONFIG).write_text(json.dumps(old))
    (expert,) = read_experts(tmp_path / "old")
    assert {pair.scaling for pair in expert.layers.values()} == {2.0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "neither a folder nor a hub id"),
        ("./nowhere/else", "neither a folder nor a hub id"),
        ("../../etc/passwd", "neither a folder nor a hub id"),
        ("/nowhere/else", "neither a folder nor a hub id"),
        ("owner/../name", "neither a folder nor a hub id"),
        ("", "given by its folder or hub id"),
        ("a\0b", "given by its folder or hub id"),
        ("someone/some-adapter", "the hub has no adapter of that name or cannot be reached"),
        ("someone/some-adapter/sub/folder", "someone/some-adapter is no folder here"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, message: str, good: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        compose([good / "good", source], good / "never")
    assert not (good / "never").exists()


def test_a_file_is_no_source(good: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        read_experts(good / "good" / CONFIG)


def test_a_folder_of_adapters_names_its_subfolders(good: Path) -> None:
    with pytest.raises(CheckpointError, match=r"subfolders \['good', 'other'\] hold adapters"):
        read_experts(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "other/base"}, "base_model_name_or_path is .*'other/base'"),
        ({"revision": "abc"}, None),
        ({"task_type": "FEATURE_EXTRACTION"}, "made for different tasks"),
    ],
)
def test_adapters_of_different_bases_are_refused(
    change: dict[str, str], message: str | None, good: Path, tmp_path: Path
) -> None:
    for name in ("good", "other"):
        shutil.copytree(good / name, tmp_path / name)
        edit_config(tmp_path / name, base_model_name_or_path="some/base")
    edit_config(tmp_path / "other", **change)
    sources = [tmp_path / "good", tmp_path / "other"]
    if message is None:
        compose(sources, tmp_path / "out")
        return
    with pytest.raises(CheckpointError, match=message):
        compose(sources, tmp_path / "out")
    if "base" in message:
        made = compose(sources, tmp_path / "out", allow_different_bases=True)
        assert "the mixture names the first" in made.notes[0]


def test_layers_of_other_widths_belong_to_another_base(good: Path, tmp_path: Path) -> None:
    wide = get_peft_model(tiny_llama(intermediate_size=32), lora_config())
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        CheckpointError, match=r"input \(24,\) .* but \(32,\) and 16 .* different ba"
    ):
        compose([good / "good", tmp_path / "wide"], tmp_path / "out")


def test_saved_embeddings_must_be_the_same(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        save_lora(tmp_path / name, seed=index, target_modules=["embed_tokens", "q_proj"])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    _set(key, lambda t: t + 1)(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"embed_tokens.* differs"):
        compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    _drop(key)(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"brings the base model's tensor .* does not"):
        compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out", allow_different_bases=True)


def test_a_classifier_head_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    base = BertForSequenceClassification(config)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(UnsupportedLayerError, match="modules_to_save"):
        read_experts(tmp_path / "head")


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router": "cosine"}, "router must be one of 'arrow', 'zeros', 'train', got 'cosine'"),
        ({"router": "zeros", "top_k": 1}, "top_k must be 2, the number of experts, with router='z"),
        ({"top_k": 3}, "top_k_experts must be between 1 and num_experts=2"),
        ({"top_k": 0}, "top_k_experts must be an integer of at least 1"),
        ({"temperature": 0.0}, "router_temperature must be a finite number > 0"),
        ({"temperature": float("nan")}, "router_temperature must be a finite number > 0"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 1.5}, "seed must be an integer of at least 0"),
        ({"names": ["a"]}, "names must be 2 different names"),
        ({"names": ["a", "a"]}, "names must be 2 different names"),
        ({"adapters": ["a", "b"]}, "adapters is for a model"),
    ],
)
def test_arguments_are_checked(arguments: Any, message: str, good: Path, tmp_path: Path) -> None:
    with unchecked_types(), pytest.raises(ConfigError, match=message):
        compose([good / "good", good / "other"], tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\\b", "c:"])
def test_names_that_leave_the_folder_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a plain folder name"):
        compose([good / "good", good / "other"], tmp_path / "out", names=["ok", name])


def test_a_mixture_needs_two_different_sources(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 experts, got 1"):
        compose([good / "good"], tmp_path / "out")
    with pytest.raises(ConfigError, match="at least 2 experts, got 0"):
        compose([], tmp_path / "out")
    with pytest.raises(ConfigError, match="is given more than once"):
        compose([good / "good", good / "other" / ".." / "good"], tmp_path / "out")
    with unchecked_types(), pytest.raises(ConfigError, match="must be a list of folders"):
        compose(str(good / "good"), tmp_path / "out")


def test_a_live_model_must_have_the_adapters(tmp_path: Path) -> None:
    model = two_loras()
    with pytest.raises(ConfigError, match=r"one of the model's LoRA adapters .* got 'third'"):
        compose(model, tmp_path / "out", adapters=["first", "third"])
    with pytest.raises(ConfigError, match="adapters must differ"):
        compose(model, tmp_path / "out", adapters=["first", "first"])
    with pytest.raises(ConfigError, match="at least 2 experts, got 0"):
        compose(nn.Linear(2, 2), tmp_path / "out")
    dora = get_peft_model(tiny_llama(), lora_config(use_dora=True))
    with pytest.raises(UnsupportedLayerError, match="use_dora"):
        export_expert(dora, tmp_path / "out", expert=0)


def test_tensors_that_are_elsewhere_are_not_taken_for_zeros(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, low_cpu_mem_usage=True)
    with pytest.raises(UnsupportedLayerError, match="not in this process"):
        export_expert(model, tmp_path / "out", expert=0)


def test_find_expert_takes_names_first() -> None:
    assert find_expert(["1", "0"], "0") == 1
    assert find_expert(["1", "0"], 0) == 0
    with pytest.raises(ConfigError, match="the name of several"):
        find_expert(["a", "a"], "a")


# Where it is written -----------------------------------------------------------------------------


def test_only_an_adapter_is_replaced_and_only_by_force(good: Path, tmp_path: Path) -> None:
    sources = [good / "good", good / "other"]
    out = tmp_path / "out"
    out.mkdir()
    compose(sources, out)
    with pytest.raises(CheckpointError, match="is not empty"):
        compose(sources, out)
    compose(sources, out, router="train", force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"more than an adapter \(notes.txt\)"):
        compose(sources, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        compose(sources, tmp_path / "file", force=True)
    with pytest.raises(CheckpointError, match="is read from and not replaced"):
        compose(sources, good / "good", force=True)
    with pytest.raises(CheckpointError, match="must have a name"):
        compose(sources, "")
    with pytest.raises(CheckpointError, match="cannot be written"):
        compose(sources, tmp_path / "file" / "below")


def test_a_failure_while_writing_leaves_the_earlier_adapter(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [good / "good", good / "other"]
    compose(sources, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moelora.composition.write_router_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left"):
        compose(sources, tmp_path / "out", force=True, router="train")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_beside_an_attached_router_is_read_alone(tmp_path: Path) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2).double())
    model.save_pretrained(tmp_path / "both")
    made = compose([tmp_path / "both" / "first", tmp_path / "both" / "second"], tmp_path / "out")
    assert [expert.name for expert in made.experts] == ["first", "second"]


def test_a_damaged_mixture_is_refused_as_when_it_is_loaded(good: Path, tmp_path: Path) -> None:
    model = mixture()
    perturb(model)
    model.save_pretrained(tmp_path / "mixture")
    (tmp_path / "mixture" / "router.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"router\.safetensors cannot be read"):
        compose([good / "good", tmp_path / "mixture"], tmp_path / "out")
