"""`moelora run`: arguments and exit codes; lm-eval judges a mixture through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.cli import main
from tests.generation.words import word_tokenizer
from tests.lm import mixture, tiny_llama
from tests.tolerances import assert_equal

ECHO = "import sys\nprint(sys.argv[1:], 'moelora' in sys.modules)\nsys.exit(7)\n"
ROOT = Path(__file__).resolve().parents[2]


def moelora_run(
    *arguments: object, folder: Path, flags: tuple[str, ...] = ("-m", "moelora", "run")
) -> subprocess.CompletedProcess[str]:
    """The command as a person types it, in ``folder``."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *flags, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env={**_environment(), "HF_HOME": str(folder / "hf")},
        check=False,
    )


def _environment() -> dict[str, str]:
    import os

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--", "x"], ["-h", "--json", "--", "--"], ["run", "--", "-m"]]
)
@pytest.mark.parametrize("before", [[], ["--"]])
def test_all_that_follows_the_module_is_handed_on(
    before: list[str],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(ECHO)
    assert main(["run", *before, "echo", *arguments]) == 7
    assert capsys.readouterr().out == f"{arguments} True\n"


def test_help_before_a_module_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    assert "MODULE [ARGUMENT ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the module to run"),
        (["--"], "Name the module to run"),
        (["no_such_program", "--help"], "Cannot run 'no_such_program'"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moelora run: error: {message}")


def test_an_error_of_ours_in_the_program_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import moelora; moelora.MoELoraConfig(num_experts=0)")
    assert main(["run", "broken"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "num_experts must be" in told


def test_an_interruption_is_the_programs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    assert main(["run", "interrupted"]) == 130


# transformers serve ------------------------------------------------------------------------------


def test_the_models_of_transformers_serve_are_mixtures_where_the_files_lie_beside_the_base(
    tmp_path: Path,
) -> None:
    # all of the server but the web; it takes whole models, which may hold an adapter
    from transformers.cli.serving.model_manager import ModelManager

    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = mixture(tiny_llama(dtype=torch.float32)).eval()
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    manager = ModelManager(device="cpu", force_model=str(tmp_path))
    try:
        served, tokenizer = manager.load_model_and_processor(f"{tmp_path}@main")
        ids = tokenizer("w3 w5", return_tensors="pt")["input_ids"]
        found = served.generate(input_ids=ids, **options)
    finally:
        manager.shutdown()
    assert_equal(found, model.generate(input_ids=ids, **options))
    with model.disable_adapter():
        assert not torch.equal(found, model.generate(input_ids=ids, **options))


# lm-eval ---------------------------------------------------------------------------------------

TASK = """\
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
EXAMPLES = [
    {"prompt": f"w{n} w{n + 7} w{n + 3}", "choices": [f"w{n + 1}", "w20 w5", "w60"], "answer": 0}
    for n in range(1, 7)
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[float]]]:
    """What lm-eval writes of a mixture, and the log-likelihoods that it should have found."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w60"
    tokenizer.save_pretrained(folder / "base")
    base = tiny_llama(dtype=torch.float32)
    base.save_pretrained(folder / "base")
    model = mixture(base).eval()
    model.save_pretrained(folder / "mixture")
    (folder / "tasks").mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    (folder / "tasks" / "next_word.yaml").write_text(TASK % data)
    done = moelora_run(
        "lm_eval",
        *("--model", "hf", "--tasks", "next_word", "--include_path", "tasks"),
        *("--model_args", f"pretrained={folder / 'base'},peft={folder / 'mixture'},dtype=float32"),
        *("--device", "cpu", "--batch_size", "2", "--output_path", "out", "--log_samples"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["next_word"]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    likelihoods = [[float(r[0][0]) for r in line["resps"]] for line in lines]
    expected = [_likelihoods(model, tokenizer, line["doc"]) for line in lines]
    return {"accuracy": found["acc,none"], "likelihoods": likelihoods}, expected


def _likelihoods(model: Any, tokenizer: Any, example: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice after the prompt."""
    found = []
    for choice in example["choices"]:
        prompt, target = tokenizer(example["prompt"])["input_ids"], tokenizer(choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
        found.append(picked.sum().item())
    return found


@pytest.mark.slow
def test_lm_eval_finds_the_likelihoods_of_the_mixture(judged: Any) -> None:
    found, expected = judged
    assert len(expected) == len(EXAMPLES)
    for ours, theirs in zip(expected, found["likelihoods"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


@pytest.mark.slow
def test_lm_eval_reports_the_accuracy_that_follows(judged: Any) -> None:
    found, expected = judged
    best = [likelihoods.index(max(likelihoods)) for likelihoods in expected]
    right = [choice == example["answer"] for choice, example in zip(best, EXAMPLES, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
