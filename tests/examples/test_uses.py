"""The examples for other architectures, generation and lm-eval, as a person runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.tiny import EXAMPLES, run_example, run_in_turn


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What three examples print, in one new process, since starting it costs the most."""
    names = ["architectures", "generation", "continual_learning"]
    told = run_in_turn(*[(EXAMPLES / f"{name}.py",) for name in names])
    return dict(zip(names, told, strict=True))


@pytest.mark.slow
def test_every_base_learns_and_reloads(printed: dict[str, str]) -> None:
    bases = printed["architectures"]
    found = re.findall(r"(.+): loss ([\d.]+) -> ([\d.]+); reloaded (.+)", bases)
    assert [name for name, *_ in found] == ["GPT-2", "T5", "ViT", "a plain nn.Module"]
    for _, before, after, reloaded in found:
        assert float(after) < float(before)
        assert reloaded == "bit-equal"


@pytest.mark.slow
def test_every_way_to_write_gives_what_no_cache_gives(printed: dict[str, str]) -> None:
    ways = printed["generation"]
    lines = [line for line in ways.splitlines() if "cache" in line]
    assert len(lines) == 5
    assert all(line.endswith("as without a cache") for line in lines), lines
    assert re.search(r"beams: \['w\d+", ways)


@pytest.mark.slow
def test_skills_are_learnt_in_sequence_and_the_one_that_returns_is_known(
    printed: dict[str, str],
) -> None:
    lines = printed["continual_learning"].splitlines()
    assert len(lines) == 11
    assert lines[5] == "from 14, again: known as 'from 14'"
    assert all("with its expert (as it was)" in line for line in lines[6:])


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that lm-eval's example made, and its samples."""
    pytest.importorskip("lm_eval")
    out = tmp_path_factory.mktemp("judged")
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    # a program that moelora runs, and that lets moelora run lm-eval
    launcher = ("-m", "moelora", "run")
    done = run_example(*launcher, EXAMPLES / "evaluate.py", "--out", out, **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|counting" in done.stdout
    (results,) = (out / "results").rglob("results_*.json")
    (samples,) = (out / "results").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    accuracy = json.loads(results.read_text())["results"]["counting"]["acc,none"]
    return out, {"accuracy": accuracy, "samples": lines}


def likelihoods(model: Any, tokenizer: Any, example: dict[str, Any]) -> list[float]:
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
def test_lm_eval_finds_the_likelihoods_and_the_accuracy_of_the_mixture(judged: Any) -> None:
    out, found = judged
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    model = PeftModel.from_pretrained(base, out / "mixture").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    right = []
    for sample in found["samples"]:
        expected = likelihoods(model, tokenizer, sample["doc"])
        assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx(expected, rel=1e-4)
        right.append(expected[0] > expected[1])
    assert len(right) == 10
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    # what it learnt; chance is a half
    assert found["accuracy"] > 0.6


@pytest.mark.parametrize("name", ["architectures.py", "generation.py", "evaluate.py"])
def test_the_example_fits_a_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
