"""An attached router on disk: beside its adapters' folders, restored with any one of them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moelora import CheckpointError, MoELoraConfig, Router, router_file
from tests.lm import (
    assert_same_snapshot,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    run_python,
    snapshot,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.test_attached import AUTOMATIC, Linear
from tests.test_checkpoint import ADAPTER, ROUTER
from tests.test_checkpoint_damage import (
    a_directory,
    edit_header,
    edit_tensors,
    garbage,
    truncate,
    zero_bytes,
)
from tests.tolerances import assert_equal


def routed(router: nn.Module | None = None, config: MoELoraConfig | None = AUTOMATIC) -> PeftModel:
    """Two plain adapters with a router over both."""
    model = two_loras().eval()
    model.attach_router(Router(16, 2, top_k=1).double() if router is None else router, config)
    return model


def both(folder: Path, **kwargs: Any) -> PeftModel:
    """Load one adapter's folder as a user does, then the other, and activate both."""
    model = PeftModel.from_pretrained(
        tiny_llama(), folder / "first", adapter_name="first", **kwargs
    )
    model.load_adapter(folder / "second", "second")
    model.base_model.set_adapter(["first", "second"])
    return model.eval()


def tensors_of(router: nn.Module | None) -> dict[str, Tensor]:
    assert router is not None
    return {name: tensor.clone() for name, tensor in router.state_dict().items()}


def assert_same_router(actual: nn.Module | None, expected: nn.Module | None) -> None:
    found, wanted = tensors_of(actual), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert_equal(list(found.values()), list(wanted.values()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of two adapters under one router of ours."""
    routed().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The folder of two adapters under one router of the user's own class."""
    routed(Linear()).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


# Where and what --------------------------------------------------------------------------------


def test_the_router_lies_once_beside_the_folders_of_its_adapters(saved: Path) -> None:
    assert sorted(str(path.relative_to(saved)) for path in saved.rglob("*.safetensors")) == [
        f"first/{ADAPTER}",
        ROUTER,
        f"second/{ADAPTER}",
    ]


def test_the_file_holds_the_routers_keys_without_prefix(foreign: Path) -> None:
    assert set(load_file(foreign / ROUTER)) == {"map.weight", "map.bias"}


def test_no_adapters_file_holds_the_router(foreign: Path) -> None:
    for name in ("first", "second"):
        keys = load_file(foreign / name / ADAPTER)
        assert keys
        assert all(".lora_" in key for key in keys)


@pytest.mark.parametrize("order", [["first", "second"], ["second", "first"]])
def test_the_header_names_version_class_and_experts_in_order(
    order: list[str], tmp_path: Path
) -> None:
    model = routed()
    model.base_model.set_adapter(order)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / ROUTER, framework="pt") as file:
        header = file.metadata()
    assert header["moelora_format"] == "1"
    assert header["kind"] == "attached"
    assert json.loads(header["experts"]) == order
    assert header["router_class"].endswith("Router")


def test_a_router_over_the_default_adapter_lies_beside_its_files(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    model.attach_router(Router(16, 1, top_k=1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_same_router(loaded.router, model.router)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_file_keeps_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    routed(Router(16, 2).to(dtype)).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / ROUTER).values()} == {dtype}


def test_a_router_without_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    routed(nn.Identity(), None).save_pretrained(tmp_path)
    assert isinstance(both(tmp_path, router=nn.Identity()).router, nn.Identity)


def test_tied_parameters_are_saved_and_loaded(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        one = nn.Linear(16, 16, bias=False)
        return nn.Sequential(one, one, nn.Linear(16, 2)).double()

    model = routed(tied())
    model.save_pretrained(tmp_path)
    assert_same_router(both(tmp_path, router=tied()).router, model.router)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    routed().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_dict_that_is_handed_in_is_what_is_saved(tmp_path: Path) -> None:
    model = routed(Linear())
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    expected = gathered["base_model.router.map.weight"]
    assert_equal(load_file(tmp_path / ROUTER)["map.weight"], expected)


def test_a_router_without_values_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = routed(Linear())
    model.router.to("meta")
    with pytest.raises(CheckpointError, match="meta"):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.rglob("*.safetensors"))


# Restored --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"hidden_size": 5}, {"track_maturity": True}, {"temperature": 0.25}],
)
def test_our_router_comes_back_by_itself(options: dict[str, Any], tmp_path: Path) -> None:
    router = Router(16, 2, **options)
    model = routed(router)
    model.save_pretrained(tmp_path)
    loaded = both(tmp_path)
    assert_same_router(loaded.router, router)
    assert loaded.router.config() == router.config()
    assert loaded.moe_config == AUTOMATIC
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_router_in_double_comes_back_in_double(saved: Path) -> None:
    loaded = both(saved)
    assert {p.dtype for p in loaded.router.parameters()} == {torch.float64}


def test_maturity_comes_back(tmp_path: Path) -> None:
    router = Router(16, 2, track_maturity=True)
    router.mature[1] = False
    routed(router).save_pretrained(tmp_path)
    assert both(tmp_path).router.mature.tolist() == [True, False]


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_folder_of_either_adapter_brings_the_router(name: str, saved: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), saved / name, adapter_name=name)
    assert isinstance(loaded.router, Router)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_subfolder_brings_the_router(name: str, saved: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), saved, adapter_name=name, subfolder=name)
    assert isinstance(loaded.router, Router)


def test_the_working_folder_brings_the_router(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved / "first")
    loaded = PeftModel.from_pretrained(tiny_llama(), ".", adapter_name="first")
    assert isinstance(loaded.router, Router)


def test_without_config_a_router_comes_back_without(tmp_path: Path) -> None:
    model = routed(config=None)
    model.save_pretrained(tmp_path)
    loaded = both(tmp_path)
    assert loaded.moe_config is None
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_every_field_of_the_config_comes_back(tmp_path: Path) -> None:
    config = mixture_config(num_experts=2, top_k_experts=1, router_temperature=0.3, r=7)
    routed(config=config).save_pretrained(tmp_path)
    assert both(tmp_path).moe_config == config


def test_a_router_restored_in_eval_is_in_eval(saved: Path) -> None:
    assert not both(saved).router.training


@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable_decides_over_the_router_too(is_trainable: bool, saved: Path) -> None:
    loaded = PeftModel.from_pretrained(
        tiny_llama(), saved / "first", adapter_name="first", is_trainable=is_trainable
    )
    assert {p.requires_grad for p in loaded.router.parameters()} == {is_trainable}


def test_a_router_of_unknown_class_waits_for_attach_router(foreign: Path) -> None:
    with pytest.warns(UserWarning, match=r"test_attached\.Linear"):
        loaded = both(foreign)
    assert loaded.router is None
    router = Linear()
    loaded.attach_router(router)
    saved = load_file(foreign / ROUTER)
    assert_equal(router.map.weight.detach(), saved["map.weight"])
    assert_equal(router.map.bias.detach(), saved["map.bias"])


def test_a_router_that_waits_is_not_lost_in_silence_by_saving(
    foreign: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="router"):
        loaded = both(foreign)
    try:
        with pytest.warns(UserWarning, match="router"):
            loaded.save_pretrained(tmp_path / "again")
    except (CheckpointError, pytest.fail.Exception):
        # refused, or written as it was, without a word
        pass
    again = tmp_path / "again" / ROUTER
    assert not (tmp_path / "again" / "first").exists() or again.exists()


def test_a_router_of_unknown_class_loads_into_the_given_module(foreign: Path) -> None:
    router = Linear()
    loaded = both(foreign, router=router)
    assert loaded.router is router
    assert loaded.moe_config == AUTOMATIC
    assert_equal(router.map.weight.detach(), load_file(foreign / ROUTER)["map.weight"])


def test_nothing_of_an_unknown_class_is_imported(foreign: Path, tmp_path: Path) -> None:
    edit_header(foreign / ROUTER, router_class="antigravity.Evil")
    with pytest.warns(UserWarning, match=r"antigravity\.Evil"):
        both(foreign)
    import sys

    assert "antigravity" not in sys.modules


def test_a_given_router_without_a_file_is_refused(tmp_path: Path) -> None:
    two_loras().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="router="):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", router=Linear())


def test_adapters_from_before_load_without_a_router(tmp_path: Path) -> None:
    two_loras().save_pretrained(tmp_path)
    assert both(tmp_path).router is None


def test_the_router_of_other_adapters_one_level_up_is_not_taken(saved: Path) -> None:
    other = get_peft_model(tiny_llama(), lora_config())
    other.save_pretrained(saved / "checkpoint-10")
    loaded = PeftModel.from_pretrained(tiny_llama(), saved / "checkpoint-10")
    assert loaded.router is None


def test_another_librarys_file_one_level_up_is_left_alone(saved: Path) -> None:
    save_file({"weight": torch.zeros(2)}, saved / ROUTER)
    assert both(saved).router is None


_RELOAD = """
import sys, torch, moelora
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained(folder / "base")
model = PeftModel.from_pretrained(base, folder / "adapters" / "first", adapter_name="first")
model.load_adapter(folder / "adapters" / "second", "second")
model.base_model.set_adapter(["first", "second"])
torch.save(model.eval()(torch.load(folder / "ids.pt")).logits, folder / "logits.pt")
"""


@pytest.mark.slow
def test_logits_are_equal_to_the_bit_in_a_new_process(tmp_path: Path) -> None:
    base = tiny_llama(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = two_loras(base).eval()
    model.attach_router(Router(16, 2, top_k=1), AUTOMATIC)
    model.save_pretrained(tmp_path / "adapters")
    torch.save(token_ids(), tmp_path / "ids.pt")
    done = run_python(_RELOAD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(tmp_path / "logits.pt"), model(token_ids()).logits)


# Saving over another router --------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_saving_again_replaces_the_router(saved: Path) -> None:
    model = routed(Linear())
    model.save_pretrained(saved)
    assert_equal(load_file(saved / ROUTER)["map.weight"], model.router.map.weight.detach())


def test_adapters_without_a_router_are_not_saved_under_a_stale_one(saved: Path) -> None:
    before = contents(saved)
    try:
        two_loras().save_pretrained(saved)
    except CheckpointError:
        assert contents(saved) == before
    else:
        assert not (saved / ROUTER).exists()


def test_a_mixture_and_a_router_over_it_have_one_place_only(tmp_path: Path) -> None:
    model = mixture()
    model.attach_router(Linear(3))
    with pytest.raises(CheckpointError, match="(?i)attached router"):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_mixture_of_another_name_leaves_the_place_to_the_router(tmp_path: Path) -> None:
    model = mixture(name="skill").eval()
    model.attach_router(Router(16, 3), mixture_config())
    model.save_pretrained(tmp_path)
    assert (tmp_path / ROUTER).exists()
    assert (tmp_path / "skill" / ROUTER).exists()


def test_a_router_over_a_mixture_comes_back_with_it(tmp_path: Path) -> None:
    model = mixture(name="skill").eval()
    model.attach_router(Router(16, 3), mixture_config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "skill", adapter_name="skill")
    assert_same_router(loaded.router, model.router)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_an_attached_router_does_not_replace_a_mixtures(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="mixture"):
        routed().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_save_that_breaks_off_leaves_the_former_router(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / ROUTER).read_bytes()

    def half(tensors: dict[str, Tensor], path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(router_file, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        routed().save_pretrained(saved)
    monkeypatch.undo()
    assert (saved / ROUTER).read_bytes() == before
    assert not [path for path in saved.rglob("*") if "tmp" in path.name]
    assert isinstance(both(saved).router, Router)


def test_a_save_that_breaks_off_at_the_second_adapter_leaves_all_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = contents(saved), peft_model.safe_save_file, []

    def second_fails(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        real(*args, **kwargs)

    monkeypatch.setattr(peft_model, "safe_save_file", second_fails)
    model = routed(Linear())
    perturb(model, seed=9)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    assert contents(saved) == before


def test_a_plain_adapter_is_saved_beside_another_librarys_file(tmp_path: Path) -> None:
    path = tmp_path / ROUTER
    save_file({"weight": torch.zeros(2)}, path)
    before = path.read_bytes()
    get_peft_model(tiny_llama(), lora_config()).save_pretrained(tmp_path)
    assert (tmp_path / ADAPTER).exists()
    assert path.read_bytes() == before


# Refused files ---------------------------------------------------------------------------------


def with_config(**values: Any) -> Callable[[Path], None]:
    """Edit what the header says of the router's arguments."""

    def edit(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["router_config"])
        edit_header(path, router_config=json.dumps({**config, **values}))

    return edit


def with_moe_config(**values: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["moe_config"])
        edit_header(path, moe_config=json.dumps({**config, **values}))

    return edit


def renamed_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["other"] = tensors.pop("weight")


def resaved(**change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Write the file anew with changed tensors and a right digest."""

    def edit(path: Path) -> None:
        file = router_file.read_router_file(path)
        tensors = {k: change.get(k, lambda t: t)(t) for k, t in file.tensors.items()}
        keep = {k: v for k, v in file.metadata.items() if k in ("router_config", "router_class")}
        router_file.write_router_file(
            path.parent, tensors, kind="attached", experts=["first", "second"], extra=keep
        )

    return edit


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "empty": zero_bytes,
    "garbage": garbage,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"weight": [1.0]})),
    "a torch pickle": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "a directory": a_directory,
    "newer format": lambda path: edit_header(path, moelora_format="2"),
    "huge format": lambda path: edit_header(path, moelora_format="9" * 40),
    "no version number": lambda path: edit_header(path, moelora_format="one"),
    "wrong digest": lambda path: edit_header(path, sha256="0" * 64),
    "renamed tensor": lambda path: edit_tensors(path, renamed_tensor),
    "NaN": resaved(weight=lambda t: t * float("nan")),
    "infinity": resaved(weight=lambda t: t / 0.0),
    "more experts": resaved(weight=lambda t: torch.cat([t, t])),
    "another width": resaved(weight=lambda t: t[:, :5]),
    "integers": resaved(weight=lambda t: t.long()),
    "one axis": resaved(weight=lambda t: t[0]),
    "config no json": lambda path: edit_header(path, router_config="{"),
    "config a list": lambda path: edit_header(path, router_config="[1, 2]"),
    "config null": lambda path: edit_header(path, router_config="null"),
    "config too deep": lambda path: edit_header(path, router_config="[" * 200_000),
    "unknown argument": with_config(run="os.system"),
    "no experts": with_config(num_experts=0),
    "experts as text": with_config(num_experts="2"),
    "half an expert": with_config(num_experts=2.5),
    "too many per token": with_config(top_k=3),
    "half per token": with_config(top_k=1.5),
    "cold": with_config(temperature=0),
    "endless temperature": with_config(temperature=float("inf")),
    "huge width": with_config(input_size=10**15),
    "huge hidden width": with_config(hidden_size=10**15),
    "beyond 64 bits": with_config(input_size=10**30),
    "moe_config no json": lambda path: edit_header(path, moe_config="{"),
    "moe_config a list": lambda path: edit_header(path, moe_config="[]"),
    "moe_config of plain LoRA": with_moe_config(peft_type="LORA"),
    "moe_config without experts": with_moe_config(num_experts=0),
    "moe_config of unknown router": with_moe_config(router_type="oracle"),
    "moe_config of newer format": with_moe_config(moelora_format=99),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_its_name_and_the_base_is_as_before(
    damage: str, saved: Path
) -> None:
    DAMAGE[damage](saved / ROUTER)
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=r"router\.safetensors"):
        PeftModel.from_pretrained(base, saved / "first", adapter_name="first")
    assert_same_snapshot(snapshot(base), before)


@pytest.mark.parametrize("damage", ["truncated", "wrong digest", "NaN", "newer format"])
def test_a_damaged_file_is_not_replaced_by_a_given_router(damage: str, saved: Path) -> None:
    DAMAGE[damage](saved / ROUTER)
    router = Router(16, 2).double()
    before = copy.deepcopy(router)
    with pytest.raises(CheckpointError, match=r"router\.safetensors"):
        PeftModel.from_pretrained(tiny_llama(), saved / "first", router=router)
    assert_same_router(router, before)


def test_a_given_router_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    def deep(experts: int) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 4), nn.Linear(4, experts)).double()

    routed(deep(2)).save_pretrained(tmp_path)
    router = deep(3)
    before = copy.deepcopy(router)
    base = tiny_llama()
    state = snapshot(base)
    with pytest.raises(CheckpointError, match=r"router\.safetensors"):
        PeftModel.from_pretrained(base, tmp_path / "first", router=router)
    assert_same_router(router, before)
    assert_same_snapshot(snapshot(base), state)


@pytest.mark.parametrize("router", [3, "router", {}, Router])
def test_a_given_router_that_is_no_module_is_refused(router: Any, saved: Path) -> None:
    base = tiny_llama()
    state = snapshot(base)
    with pytest.raises(TypeError, match="router"):
        PeftModel.from_pretrained(base, saved / "first", router=router)
    assert_same_snapshot(snapshot(base), state)


def test_a_pickle_beside_it_is_never_opened(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("executed",))

    (saved / "router.bin").write_bytes(pickle.dumps(Evil()))
    shutil.copy(saved / "router.bin", saved / "router.pt")
    (saved / ROUTER).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="safetensors"):
        PeftModel.from_pretrained(tiny_llama(), saved / "first")
