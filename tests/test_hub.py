"""Hub ids and ``push_to_hub``, against a folder that stands for the hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model

from moelora import CheckpointError, MoELoraConfig, Router
from tests.lm import (
    assert_same_snapshot,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    snapshot,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.test_attached import AUTOMATIC, Linear
from tests.test_checkpoint import ADAPTER, CONFIG, ROUTER
from tests.test_checkpoint_damage import edit_header, truncate
from tests.tolerances import assert_equal

REPO = "someone/skill"
# offline, PEFT itself asks for the subfolder twice ("a/a/adapter_model.safetensors"): none there.
ONLINE = pytest.mark.parametrize("hub", ["online"], indirect=True)


class Hub:
    """Repositories are folders; what is downloaded is linked into a cache, as the real one does."""

    def __init__(self, root: Path, *, online: bool) -> None:
        self.root = root / "hub"
        self.cache = root / "cache"
        self.online = online
        self.downloads: list[dict[str, Any]] = []
        self.broken: dict[str, Exception] = {}

    def folder(self, repo_id: str) -> Path:
        return self.root / repo_id

    def response(self, status: int) -> Any:
        request = SimpleNamespace(url="https://hub.invalid", method="GET", headers={})
        return SimpleNamespace(
            status_code=status, headers={}, request=request, text="", json=dict, content=b""
        )

    def hf_hub_download(
        self, repo_id: str, filename: str, *, subfolder: str | None = None, **options: Any
    ) -> str:
        name = f"{subfolder}/{filename}" if subfolder else filename
        self.downloads.append({"repo_id": repo_id, "name": name, **options})
        if name in self.broken:
            raise self.broken[name]
        if repo_id.count("/") != 1 or repo_id.startswith("/"):
            raise huggingface_hub.errors.HFValidationError(f"bad id {repo_id!r}")
        source = self.folder(repo_id) / name
        if source.exists():
            place = self.cache / repo_id.replace("/", "--") / "snapshots" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(source)
            return str(place)
        if not self.online or options.get("local_files_only"):
            raise LocalEntryNotFoundError(f"{name} is not in the cache")
        if not self.folder(repo_id).exists():
            raise RepositoryNotFoundError("no such repository", response=self.response(404))
        raise RemoteEntryNotFoundError("no such file", response=self.response(404))

    def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
        return (self.folder(repo_id) / filename).exists()

    # transformers' client: what push_to_hub calls

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        self.folder(repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, *, repo_id: str, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            place = self.folder(repo_id) / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, place)

    def names(self, repo_id: str = REPO) -> set[str]:
        """Files of a repository but for its card."""
        root = self.folder(repo_id)
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        return {name for name in found if not name.endswith("README.md")}


def _new_card(*_: Any, **__: Any) -> ModelCard:
    return ModelCard("A new repository.")


@pytest.fixture(params=["online", "offline"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Replace every function of the hub's client that PEFT and moelora use."""
    fake = Hub(tmp_path, online=request.param == "online")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not fake.online)
    for name in ("hf_hub_download", "file_exists"):
        real = getattr(huggingface_hub, name)
        for module in list(sys.modules.values()):
            # wherever it was imported to; none may reach the network.
            if vars(module).get(name) is real:
                # with its signature: PEFT sorts keyword arguments by it.
                monkeypatch.setattr(module, name, _signed(getattr(fake, name), real))
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: fake)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", _new_card)
    monkeypatch.chdir(tmp_path)
    return fake


def _signed(function: Any, real: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    called.__wrapped__ = real  # type: ignore[attr-defined]
    return called


def publish(hub: Hub, model: PeftModel, repo_id: str = REPO) -> None:
    """Put a model's files on the fake hub without ``push_to_hub``."""
    model.save_pretrained(hub.folder(repo_id))


# Pushing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_pushing_a_mixture_uploads_its_three_files(scope: str, hub: Hub) -> None:
    mixture(router_scope=scope).push_to_hub(REPO)
    assert hub.names() == {CONFIG, ADAPTER, ROUTER}


def test_pushing_an_attached_router_uploads_it_at_the_root(hub: Hub) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2), AUTOMATIC)
    model.push_to_hub(REPO)
    assert hub.names() == {
        ROUTER,
        *(f"{name}/{file}" for name in ("first", "second") for file in (CONFIG, ADAPTER)),
    }


def test_pushing_again_replaces_the_router(hub: Hub) -> None:
    mixture().push_to_hub(REPO)
    second = mixture()
    perturb(second, seed=7)
    second.push_to_hub(REPO)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert_equal(loaded(token_ids()).logits, second.eval()(token_ids()).logits)


def test_what_was_pushed_loads_to_the_same_logits(hub: Hub) -> None:
    model = mixture(router_type="learned_with_maturity").eval()
    model.push_to_hub(REPO)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


# Mixtures --------------------------------------------------------------------------------------


def test_a_repository_of_two_files_loads(hub: Hub) -> None:
    model = mixture().eval()
    publish(hub, model)
    (hub.folder(REPO) / ROUTER).unlink()
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_the_config_of_a_hub_id_is_ours(hub: Hub) -> None:
    publish(hub, mixture(top_k_experts=1))
    config = PeftConfig.from_pretrained(REPO)
    assert isinstance(config, MoELoraConfig)
    assert config.top_k_experts == 1


def test_load_adapter_takes_a_hub_id(hub: Hub) -> None:
    model = mixture().eval()
    publish(hub, model)
    other = mixture(num_experts=2, top_k_experts=1)
    other.load_adapter(REPO, "loaded")
    other.set_adapter("loaded")
    assert_equal(other.eval()(token_ids()).logits, model(token_ids()).logits)


@ONLINE
@pytest.mark.parametrize("name", ["skill", "weight"])
def test_a_subfolder_of_a_repository_is_taken(name: str, hub: Hub) -> None:
    model = mixture(name=name).eval()
    publish(hub, model)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO, adapter_name=name, subfolder=name)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("option", [{"revision": "old"}, {"token": "secret"}])
def test_every_file_is_asked_for_alike(option: dict[str, str], hub: Hub) -> None:
    publish(hub, mixture())
    PeftModel.from_pretrained(tiny_llama(), REPO, **option)
    asked = {call["name"] for call in hub.downloads}
    (key, value) = next(iter(option.items()))
    assert {CONFIG, ADAPTER, ROUTER} <= asked
    assert {call.get(key) for call in hub.downloads} == {value}


def refused(hub: Hub, match: str, **options: Any) -> None:
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=match):
        PeftModel.from_pretrained(base, REPO, **options)
    assert_same_snapshot(snapshot(base), before)


def test_a_router_of_another_mixture_is_refused(hub: Hub) -> None:
    publish(hub, mixture())
    other = mixture()
    perturb(other, seed=8)
    other.save_pretrained(hub.root / "other")
    shutil.copy(hub.root / "other" / ROUTER, hub.folder(REPO) / ROUTER)
    refused(hub, "differs")


def test_a_damaged_router_is_refused(hub: Hub) -> None:
    publish(hub, mixture())
    truncate(hub.folder(REPO) / ROUTER)
    refused(hub, r"router\.safetensors")


def test_a_damaged_adapter_is_refused(hub: Hub) -> None:
    publish(hub, mixture())
    truncate(hub.folder(REPO) / ADAPTER)
    refused(hub, r"adapter_model\.safetensors")


def test_a_newer_router_is_refused(hub: Hub) -> None:
    publish(hub, mixture())
    edit_header(hub.folder(REPO) / ROUTER, moelora_format="2")
    refused(hub, "Upgrade")


def test_a_mixture_in_pickle_is_refused(hub: Hub) -> None:
    publish(hub, mixture())
    (hub.folder(REPO) / ADAPTER).unlink()
    torch.save({}, hub.folder(REPO) / "adapter_model.bin")
    refused(hub, "safetensors only")


def test_an_unknown_repository_gets_pefts_own_error(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(tiny_llama(), "someone/nothing")


# Plain adapters and attached routers -----------------------------------------------------------


def test_a_plain_adapter_loads_without_a_router(hub: Hub) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    perturb(model)
    publish(hub, model)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert loaded.router is None
    assert_equal(loaded(token_ids()).logits, model.eval()(token_ids()).logits)


@ONLINE
def test_an_attached_router_at_the_root_comes_with_a_subfolder(hub: Hub) -> None:
    model = two_loras().eval()
    model.attach_router(Router(16, 2, top_k=1), AUTOMATIC)
    publish(hub, model)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO, adapter_name="first", subfolder="first")
    loaded.load_adapter(REPO, "second", subfolder="second")
    loaded.base_model.set_adapter(["first", "second"])
    assert_equal(loaded.eval()(token_ids()).logits, model(token_ids()).logits)


def test_an_attached_router_over_the_default_adapter_comes_with_it(hub: Hub) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    model.attach_router(Router(16, 1, top_k=1), mixture_config())
    publish(hub, model)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert_equal(loaded.router.weight, model.router.weight)


@ONLINE
def test_a_router_of_unknown_class_loads_into_the_given_module(hub: Hub) -> None:
    model = two_loras()
    model.attach_router(Linear(), AUTOMATIC)
    publish(hub, model)
    router = Linear()
    PeftModel.from_pretrained(tiny_llama(), REPO, subfolder="first", router=router)
    assert_equal(list(router.parameters()), list(model.router.parameters()))


@ONLINE
def test_a_damaged_attached_router_is_refused(hub: Hub) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2))
    publish(hub, model)
    truncate(hub.folder(REPO) / ROUTER)
    refused(hub, r"router\.safetensors", subfolder="first")


@ONLINE
@pytest.mark.parametrize("kind", ["server", "connection", "timeout", "disk"])
def test_a_hub_that_fails_is_not_taken_for_a_missing_router(kind: str, hub: Hub) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2))
    publish(hub, model)
    hub.broken[ROUTER] = {
        "server": HfHubHTTPError("server error", response=hub.response(500)),
        "connection": ConnectionError("connection reset"),
        "timeout": TimeoutError("timed out"),
        "disk": OSError("disk full"),
    }[kind]
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises((OSError, CheckpointError), match=str(hub.broken[ROUTER])):
        PeftModel.from_pretrained(base, REPO, adapter_name="first", subfolder="first")
    assert_same_snapshot(snapshot(base), before)


def test_a_local_folder_comes_before_a_repository(hub: Hub) -> None:
    publish(hub, mixture())
    local = mixture()
    perturb(local, seed=5)
    local.save_pretrained(REPO)
    loaded = PeftModel.from_pretrained(tiny_llama(), REPO)
    assert not hub.downloads
    assert_equal(loaded(token_ids()).logits, local.eval()(token_ids()).logits)
