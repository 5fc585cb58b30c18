"""`moelora validate` as a person runs it: reports, exit codes, one line for a mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.cli import main, validate
from moelora.validation.agreement import Agreement
from tests.demo.tiny import tiny_tokenizer
from tests.validation.checkpoints import KINDS, save
from tests.validation.made_up import report
from tests.validation.tiny import save_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUICK = ["--experts", "", "--batches", "2", "--seq", "6"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", ["mixture", "adapters with a router", "old"])
def test_a_checkpoint_is_validated_and_measured(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save(kind, tmp_path / "saved"), tmp_path / "out"
    arguments = ["validate", str(folder), "--base", str(base), "--out", str(out)]
    numbers = ["--experts", "3,4", "--repeats", "1", "--seq", "6", "--batches", "2"]
    assert main([*arguments, *numbers]) == 0
    told = capsys.readouterr()
    assert re.match(r"All \d comparisons that must agree do", told.out)
    assert "DIFFERS" not in told.out
    assert "copies of them were measured" in told.err
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    content = json.loads((out / "report.json").read_text())
    assert content["agrees"] is True
    assert [speed["experts"] for speed in content["speed"]] == [3, 4]
    assert [way["way"] for way in content["speed"][0]["ways"]] == [
        "base",
        "lora",
        "n_plus_1",
        "two_passes",
        "attached",
        "one_pass",
    ]
    assert len(content["usage"]["over_time"]) == 2
    assert content["checkpoint"]["number of experts"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_json_of_every_kind_is_all_that_is_printed(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(kind, tmp_path / "saved")
    arguments = ["validate", str(folder), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*arguments, *QUICK, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["agrees"] is True
    routed = not any(word in kind for word in ("without", "alone", "fixed"))
    assert (content["usage"] is not None) == routed


def test_a_disagreement_is_exit_code_1_and_stands_in_the_report(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    original = Agreement._one_pass_logits

    def wrong(self: Agreement, *args: Any) -> torch.Tensor:
        return 1.01 * original(self, *args)

    monkeypatch.setattr(Agreement, "_one_pass_logits", wrong)
    folder = save("mixture", tmp_path / "saved")
    arguments = ["validate", str(folder), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*arguments, *QUICK]) == 1
    assert capsys.readouterr().out.startswith("DISAGREEMENT: ")
    assert "class='verdict bad'" in (tmp_path / "out" / "report.html").read_text()
    # a difference of 1 % is agreement to one who says so
    assert main([*arguments, *QUICK, "--tolerance", "0.02"]) == 0


def test_text_is_read_with_the_base_models_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    folder = save("mixture", tmp_path / "saved")
    text = tmp_path / "text.txt"
    text.write_text("!\"#$%&'()*+", encoding="utf-8")
    arguments = ["validate", str(folder), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*arguments, *QUICK, "--text", str(text)]) == 2
    assert "--text needs the tokenizer of" in capsys.readouterr().err
    tiny_tokenizer().save_pretrained(base)
    assert main([*arguments, *QUICK, "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["input"] == "text text.txt"
    text.write_text("")
    assert main([*arguments, *QUICK, "--text", str(text)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main([*arguments, *QUICK, "--text", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_mistake_is_told_in_one_line_and_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("mixture", tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    bad = {
        "is not a folder": [str(tmp_path / "absent")],
        "holds no adapter_config.json": [str(base)],
        "cannot be loaded": [str(folder), "--base", str(tmp_path / "nowhere")],
        "--device abacus is not available": [str(folder), "--device", "abacus"],
        "--experts must be numbers with commas": [str(folder), "--experts", "two"],
        "--dtype must be one of": [str(folder), "--dtype", "int4"],
        "--seq must be at least 2": [str(folder), "--seq", "1"],
        "files that no validation wrote": [str(folder), "--out", str(tmp_path / "mine")],
    }
    for message, arguments in bad.items():
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        assert main(["validate", *arguments, *out]) == 2, message
        told = capsys.readouterr()
        assert told.out == ""
        assert re.fullmatch(r"moelora validate: error: [^\n]+\n", told.err)
        assert message in told.err
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_no_report(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moelora.validation.job.to_html", stop)
    folder = save("mixture", tmp_path / "saved")
    arguments = ["validate", str(folder), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*arguments, *QUICK]) == 130
    assert capsys.readouterr().err.endswith("moelora validate: interrupted, nothing was written.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_what_is_printed_names_every_comparison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "_validate", lambda *_: report(agrees=False))
    assert main(["validate", "somewhere", "--out", "there"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert "DIFFERS   nan  plain" in told
    assert "reported  nan  a / b" in told
    assert told[-1] == f"Open {Path('there') / 'report.html'}"
