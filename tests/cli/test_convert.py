"""`moelora convert` as a person runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moelora.cli import main
from tests.validation.old_checkpoints import old_model, save_old


@pytest.fixture(scope="module")
def model() -> Any:
    return old_model(2)


def test_a_conversion_is_told_in_one_line_and_its_notes(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = save_old(tmp_path / "old", model, config={"base_model_name_or_path": "some/base"})
    assert main(["convert", str(old), "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr()
    assert told.out == (
        f"{tmp_path / 'new'}: 2 experts, router converted, skills 2, base model some/base.\n"
    )
    assert told.err.count("note: ") == len(told.err.splitlines()) == 2
    assert (tmp_path / "new" / "expert_1" / "adapter_model.safetensors").is_file()


def test_json_is_all_that_is_printed(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = save_old(tmp_path / "old", model, layout="pt", router=None, skills=None)
    (old / "config.json").unlink()
    arguments = ["convert", str(old), "--out", str(tmp_path / "new"), "--json"]
    assert main([*arguments, "--lora-alpha", "16", "--base", "a/base"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    content = json.loads(told.out)
    assert content["experts"] == ["expert_0", "expert_1"]
    assert (content["router"], content["skills"], content["base_model"]) == ("none", None, "a/base")
    config = json.loads((tmp_path / "new" / "expert_0" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 16


def test_a_mistake_is_told_in_one_line_and_exit_code_2(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = save_old(tmp_path / "old", model)
    (old / "router.safetensors").write_bytes(b"no")
    cases = {
        (str(tmp_path / "absent"), str(tmp_path / "new")): "is not a folder",
        (str(old), str(old)): "exists and is not empty",
        (str(old), str(tmp_path / "new")): "router.safetensors cannot be read as safetensors",
    }
    for (source, out), message in cases.items():
        assert main(["convert", source, "--out", out]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert re.fullmatch(r"moelora convert: error: [^\n]+\n", told.err)
        assert message in told.err
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["convert", str(old)])
    assert "the following arguments are required: --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
