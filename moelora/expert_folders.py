"""Where the experts of a saved model lie: in one folder, or in the folders of several adapters."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelora import _peft
from moelora.attached_file import is_attached_file
from moelora.config import MoELoraConfig
from moelora.expert_tensors import Expert, adapter_locator, read_experts, read_lora_config
from moelora.router_file import ROUTER_FILE, RouterFile, read_router_file


@dataclass(frozen=True)
class ExpertPlace:
    """One expert of a saved model.

    Attributes:
        name: what it is called; an index in its adapter where it has no name.
        adapter: the adapter's name, which is its folder's.
        folder: the folder (or hub id) of its adapter.
        index: its place in that adapter.
        config: of that adapter.
    """

    name: str
    adapter: str
    folder: str
    index: int
    config: Any


@dataclass(frozen=True)
class SavedModel:
    """The adapters in a folder.

    Attributes:
        places: of all experts, in routing order.
        attached: the router that was attached over them, or None.
    """

    places: tuple[ExpertPlace, ...]
    attached: RouterFile | None

    @property
    def names(self) -> list[str]:
        """The experts' names."""
        return [place.name for place in self.places]

    @property
    def adapters(self) -> dict[str, str]:
        """The folder of each adapter, by name, in order."""
        return {place.adapter: place.folder for place in self.places}

    def read(self, index: int) -> Expert:
        """Read one expert.

        Raises:
            CheckpointError: if its adapter cannot be read.
            UnsupportedLayerError: if its adapter is more than pairs of A and B.
        """
        place = self.places[index]
        return read_experts(place.folder)[place.index]

    def read_all(self) -> list[Expert]:
        """Read all experts, in order.

        Raises:
            CheckpointError: if an adapter cannot be read.
            UnsupportedLayerError: if an adapter is more than pairs of A and B.
        """
        return [expert for folder in self.adapters.values() for expert in read_experts(folder)]


def find_experts(source: "str | os.PathLike[str]") -> SavedModel:
    """Find the experts of a mixture, of a plain LoRA, or of several adapters in one folder.

    Of several adapters, those that the attached router names are taken, in its order; without one
    all subfolders that hold a LoRA adapter.

    Args:
        source: a folder, or a hub id (of one adapter).

    Raises:
        CheckpointError: if there is none, or a config or the router's file is damaged.
    """
    root = Path(source)
    path = root / ROUTER_FILE
    attached = None
    if path.is_file() and is_attached_file(path):
        attached = read_router_file(path)
        folders = {name: adapter_folder(root, name) for name in attached.experts}
    elif root.is_dir() and not (root / _peft.CONFIG_NAME).exists():
        inner = sorted(p.parent for p in root.glob(f"*/{_peft.CONFIG_NAME}"))
        folders = {folder.name: folder for folder in inner}
    else:
        folders = {}
    if not folders:
        return SavedModel(tuple(_places("default", os.fspath(source), alone=True)), None)
    several = len(folders) > 1
    places = [
        place
        for name, folder in folders.items()
        for place in _places(name, str(folder), alone=not several)
    ]
    return SavedModel(tuple(places), attached)


def adapter_folder(root: Path, name: str) -> Path:
    """Where PEFT saves an adapter of a model that is saved to ``root``."""
    return root if name == "default" else root / name


def _places(adapter: str, folder: str, *, alone: bool) -> list[ExpertPlace]:
    locate = adapter_locator(folder)
    config = read_lora_config(locate)
    if not isinstance(config, MoELoraConfig):
        own = locate.local.resolve().name if adapter == "default" and alone else adapter
        return [ExpertPlace(own, adapter, folder, 0, config)]
    if not alone and config.num_experts == 1:
        names = [adapter]
    else:
        start = "" if alone else f"{adapter}."
        numbers = [f"{start}{index}" for index in range(config.num_experts)]
        names = config.expert_names or numbers
    return [ExpertPlace(n, adapter, folder, i, config) for i, n in enumerate(names)]
