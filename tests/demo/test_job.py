"""A complete run on a tiny model: what it writes, and that its numbers can be had again."""

import math
from pathlib import Path

import pytest
import torch

from moelora._peft import PeftModel
from moelora.demo.batches import encode
from moelora.demo.errors import DemoError
from moelora.demo.model import load_base
from moelora.demo.options import DemoOptions
from moelora.demo.reload import reload_in_new_process
from moelora.demo.results import DemoResults, read_results
from moelora.demo.skills import Example, read_skills
from moelora.demo.task import build_task
from moelora.demo.train import completion_loss
from moelora.report.names import spell_tokens
from tests.demo.tiny import tiny_tokenizer

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow

Run = tuple[Path, DemoResults]


def test_the_folder_holds_the_adapter_the_report_and_the_results(finished_run: Run) -> None:
    out, results = finished_run
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "report.html",
        "report.png",
        "results.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert read_results(out) == results
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (out / "adapter").iterdir()
    }


def test_every_contender_has_a_loss_for_every_skill(finished_run: Run) -> None:
    results = finished_run[1]
    assert [each.key for each in results.contenders] == ["base", "lora", "lora_total", "mixture"]
    for contender in results.contenders:
        assert list(contender.losses) == ["backward", "upper"]
        assert all(math.isfinite(loss) for loss in contender.losses.values())
    lora, total = results.contender("lora"), results.contender("lora_total")
    assert total.parameters == 2 * lora.parameters
    assert results.contender("mixture").parameters > total.parameters
    assert all(
        each.mean_loss < results.contender("base").mean_loss for each in results.contenders[1:]
    )


def test_the_saved_adapter_gives_the_reported_losses(
    finished_run: Run, tiny_model: Path, toy_skills: Path
) -> None:
    out, results = finished_run
    base = load_base(str(tiny_model), device=CPU)
    options = DemoOptions(out=out, steps=1)
    task = build_task(read_skills(toy_skills), base.tokenizer, options=options, device=CPU)
    model = PeftModel.from_pretrained(base.model, out / "adapter").eval()
    for name, batches in task.valid.items():
        reported = results.contender("mixture").losses[name]
        assert completion_loss(model, batches) == pytest.approx(reported, rel=1e-6)


def test_a_new_process_computes_the_same_logits(finished_run: Run) -> None:
    assert finished_run[1].reload_difference == 0.0


def test_shares_are_shares(finished_run: Run) -> None:
    usage = finished_run[1].usage
    for row in [*usage.skills, *usage.layers, *(r for each in usage.shown_skills for r in each)]:
        assert sum(row) == pytest.approx(1, abs=1e-3)
    assert (len(usage.skills), len(usage.layers), len(usage.shown)) == (2, 2, 2)
    for view in usage.tokens:
        for weights in view.weights:
            assert len(weights) == len(view.tokens)
            assert all(99 <= sum(of_token) <= 101 for of_token in weights)


def test_the_shown_tokens_spell_the_first_validation_text(
    finished_run: Run, toy_skills: Path
) -> None:
    for view, skill in zip(finished_run[1].usage.tokens, read_skills(toy_skills), strict=True):
        first = skill.valid[0]
        assert "".join(view.tokens) == f"{first.prompt}\n\n{first.completion}<end>"


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode(Example("é", "a€"), tokenizer, max_length=99)
    spelled = spell_tokens([*ids.prompt, *ids.completion], tokenizer)
    assert spelled == ["", "é", "\n", "\n", "a", "", "", "€", "<end>"]


def test_an_adapter_that_cannot_be_loaded_is_told(
    tiny_model: Path, toy_skills: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_model), device=CPU)
    options = DemoOptions(out=tmp_path, steps=1)
    task = build_task(read_skills(toy_skills), base.tokenizer, options=options, device=CPU)
    with pytest.raises(DemoError, match="could not be loaded in a new process: "):
        reload_in_new_process(
            tmp_path / "nothing",
            base=str(tiny_model),
            device=CPU,
            batch=task.probe,
            logits=torch.zeros(1),
            prompts=[],
        )
