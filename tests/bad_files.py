"""Files of a mixture that are wrong, and the error each gets."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora import (
    CheckpointError,
    Router,
)
from tests.bad_input import ADAPTER, CONFIG, ROUTER, Bad, World
from tests.lm import (
    mixture,
    tiny_llama,
)

# Files -----------------------------------------------------------------------------------------


def load(world: World) -> None:
    world.mixture.load_adapter(world.folder, "loaded")


def file(match: str, damage: Callable[[Path], None], error: Any = CheckpointError) -> Bad:
    """A saved mixture that is damaged before it is loaded into the one there is."""

    def call(world: World) -> None:
        damage(world.folder)
        load(world)

    return Bad(call, match, error)


def edited(match: str, error: Any = CheckpointError, **values: Any) -> Bad:
    """A field of adapter_config.json, edited by hand."""

    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return file(match, damage, error)


def header(match: str, **values: str) -> Bad:
    """An entry of the router file's header, edited by hand."""

    def damage(folder: Path) -> None:
        path = folder / ROUTER
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(path), path, metadata={**metadata, **values})

    return file(match, damage)


def tensors(match: str, name: str, change: Callable[[dict[str, Tensor], str], None]) -> Bad:
    """A change to the first router tensor of one file; the header stays."""

    def damage(folder: Path) -> None:
        path = folder / name
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        found = load_file(path)
        change(found, next(key for key in sorted(found) if ".lora_router." in key))
        save_file(found, path, metadata=metadata)

    return file(match, damage)


def _set(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], str], None]:
    def apply(found: dict[str, Tensor], key: str) -> None:
        found[key] = change(found[key]).contiguous()

    return apply


FILES = {
    "router file cut off": file(
        r"router\.safetensors cannot be read",
        lambda folder: _rewrite(folder / ROUTER, lambda old: old[:-20]),
    ),
    "router file empty": file(
        r"router\.safetensors cannot be read",
        lambda folder: _rewrite(folder / ROUTER, lambda _: b""),
    ),
    "a pickle under the router's name": file(
        r"router\.safetensors cannot be read",
        lambda folder: _rewrite(folder / ROUTER, lambda _: pickle.dumps({"weight": [1.0]})),
    ),
    "router file of another library": file(
        r"router\.safetensors .*(no version|differs)",
        lambda folder: save_file({"gate": torch.ones(2)}, folder / ROUTER),
    ),
    "router file of a newer format": header(
        r"router\.safetensors has format 2", moelora_format="2"
    ),
    "router file of format minus one": header(
        r"router\.safetensors .*version", moelora_format="-1"
    ),
    "router file of format zero": header(
        r"router\.safetensors .*(version|format)", moelora_format="0"
    ),
    "router file with another digest": header(r"router\.safetensors is damaged", sha256="0" * 64),
    "router file of an unknown kind": header(r"router\.safetensors.*kind", kind="telepathic"),
    "expert names that leave the folder": header(
        r"router\.safetensors.*experts", experts='["../../etc", "b", "c"]'
    ),
    "expert names with separators": header(
        r"router\.safetensors.*experts", experts='["a/b", "b", "c"]'
    ),
    "another number of expert names": header(r"router\.safetensors.*experts", experts='["a"]'),
    "expert names that are no JSON": header(r"router\.safetensors.*experts", experts="[a, b"),
    "router file of changed values": tensors(
        r"router\.safetensors is damaged", ROUTER, _set(lambda t: t + 1)
    ),
    "router of another shape": tensors(
        r"lora_router.*has shape \(2, .*3 rows", ADAPTER, _set(lambda t: t[:2])
    ),
    "router of NaN": tensors(r"router.*(NaN|differs)", ADAPTER, _set(lambda t: t * torch.nan)),
    "router of integers": tensors("router.*(dtype|differs)", ADAPTER, _set(lambda t: t.long())),
    "router missing in one layer": tensors(
        "no router tensors of layer", ADAPTER, lambda found, key: found.__delitem__(key)
    ),
    "adapter file missing": file(
        r"holds no adapter_model\.safetensors", lambda folder: (folder / ADAPTER).unlink()
    ),
    "adapter file cut off": file(
        r"adapter_model\.safetensors cannot be read",
        lambda folder: _rewrite(folder / ADAPTER, lambda old: old[:200]),
    ),
    "config that is no JSON": file(
        r"adapter_config\.json is not valid JSON",
        lambda folder: _rewrite(folder / CONFIG, lambda old: old[:-5]),
    ),
    "config with another number of experts": edited("num_experts=4", num_experts=4),
    "config with a huge number of experts": edited(
        r"adapter_config\.json: num_experts must", num_experts=10**18
    ),
    "config with an unknown router type": edited(
        r"adapter_config\.json: router_type must .*'nearest'", router_type="nearest"
    ),
    "config with a huge temperature": edited(
        r"adapter_config\.json: router_temperature", router_temperature=10**400
    ),
    "config with another rank": edited("r=3", r=3),
    "config with a rank of text": edited(
        r"adapter_config\.json.*r|must be", (ValueError, TypeError), r="2"
    ),
    "config of a newer format": edited("moelora_format 7 .*Upgrade", moelora_format=7),
    "config of another scope": edited("router", router_scope="layer"),
    "config with another hidden layer": edited("router", router_hidden_size=3),
    "config that asks for more layers": edited(
        "lacks .* tensors", target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]
    ),
    "a folder that does not exist": Bad(
        lambda world: world.mixture.load_adapter(world.root / "nowhere", "loaded"),
        "nowhere",
        (ValueError, OSError),
    ),
    "saving as pickle": Bad(
        lambda world: world.mixture.save_pretrained(world.root / "new", safe_serialization=False),
        "safetensors only",
        CheckpointError,
    ),
    "saving over another mixture's router": Bad(
        lambda world: mixture(router_type="fixed").save_pretrained(world.folder),
        r"router\.safetensors holds the router of another",
        CheckpointError,
    ),
    "saving to a file": Bad(
        lambda world: world.mixture.save_pretrained(world.folder / CONFIG),
        "directory, not a file|Not a directory|File exists",
        (ValueError, OSError),
    ),
    "a router for a folder that has none": Bad(
        lambda world: PeftModel.from_pretrained(tiny_llama(), world.folder, router=Router(16, 3)),
        "no attached router was saved",
        CheckpointError,
    ),
}


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
