"""``moelora report``: from a saved mixture and files to a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from moelora import MoELoraConfig, Router, RoutingReport
from moelora.cli import main
from moelora.cli.report import parse_numbers
from moelora.errors import ReportError
from moelora.report.loading import load_mixture
from tests.demo.tiny import tiny_llama, tiny_tokenizer
from tests.lm import lora_config, mixture, mixture_config, perturb, two_loras
from tests.report.tiny import tiny_t5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_tokenizer().save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "skills"
    mixture(_loaded(base)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "upper.txt").write_text("HELLO WORLD\n" * 30)
    (folder / "lower.jsonl").write_text('{"prompt": "hello", "text": "wörld"}\n' * 12)
    return folder


def run(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def test_a_saved_mixture_and_a_folder_of_text_make_a_report(
    saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(saved, "--data", data, "--out", out, "--max-length", 16, "--png") == 0
    shown = capsys.readouterr()
    assert "load in %" in shown.out
    assert "routing" in shown.err
    report = RoutingReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.model == "skills"
    assert [domain.name for domain in report.domains] == ["lower", "upper"]
    assert [domain.source for domain in report.domains] == ["lower.jsonl", "upper.txt"]
    assert (out / "report.html").is_file()
    assert (out / "overview.png").is_file()


def test_json_is_all_that_is_printed(
    saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.html"
    options = ["--layers", "1", "--max-tokens", 40, "--batch", 2, "--dtype", "float32"]
    assert run(saved, "--data", f"up={data / 'upper.txt'}", "--out", out, "--json", *options) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["domains"]["up"]["tokens"] == 40
    assert summary["routers"] == 3
    assert summary["files"] == [str(out)]
    assert sum(summary["load"].values()) == pytest.approx(1.0, abs=1e-5)


def test_fields_are_chosen_and_joined(saved: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fields = ["--field", "prompt", "--field", "text"]
    assert run(saved, "--data", data / "lower.jsonl", "--out", out, *fields) == 0
    report = RoutingReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert "".join(report.token_views[0].tokens["tokens"]) == "hello\nwörld"


def test_several_mixtures_are_active_together(
    saved: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    mixture(_loaded(base), num_experts=2).save_pretrained(other)
    out = tmp_path / "out"
    assert run(saved, other, "--data", data, "--out", out) == 0
    report = RoutingReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.model == "skills + other"
    assert report.experts == ["skills.0", "skills.1", "skills.2", "other.0", "other.1"]


def test_a_folder_of_adapters_brings_its_attached_router(
    base: Path, data: Path, tmp_path: Path
) -> None:
    model = two_loras(_loaded(base))
    model.base_model.set_adapter(["second", "first"])
    config = MoELoraConfig(num_experts=2, top_k_experts=1)
    model.attach_router(Router(32, 2, top_k=1), config)
    model.save_pretrained(tmp_path / "experts")
    out = tmp_path / "out"
    assert run(tmp_path / "experts", "--data", data, "--out", out) == 0
    report = RoutingReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.router_scope == "attached"
    assert report.experts == ["second", "first"]


def test_an_encoder_decoder_model_and_another_base_are_loaded(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "t5"
    tiny_tokenizer().save_pretrained(base)
    t5 = tiny_t5()
    t5.save_pretrained(base)
    model = mixture(t5, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model.save_pretrained(tmp_path / "m")
    out = tmp_path / "out"
    assert run(tmp_path / "m", "--base", base, "--data", data, "--out", out) == 0
    report = RoutingReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert {router.reads for router in report.routers} == {"encoder tokens", "decoder tokens"}


def test_without_a_task_the_base_says_what_it_is(base: Path, tmp_path: Path) -> None:
    mixture(_loaded(base), task_type=None).save_pretrained(tmp_path / "m")
    loaded = load_mixture([str(tmp_path / "m")])
    assert type(loaded.model.get_base_model()).__name__ == "LlamaForCausalLM"


def test_a_log_of_the_training_is_shown(saved: Path, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "expert_load": [1, 1, 2]}\n{"step": 2, "expert_load": [1, 1, 1]}')
    out = tmp_path / "out"
    assert run(saved, "--data", data, "--out", out, "--training-log", log) == 0
    assert "Load over the training" in (out / "report.html").read_text(encoding="utf-8")


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    saved: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("folder").mkdir()
    cases = [
        (["nowhere", "--data", data], "nowhere is neither a folder nor a hub id"),
        (["folder", "--data", data], "folder holds no adapter_config.json"),
        ([saved, "--data", "missing.txt"], "missing.txt does not exist"),
        ([saved, "--data", "empty.txt"], "Domain 'empty' holds no text"),
        ([saved, "--data", data, "--field", "body"], "the field 'body' is missing"),
        ([saved, "--data", data, "--layers", "x"], "--layers must be numbers and ranges"),
        ([saved, "--data", data, "--layers", "7"], "layers must be numbers of routed"),
        ([saved, "--data", data, "--device", "tpu9"], "--device tpu9 is not available"),
        ([saved, "--data", data, "--base", "no/where"], "The base model no/where cannot be"),
        ([saved, saved, "--data", data], "Adapters must have different names"),
        ([saved, "--data", data, "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        ([saved, "--data", data, "--max-length", "-4"], "--max-length must be at least 1"),
        ([saved, "--data", data, "--batch", "0"], "--batch must be at least 1"),
        ([saved, "--data", data, "--permutations", "0"], "--permutations must be at least 1"),
        ([saved, "--data", data, "--seed", "-1"], "--seed must be at least 0"),
        ([saved, "--data", data, "--training-log", "empty.txt"], "holds no loads"),
        ([saved, "--data", data, "--out", "empty.txt"], "must be a folder, or a file named"),
    ]
    for arguments, message in cases:
        out = [] if "--out" in arguments else ["--out", "out"]
        assert message in _error(capsys, *arguments, *out), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "folder"]


def test_an_adapter_without_routing_is_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get_peft_model(_loaded(base), lora_config()).save_pretrained(tmp_path / "plain")
    message = _error(capsys, tmp_path / "plain", "--data", data, "--out", tmp_path / "out")
    assert "None of the active adapters" in message


def test_a_damaged_router_is_an_error_and_no_random_one(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(_loaded(base), mixture_config())
    perturb(model)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "router.safetensors").write_bytes(b"x")
    assert "router.safetensors" in _error(
        capsys, tmp_path / "m", "--data", data, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "1,,2", "-1", "1.5", "٣", "99999"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ReportError, match="numbers and ranges"):
        parse_numbers(text)
