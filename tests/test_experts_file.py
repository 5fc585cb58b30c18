"""ExpertManager: to and from disk, and from one model to another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moelora import (
    CheckpointError,
    ConfigError,
    ExpertManager,
    MoELoraConfig,
    UnsupportedLayerError,
)
from tests.experts import BASES, manager, output, tensors_of
from tests.models import HIDDEN, randomise, token_ids, unchecked_types
from tests.tolerances import assert_close, assert_equal

KINDS = [(base, routed) for base in BASES for routed in (False, True)]


def base_model(base: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = BASES[base][0]()
    return model


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The whole set ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_saved_experts_come_back_to_the_bit(base: str, routed: bool, tmp_path: Path) -> None:
    experts = manager(3, base=base, routed=routed)
    experts.rename_expert(1, "sql")
    experts.update_record("sql", skill="SQL", add_steps=7, extra={"loss": 0.5})
    experts.freeze("sql")
    experts.mark_mature([0, 1])
    if not routed:
        experts.add_router(input_size=HIDDEN)
        experts.create_expert("late")
    inputs = BASES[base][1]()
    weights: dict[str, Any] = {} if routed else {"routing_weights": torch.linspace(0, 1, 4)}
    expected = output(experts, inputs, **weights)
    experts.set_active_expert(0)
    flags = [p.requires_grad for p in experts.model.parameters()]
    experts.save(tmp_path)
    assert experts.active_experts == ["expert_0"]
    assert [p.requires_grad for p in experts.model.parameters()] == flags
    loaded = ExpertManager.load(base_model(base), tmp_path)
    assert loaded.get_all_adapter_names() == experts.get_all_adapter_names()
    assert loaded.active_experts == experts.get_all_adapter_names()
    assert_equal(output(loaded, inputs, **weights), expected)
    for name in experts.get_all_adapter_names():
        assert loaded.record(name) == experts.record(name)
    assert loaded.record("sql").frozen
    if not routed:
        hidden = torch.randn(1, 2, HIDDEN)
        assert_equal(
            loaded.model.get_routing_weights(hidden), experts.model.get_routing_weights(hidden)
        )


@pytest.mark.parametrize("routed", [False, True])
def test_loaded_experts_train_further_but_for_the_frozen(routed: bool, tmp_path: Path) -> None:
    experts = manager(2, routed=routed)
    if not routed:
        experts.add_router()
    experts.freeze(0)
    experts.save(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path, is_trainable=True)
    names = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in experts.model.named_parameters() if p.requires_grad}
    assert (loaded.routing is not None) == routed
    number = loaded.create_expert()
    assert loaded.model.peft_config[loaded.name_of(number)].r == 2


def test_experts_loaded_for_inference_stay_untrained_until_unfrozen(tmp_path: Path) -> None:
    manager(2).save(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path)
    loaded.set_active_expert(0)
    loaded.activate_all_experts()
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    loaded.unfreeze(1)
    loaded.set_active_expert(1)
    assert all("expert_1" in n for n, p in loaded.model.named_parameters() if p.requires_grad)
    assert any(p.requires_grad for p in loaded.model.parameters())


def test_each_folder_is_an_adapter_of_peft(tmp_path: Path) -> None:
    experts = manager(2)
    experts.save(tmp_path)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "expert_1")
    experts.set_active_expert(1)
    ids = token_ids()
    assert_equal(plain.eval()(ids).logits.detach(), output(experts, ids))
    assert sorted(files_in(tmp_path)) == [
        "README.md",
        "expert_0/adapter_config.json",
        "expert_0/adapter_model.safetensors",
        "expert_1/adapter_config.json",
        "expert_1/adapter_model.safetensors",
        "experts.json",
    ]


def test_what_peft_saved_loads_in_a_sensible_order(tmp_path: Path) -> None:
    experts = manager(0)
    for number in (0, 1, 2, 10):
        experts.create_expert(f"expert_{number}")
    experts.create_expert("default")
    randomise(experts.model)
    experts.model.save_pretrained(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path)
    assert loaded.get_all_adapter_names() == [
        "default",
        "expert_0",
        "expert_1",
        "expert_2",
        "expert_10",
    ]


def test_without_a_list_the_routers_file_says_the_order(tmp_path: Path) -> None:
    experts = manager(0)
    for name in ("b", "a", "c"):
        experts.create_expert(name, init_lora_weights=False)
    experts.add_router()
    experts.model.save_pretrained(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path)
    assert loaded.get_all_adapter_names() == ["b", "a", "c"]
    ids, weights = token_ids(), torch.tensor([0.2, 0.3, 0.5])
    experts.model.eval()
    assert_equal(
        output(loaded, ids, routing_weights=weights), output(experts, ids, routing_weights=weights)
    )


def test_experts_that_were_removed_do_not_come_back(tmp_path: Path) -> None:
    experts = manager(3)
    experts.save(tmp_path)
    experts.remove_expert(1)
    experts.save(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path)
    assert loaded.get_all_adapter_names() == ["expert_0", "expert_2"]


def test_a_mixture_among_the_experts_comes_back(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), MoELoraConfig(num_experts=3, r=2), adapter_name="mix")
    experts = ExpertManager(model, r=2)
    experts.create_expert("plain")
    experts.activate_all_experts()
    randomise(experts.model)
    experts.model.eval()
    experts.save(tmp_path)
    loaded = ExpertManager.load(base_model(), tmp_path)
    ids, weights = token_ids(), torch.linspace(0, 1, 4)
    assert loaded.num_experts == 4
    assert_equal(
        output(loaded, ids, routing_weights=weights), output(experts, ids, routing_weights=weights)
    )


def test_an_interrupted_save_leaves_the_earlier_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = manager(2)
    experts.save(tmp_path)
    before = files_in(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        experts.save(tmp_path)
    monkeypatch.undo()
    assert files_in(tmp_path) == before


# Files that are wrong --------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "experts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def renamed(folder: Path, name: str) -> None:
    content = json.loads((folder / "experts.json").read_text())
    content["experts"][0]["name"] = name
    edited(folder, **content)


def with_entry(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "experts.json").read_text())
    content["experts"][1].update(changes)
    edited(folder, **content)


def spoil_tensor(folder: Path) -> None:
    path = folder / "expert_1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


DAMAGE: dict[str, tuple[Any, str]] = {
    "no JSON": (lambda f: (f / "experts.json").write_text("{"), "is not valid JSON"),
    "no UTF-8": (lambda f: (f / "experts.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
    "deep JSON": (lambda f: (f / "experts.json").write_text("[" * 100_000), "is not valid JSON"),
    "a list": (lambda f: (f / "experts.json").write_text("[]"), "is no list of experts"),
    "no version": (lambda f: edited(f, moelora_format=None), "is no list of experts"),
    "newer": (lambda f: edited(f, moelora_format=99), "has format 99, this release reads up to"),
    "no experts": (lambda f: edited(f, experts=[]), "names no experts"),
    "experts a dict": (lambda f: edited(f, experts={"a": 1}), "names no experts"),
    "an entry a string": (lambda f: edited(f, experts=["a"]), "must be an object with a name"),
    "a name a number": (lambda f: renamed(f, 3), "must be an object with a name"),  # type: ignore[arg-type]
    "a name above": (lambda f: renamed(f, "../expert_0"), "must be a plain folder name"),
    "an absolute name": (lambda f: renamed(f, "/tmp"), "must be a plain folder name"),
    "a name twice": (lambda f: renamed(f, "expert_1"), "names expert 'expert_1' twice"),
    "an unknown name": (lambda f: renamed(f, "other"), "has no folder of expert 'other'"),
    "wrong steps": (lambda f: with_entry(f, steps="many"), "expert 'expert_1': steps must be"),
    "unknown field": (lambda f: with_entry(f, colour=1), "expert 'expert_1': .*colour"),
    "no folder": (lambda f: shutil.rmtree(f / "expert_1"), "has no folder of expert 'expert_1'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_lists_are_refused_and_leave_the_model(name: str, tmp_path: Path) -> None:
    damage, match = DAMAGE[name]
    manager(2).save(tmp_path)
    damage(tmp_path)
    base = base_model()
    before = list(base.state_dict())
    with unchecked_types(), pytest.raises(CheckpointError, match=match):
        ExpertManager.load(base, tmp_path)
    assert list(base.state_dict()) == before
    ExpertManager(base).create_expert()


def test_a_damaged_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    manager(2).save(tmp_path)
    spoil_tensor(tmp_path)
    base = base_model()
    before = list(base.state_dict())
    with pytest.raises(Exception, match="safetensors|header|deserializing"):
        ExpertManager.load(base, tmp_path)
    assert list(base.state_dict()) == before
    assert not isinstance(getattr(base, "peft_config", None), dict)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither experts.json nor an adapter"):
        ExpertManager.load(base_model(), tmp_path)


def test_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    experts = manager(1)
    experts.save(tmp_path)
    with pytest.raises(ConfigError, match="The model has adapters already"):
        ExpertManager.load(experts.model, tmp_path)


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There are no experts yet"):
        ExpertManager(base_model()).save(tmp_path)


# One expert out --------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "routed"), KINDS)
def test_an_exported_expert_is_a_plain_lora(base: str, routed: bool, tmp_path: Path) -> None:
    experts = manager(3, base=base, routed=routed)
    folder = experts.export_expert(1, tmp_path / "out")
    assert sorted(files_in(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not any("router" in key for key in load_file(folder / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(base_model(base), folder).eval()
    experts.set_active_expert(1)
    inputs = BASES[base][1]()
    result = plain(inputs)
    logits = result if isinstance(result, Tensor) else result.logits
    assert_equal(logits.detach(), output(experts, inputs))


def test_dora_experts_leave_as_they_are(tmp_path: Path) -> None:
    experts = manager(0)
    experts.create_expert(use_dora=True, init_lora_weights=False)
    experts.create_expert()
    experts.export_expert(0, tmp_path / "out")
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    experts.set_active_expert(0)
    experts.model.eval()
    ids = token_ids()
    assert_equal(plain(ids).logits.detach(), output(experts, ids))


def test_a_mixture_is_no_plain_lora(tmp_path: Path) -> None:
    experts = ExpertManager(get_peft_model(base_model(), MoELoraConfig(num_experts=3, r=2)))
    with pytest.raises(UnsupportedLayerError, match="is a mixture of 3 experts, no plain LoRA"):
        experts.export_expert(0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        manager(1).export_expert(0, tmp_path)
    assert list(files_in(tmp_path)) == ["mine.txt"]


# One expert in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to_routed", [False, True])
@pytest.mark.parametrize("from_routed", [False, True])
@pytest.mark.parametrize("way", ["folder", "set", "model", "manager"])
def test_an_imported_expert_works_alone_as_where_it_came_from(
    way: str, from_routed: bool, to_routed: bool, tmp_path: Path
) -> None:
    source = manager(2, routed=from_routed)
    source.update_record(1, skill="sql")
    source.save(tmp_path)
    target = manager(1, routed=to_routed)
    optional: dict[str, Any] = {"folder": {}}.get(way, {"adapter": "expert_1"})
    given: Any = {
        "folder": tmp_path / "expert_1",
        "set": tmp_path,
        "model": source.model,
        "manager": source,
    }[way]
    before = tensors_of(target, "expert_0")
    target.model.train()
    number = target.import_expert(given, "taken", **optional)
    assert target.model.training
    assert (number, target.active_experts) == (1, ["expert_0", "taken"])
    assert target.record("taken").skill == "sql"
    assert_equal(list(tensors_of(target, "expert_0").values()), list(before.values()))
    source.set_active_expert(1)
    target.set_active_expert("taken")
    target.model.eval()
    ids = token_ids()
    assert_equal(output(target, ids), output(source, ids))
    target.activate_all_experts()
    explicit = {} if to_routed else {"routing_weights": torch.ones(2)}
    output(target, ids, **explicit)
    routers = [n for n, _ in target.model.named_parameters() if "lora_router.taken" in n]
    assert bool(routers) == to_routed


def test_a_first_expert_can_be_imported_and_gets_its_folders_name(tmp_path: Path) -> None:
    source = manager(1)
    source.export_expert(0, tmp_path / "french")
    target = ExpertManager(base_model())
    assert target.import_expert(str(tmp_path / "french"), skill="French") == 0
    assert target.get_all_adapter_names() == ["french"]
    assert target.record(0).skill == "French"
    target.model.eval()
    ids = token_ids()
    source.set_active_expert(0)
    assert_equal(output(target, ids), output(source, ids))


def test_an_imported_expert_gets_a_row_of_the_router(tmp_path: Path) -> None:
    source, target = manager(3), manager(1)
    router = target.add_router()
    source.add_router()
    source.save(tmp_path)
    rows = router.stacked("weight").clone()
    target.import_expert(tmp_path, "taken", adapter="expert_2")
    assert router.num_experts == 2
    assert_equal(router.stacked("weight")[:1], rows)
    assert not target.is_mature("taken")


def test_a_copy_of_an_own_expert_is_independent() -> None:
    experts = manager(1)
    experts.import_expert(experts, "twin", adapter=0)
    ids = token_ids()
    both = output(experts, ids, routing_weights=torch.tensor([0.5, 0.5]))
    experts.set_active_expert(0)
    assert_close(both, output(experts, ids))
    pointers = {p.data_ptr() for n, p in experts.model.named_parameters() if "expert_0" in n}
    twins = {p.data_ptr() for n, p in experts.model.named_parameters() if "twin" in n}
    assert not pointers & twins


def test_a_mixture_can_be_imported_as_a_whole(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), MoELoraConfig(num_experts=3, r=2)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    experts = manager(1, routed=True)
    experts.import_expert(tmp_path, "mix")
    experts.model.eval()
    assert experts.num_experts == 4
    ids = token_ids()
    experts.set_active_expert("mix")
    assert_equal(output(experts, ids), model(ids).logits.detach())


def wrong_shape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, path)


def missing_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)


def extra_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.x.lora_A.weight": torch.ones(2, 2)}, path)


def not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(path).items()}, path)


def integers(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.int() for key, tensor in load_file(path).items()}, path)


def config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_ADAPTERS: dict[str, tuple[Any, str]] = {
    "shape": (wrong_shape, "has shape .*, must have"),
    "missing": (missing_tensor, r"does not fit this model: it lacks .* \(1 tensors are missing"),
    "extra": (extra_tensor, "does not fit this model: it has .*, too"),
    "not finite": (not_finite, "holds NaN or infinity"),
    "integers": (integers, "has dtype torch.int32, must be like torch.float32"),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 20),
        "cannot be read as safetensors",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors. Only safetensors are read",
    ),
    "pickle only": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "Only safetensors are read",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "config no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "is not valid JSON",
    ),
    "another tuner": (lambda f: config(f, peft_type="IA3"), "of peft_type 'IA3', must be one of"),
    "type a list": (lambda f: config(f, peft_type=["LORA"]), "must be one of"),
    "modules to save": (lambda f: config(f, modules_to_save=["x"]), "cannot have modules_to_save"),
    "bias": (lambda f: config(f, bias="all"), "must have bias='none'"),
    "pissa": (lambda f: config(f, init_lora_weights="pissa"), "must have init_lora_weights True"),
    "rank": (lambda f: config(f, r=5), "has shape .*, must have"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_nothing_changes(
    name: str, first: bool, tmp_path: Path
) -> None:
    damage, match = BAD_ADAPTERS[name]
    manager(1).export_expert(0, tmp_path / "bad")
    damage(tmp_path / "bad")
    experts = ExpertManager(base_model()) if first else manager(1)
    if not first:
        experts.add_router()
    before = list(experts.model.state_dict())
    with pytest.raises(ValueError, match=match):
        experts.import_expert(tmp_path / "bad")
    assert list(experts.model.state_dict()) == before
    assert len(experts) == (0 if first else 1)
    experts.create_expert()


@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        (lambda: manager(2), {}, ConfigError, r"adapter must be one of \['expert_0', 'expert_1'\]"),
        (lambda: manager(2), {"adapter": 7}, ConfigError, "got 7"),
        (lambda: manager(2).model, {"adapter": "x"}, ConfigError, "adapter must be one of"),
        (base_model, {}, ConfigError, "The source LlamaForCausalLM has no adapters"),
        (lambda: 3, {}, TypeError, "source must be a folder, a hub id, a PEFT model or"),
        (lambda: "/nowhere/at/all", {}, CheckpointError, "holds no adapter_config.json"),
        (lambda: ".", {"adapter": "../x"}, CheckpointError, "must be a plain folder name"),
        (lambda: ".", {"adapter": 1}, ConfigError, "adapter must be the name of a subfolder"),
        (lambda: manager(1), {"name": "a/b"}, CheckpointError, "must be a plain folder name"),
        (lambda: manager(1), {"name": "expert_0"}, ConfigError, "There is an expert 'expert_0'"),
    ],
)
def test_wrong_sources_are_refused(source: Any, options: Any, error: Any, match: str) -> None:
    experts, given = manager(1), source()
    with unchecked_types(), pytest.raises(error, match=match):
        experts.import_expert(given, **options)
    assert experts.get_all_adapter_names() == ["expert_0"]


def test_an_adapter_that_cannot_be_routed_is_refused() -> None:
    source = manager(0)
    source.create_expert(use_dora=True)
    experts = manager(1, routed=True)
    with pytest.raises(ConfigError, match="use_dora is not supported"):
        experts.import_expert(source, "dora")
    assert len(experts) == 1
