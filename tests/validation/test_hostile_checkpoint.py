"""Damaged and hostile checkpoints are refused by name, run nothing, and leave nothing."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelora.errors import CheckpointError
from moelora.validation.convert import convert_checkpoint
from moelora.validation.files import MAX_JSON_BYTES
from tests.validation.old_checkpoints import old_gate, old_model, save_old

Damage = Callable[[Path], None]


class Exploit:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _explosive(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"gate.weight": Exploit(folder / "BOOM")}, path)

    return damage


def _bare_pickle(folder: Path) -> None:
    with (folder / "router.pt").open("wb") as file:
        pickle.dump(Exploit(folder / "BOOM"), file)


def _legacy_torch(folder: Path) -> None:
    torch.save(
        {"gate.weight": Exploit(folder / "BOOM")},
        folder / "router.pt",
        _use_new_zipfile_serialization=False,
    )


def _whole_module(folder: Path) -> None:
    torch.save(old_gate(), folder / "router.pt")


def _bomb(folder: Path) -> None:
    torch.save(old_gate().state_dict(), folder / "small.pt")
    with (
        zipfile.ZipFile(folder / "small.pt") as old,
        zipfile.ZipFile(folder / "router.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item.filename) + b"\0" * 10_000)


def _expanded(folder: Path) -> None:
    weight = torch.zeros(1).expand(3, 10**13)
    torch.save({"gate.weight": weight, "gate.bias": torch.zeros(3)}, folder / "router.pt")


def _claimed_header(folder: Path) -> None:
    """A safetensors file whose header claims a terabyte."""
    header = {
        "gate.weight": {"dtype": "F32", "shape": [3, 10**11], "data_offsets": [0, 12 * 10**11]}
    }
    text = json.dumps(header).encode()
    (folder / "router.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def _claimed_header_length(folder: Path) -> None:
    (folder / "router.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _truncated(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _router(**tensors: torch.Tensor) -> Damage:
    def damage(folder: Path) -> None:
        named = {key.replace("_", "."): value for key, value in tensors.items()}
        save_file(named, folder / "router.safetensors")

    return damage


def _saved_router(**settings: Any) -> Damage:
    def damage(folder: Path) -> None:
        gate = old_gate()
        maturity = settings.get("expert_maturity")
        gate.settings |= {k: v for k, v in settings.items() if k != "expert_maturity"}
        if maturity is not None:
            gate.expert_maturity = maturity
        (folder / "router.safetensors").unlink()
        gate.save(folder / "router.pt")

    return damage


FIRST = "peft_adapters/expert_0/expert_0"


def _config(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / FIRST / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / FIRST / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)

    return damage


def _first(half: str) -> str:
    return f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"


def _shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first("B")] = tensors[_first("B")][:, :2]


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first("A")][0, 0] = float("nan")


def _drop(half: str) -> Damage:
    return _tensors(lambda tensors: tensors.__delitem__(_first(half)))


def _text(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text) and None


def _remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            for inner in sorted(path.rglob("*"), reverse=True):
                inner.rmdir() if inner.is_dir() else inner.unlink()
            path.rmdir()
        else:
            path.unlink()

    return damage


def _all(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def _pt_only(damage: Damage) -> Damage:
    """Without the safetensors router, so that ``router.pt`` is read."""

    def both(folder: Path) -> None:
        (folder / "router.safetensors").unlink()
        damage(folder)

    return both


DAMAGES: dict[str, tuple[Damage, str]] = {
    "code in router.pt": (
        _pt_only(_explosive("router.pt")),
        "router.pt is refused: it holds more than tensors and plain values",
    ),
    "code in the skill library": (
        _all(_remove("skill_library.pt"), _explosive("skill_library.pt")),
        "skill_library.pt is refused",
    ),
    "code in adapter_model.bin": (
        _all(
            _remove(f"{FIRST}/adapter_model.safetensors"),
            _explosive(f"{FIRST}/adapter_model.bin"),
        ),
        "adapter_model.bin is refused",
    ),
    "code in an expert": (
        _all(_remove("peft_adapters/expert_0"), _explosive("peft_adapters/expert_0.pt")),
        "expert_0.pt is refused",
    ),
    "a bare pickle": (_pt_only(_bare_pickle), "damaged or not in the zip format"),
    "torch's old format": (_pt_only(_legacy_torch), "damaged or not in the zip format"),
    "a whole module": (_pt_only(_whole_module), "router.pt is refused: it holds more than"),
    "a zip bomb": (_pt_only(_bomb), "in it is compressed, which torch never does"),
    "an expanded tensor": (_pt_only(_expanded), "claims 120000000000000 bytes, but only 4 are"),
    "a claimed terabyte": (_claimed_header, "cannot be read as safetensors"),
    "a claimed header": (_claimed_header_length, "cannot be read as safetensors"),
    "a huge config": (
        _text("config.json", " " * (MAX_JSON_BYTES + 1)),
        "a config of more than 16777216 is not read",
    ),
    "a deep config": (_text("config.json", "[" * 100_000), "is not valid JSON"),
    "a config of Latin-1": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}') and None,
        "cannot be read",
    ),
    "a list for a config": (_text("config.json", "[]"), "must hold a JSON object, got list"),
    "truncated router": (_truncated("router.safetensors"), "cannot be read as safetensors"),
    "truncated expert": (
        _truncated(f"{FIRST}/adapter_model.safetensors"),
        "cannot be read as safetensors",
    ),
    "truncated skills": (_truncated("skill_library.pt"), "is refused: it is damaged"),
    "truncated config": (_truncated(f"{FIRST}/adapter_config.json"), "is not valid JSON"),
    "other number of experts": (
        _text("config.json", '{"model_type": "dylora-moe", "num_experts": 5}'),
        "config.json says 5 experts, but .* holds 3",
    ),
    "router over others": (
        _router(gate_weight=torch.zeros(5, 32), gate_bias=torch.zeros(5)),
        "routes over 5 experts, but .* holds 3",
    ),
    "gate of one axis": (
        _router(gate_weight=torch.zeros(3)),
        r"gate.weight must be \(experts, hidden\), got shape \(3,\)",
    ),
    "bias of another length": (
        _router(gate_weight=torch.zeros(3, 32), gate_bias=torch.zeros(4)),
        r"gate.bias must have shape \(3,\), got \(4,\)",
    ),
    "NaN in the gate": (
        _router(gate_weight=torch.full((3, 32), float("nan"))),
        "holds NaN or infinity",
    ),
    "integers for a gate": (
        _router(gate_weight=torch.zeros(3, 32, dtype=torch.int64)),
        "must be a float tensor, got torch.int64",
    ),
    "top_k beyond the experts": (_saved_router(top_k=9), r"top_k must be in \[1, 3\], got 9"),
    "temperature 0": (_saved_router(temperature=0.0), "temperature must be > 0, got 0.0"),
    "claimed input size": (
        _saved_router(input_size=10**12),
        "says input_size=1000000000000, but its gate has 32",
    ),
    "maturity of others": (
        _saved_router(expert_maturity=torch.ones(7)),
        r"expert_maturity must have shape \(3,\), got \(7,\)",
    ),
    "missing expert": (_remove("peft_adapters/expert_1"), "expert_1 is missing"),
    "no experts": (
        _all(*(_remove(f"peft_adapters/expert_{i}") for i in range(3))),
        "holds no expert_0, expert_1",
    ),
    "no config": (_remove(f"{FIRST}/adapter_config.json"), "holds no adapter_config.json"),
    "no weights": (_remove(f"{FIRST}/adapter_model.safetensors"), "holds neither adapter_model"),
    "another kind of adapter": (_config(peft_type="IA3"), "peft_type 'IA3', must be 'LORA'"),
    "claimed rank": (_config(r=10**9), r"has layers of rank \[4\], but its config asks for"),
    "claimed pattern": (
        _config(rank_pattern={"q_proj": 10**9}),
        "asks for rank 1000000000, its layers have rank",
    ),
    "a word for a rank": (_config(r="4"), "r must be an integer >= 1, got '4'"),
    "infinite alpha": (_config(lora_alpha=float("inf")), "lora_alpha must be a finite number"),
    "replicated layers": (_config(layer_replication=[[0, 10**9]]), "layer_replication is set"),
    "dropout of 2": (
        _config(lora_dropout=2),
        r"lora_dropout must be in \[0, 1\), got 2",
    ),
    "fields that PEFT refuses": (
        _config(target_modules=".*q_proj", layers_to_transform=[0]),
        "The config of .*expert_0",
    ),
    "A without B": (_drop("B"), "but no .*lora_B"),
    "B without A": (_drop("A"), "but no .*lora_A"),
    "B of another rank": (_tensors(_shorten), "does not fit"),
    "NaN in an expert": (_tensors(_poison), "holds NaN or infinity"),
    "foreign tensors": (
        _tensors(lambda t: t.update({"../../evil": torch.zeros(1)})),
        r"holds '../../evil', which PEFT would not have saved",
    ),
    "a skill that leaves": (
        lambda f: torch.save({"../../evil": torch.zeros(32)}, f / "skill_library.pt"),
        "names a skill '../../evil'",
    ),
    "skills of two widths": (
        lambda f: torch.save({0: torch.zeros(32), 1: torch.zeros(8)}, f / "skill_library.pt"),
        "must hold one vector per skill, all of one width",
    ),
    "a list of skills": (
        lambda f: torch.save([torch.zeros(32)], f / "skill_library.pt"),
        "must hold a dict, got list",
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return old_model()


@pytest.mark.parametrize("case", DAMAGES)
def test_a_bad_checkpoint_is_refused_and_nothing_is_run_or_written(
    case: str, model: Any, tmp_path: Path
) -> None:
    damage, message = DAMAGES[case]
    folder = save_old(tmp_path / "old", model)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "new")
    assert not (folder / "BOOM").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def _only(name: str, content: dict[Any, Any]) -> Damage:
    return lambda folder: torch.save(content, folder / "peft_adapters" / name)


PT_DAMAGES: dict[str, tuple[Damage, str]] = {
    "an expert that was not trained": (
        _only("expert_1.pt", {}),
        "holds no tensors of expert_1: only parameters that were being trained were saved",
    ),
    "keys that are no names": (_only("expert_1.pt", {3: torch.zeros(1)}), "got the key 3"),
    "other output layers": (
        lambda f: torch.save(
            {
                **torch.load(f / "peft_adapters/expert_1.pt", weights_only=True),
                "base_model.model.lm_head.weight": torch.ones(61, 32),
            },
            f / "peft_adapters/expert_1.pt",
        ),
        "different output layers",
    ),
    "base weights": (
        lambda f: torch.save(
            {
                **torch.load(f / "peft_adapters/expert_1.pt", weights_only=True),
                "base_model.model.model.norm.weight": torch.ones(32),
            },
            f / "peft_adapters/expert_1.pt",
        ),
        "holds 'model.norm.weight', which belongs to no expert",
    ),
    "a word for alpha": (
        _text("config.json", '{"model_type": "dylora-moe", "_dylora_lora_alpha": "8"}'),
        "_dylora_lora_alpha must be a number, got '8'",
    ),
}


@pytest.mark.parametrize("case", PT_DAMAGES)
def test_bad_expert_files_are_refused(case: str, model: Any, tmp_path: Path) -> None:
    damage, message = PT_DAMAGES[case]
    folder = save_old(tmp_path / "old", model, layout="pt")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_of_several_ranks_in_one_file_are_refused(model: Any, tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", model, layout="pt")
    path = folder / "peft_adapters" / "expert_0.pt"
    tensors = torch.load(path, weights_only=True)
    first = next(key for key in tensors if "lora_A" in key)
    tensors[first] = tensors[first][:2]
    other = first.replace("lora_A", "lora_B")
    tensors[other] = tensors[other][:, :2]
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"has layers of ranks \[2, 4\], must be one rank"):
        convert_checkpoint(folder, tmp_path / "new")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert_checkpoint(tmp_path / "absent", tmp_path / "new")
