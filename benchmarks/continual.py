"""Five skills in sequence on a real model: what is kept, beside one LoRA that is trained on and on.

    python -m benchmarks.continual

The experts are those of ``examples/continual_learning.py``; the text is the demo's, and paragraphs
of Python's manual. One LoRA of an expert's rank sees the same batches in the same order, without
replay. Writes ``continual-learning.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from benchmarks.environment import environment
from benchmarks.report import RESULTS
from examples.continual_learning import CONSOLIDATION, Batch, ContinualLearner, mean_loss
from moelora import TwoPhaseSchedule
from moelora.demo.batches import collate, encode
from moelora.demo.model import load_base, locate_model
from moelora.demo.skills import Example, Skill
from moelora.demo.sources import build_skills

NAME = "continual-learning"
ORDER = ("python", "french", "chemistry", "derivative", "manual")


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Attributes:
        seeding: steps of an expert alone.
        consolidation: steps in company.
        rows: texts of a batch.
        length: most tokens of a text.
        train: batches of each skill.
        valid: validation batches of each skill.
        r: rank of an expert.
        lr: rate while seeding.
        router_lr: rate of router rows.
        threshold: data whose cosine to every known skill is below is new.
        targets: the adapted layers.
    """

    seeding: int = 12
    consolidation: int = 20
    rows: int = 4
    length: int = 48
    train: int = 12
    valid: int = 3
    r: int = 8
    lr: float = 2e-3
    router_lr: float = 1e-2
    threshold: float = 0.97
    targets: list[str] | str = "all-linear"


@dataclass(frozen=True)
class Data:
    """One skill's batches."""

    train: list[Batch]
    valid: list[Batch]


@dataclass
class Figures:
    """Losses on validation text, in nats per token.

    Attributes:
        base: of each skill, without adapters.
        learnt: of each skill with its expert, right after it was learnt.
        chosen: the same at the end.
        routed: at the end, with all experts routed.
        one_lora_learnt: of the one LoRA, right after each skill.
        one_lora: at the end.
        similarity: the cosine of each skill's data to the nearest known skill when it arrived.
        returning: what data of the first skill was taken for at the end.
        bit_equal: whether the first skill's logits, with its expert, are the same to the bit.
        seconds: how long each part took.
    """

    base: dict[str, float] = field(default_factory=dict)
    learnt: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    routed: dict[str, float] = field(default_factory=dict)
    one_lora_learnt: dict[str, float] = field(default_factory=dict)
    one_lora: dict[str, float] = field(default_factory=dict)
    similarity: dict[str, float | None] = field(default_factory=dict)
    returning: str = ""
    bit_equal: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def margin(self) -> float:
        """The most that routing costs over the skill's own expert."""
        return max(self.routed[name] - self.chosen[name] for name in self.chosen)


def learn_with_experts(base: PreTrainedModel, skills: dict[str, Data], plan: Plan) -> Figures:
    """Meet all skills in order, and look at every one again at the end."""
    figures, first, begun = Figures(), next(iter(skills)), time.perf_counter()
    learner = ContinualLearner(
        base,
        r=plan.r,
        target_modules=plan.targets,
        lr=plan.lr,
        router_lr=plan.router_lr,
        seeding_steps=plan.seeding,
        consolidation_steps=plan.consolidation,
        similarity_threshold=plan.threshold,
    )
    logits: Tensor | None = None
    for name, data in skills.items():
        figures.base[name] = learner.loss(data.valid, expert="base")
        taken_for = learner.meet(name, data.train)
        if taken_for != name:
            raise SystemExit(f"{name} was taken for {taken_for}: {learner.arrivals[name]}.")
        figures.similarity[name] = learner.arrivals[name].similarity
        figures.learnt[name] = learner.loss(data.valid, expert=name)
        logits = _logits(learner, first, data.valid[0]) if logits is None else logits
        _tell(f"{name}: {figures.base[name]:.3f} -> {figures.learnt[name]:.3f}")
    for name, data in skills.items():
        figures.chosen[name] = learner.loss(data.valid, expert=name)
        figures.routed[name] = learner.loss(data.valid)
    again = _logits(learner, first, skills[first].valid[0])
    figures.bit_equal = logits is not None and torch.equal(logits, again)
    figures.returning = learner.meet("again", skills[first].valid)
    figures.seconds["experts"] = time.perf_counter() - begun
    return figures


@torch.no_grad()
def _logits(learner: ContinualLearner, expert: str, batch: Batch) -> Tensor:
    learner.experts.set_active_expert(expert)
    logits: Tensor = learner.experts.model(**batch).logits
    return logits


def learn_with_one_lora(
    base: PreTrainedModel, skills: dict[str, Data], plan: Plan, figures: Figures
) -> None:
    """Train one LoRA on the same batches in the same order."""
    begun = time.perf_counter()
    config = LoraConfig(
        r=plan.r,
        lora_alpha=16,
        target_modules=plan.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, data in skills.items():
        _train(model.train(), data.train, plan)
        figures.one_lora_learnt[name] = _valid(model, data)
        _tell(f"one LoRA, {name}: {figures.one_lora_learnt[name]:.3f}")
    for name, data in skills.items():
        figures.one_lora[name] = _valid(model, data)
    figures.seconds["one_lora"] = time.perf_counter() - begun


def _train(model: nn.Module, batches: Sequence[Batch], plan: Plan) -> None:
    optimizer = AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=plan.lr, weight_decay=0
    )
    schedule = TwoPhaseSchedule(
        optimizer, seeding_steps=plan.seeding, consolidation_factor=CONSOLIDATION
    )
    for batch in islice(cycle(batches), plan.seeding + plan.consolidation):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def _valid(model: nn.Module, data: Data) -> float:
    return mean_loss(model.eval(), data.valid)


# Real text ------------------------------------------------------------------------------------


def manual_skill(*, per_split: int = 60) -> Skill:
    """Paragraphs of Python's language reference (PSF), the second half to be written."""
    examples = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            words = paragraph.split()
            if 16 <= len(words) <= 40 and words[0][0].isupper() and words[-1].endswith("."):
                half = len(words) // 2
                prompt = f"Continue the manual: {' '.join(words[:half])}"
                examples.append(Example(prompt, " ".join(words[half:])))
    chosen = random.Random(0).sample(sorted(set(examples), key=str), 2 * per_split)
    return Skill("manual", tuple(chosen[:per_split]), tuple(chosen[per_split:]), source="pydoc")


def real_data(tokenizer: Any, plan: Plan) -> dict[str, Data]:
    """The five skills as batches of equal numbers of texts."""
    skills = {skill.name: skill for skill in build_skills(seed=0)}
    skills["manual"] = manual_skill()

    def batches(examples: Sequence[Example], number: int) -> list[Batch]:
        texts = [encode(each, tokenizer, max_length=plan.length) for each in examples]
        texts = sorted(texts[: number * plan.rows], key=len)
        groups = [texts[i : i + plan.rows] for i in range(0, len(texts), plan.rows)]
        padded = [collate(g, pad_token_id=0, device=torch.device("cpu")) for g in groups]
        return [vars(batch) for batch in padded]

    return {
        name: Data(batches(skills[name].train, plan.train), batches(skills[name].valid, plan.valid))
        for name in ORDER
    }


# The report -----------------------------------------------------------------------------------


def report(
    figures: Figures, plan: Plan, *, model: str, commit: str | None = None
) -> dict[str, Any]:
    """Everything as JSON writes it."""
    return {
        "name": NAME,
        "model": model,
        "plan": asdict(plan),
        "figures": asdict(figures),
        "routed_margin": figures.margin,
        "environment": environment(torch.device("cpu"), commit=commit),
    }


def as_markdown(content: dict[str, Any]) -> str:
    """The report as a page."""
    figures, plan = content["figures"], content["plan"]
    first = next(iter(figures["base"]))
    lines = [
        "# Five skills in sequence",
        "",
        f"{content['model']}, frozen; each skill gets {plan['seeding']} + {plan['consolidation']} "
        f"steps of {plan['rows']} texts. Validation loss of the completions, nats per token. The "
        f"one LoRA has an expert's rank, {plan['r']}, and recipe, and sees the same batches in the "
        "same order, without replay; in the second phase the experts also see two batches of each "
        "earlier skill, in turns.",
        "",
        "| skill | frozen base | learnt | at the end, its expert | at the end, routed | one LoRA, "
        "learnt | one LoRA, at the end |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in figures["base"]:
        columns = ("base", "learnt", "chosen", "routed", "one_lora_learnt", "one_lora")
        row = " | ".join(f"{figures[column][name]:.3f}" for column in columns)
        lines.append(f"| {name} | {row} |")
    same = "the same to the bit" if figures["bit_equal"] else "CHANGED"
    arrived = ", ".join(
        f"{name} {cosine:.3f}" for name, cosine in figures["similarity"].items() if cosine
    )
    seconds = ", ".join(f"{key} {value:.0f} s" for key, value in figures["seconds"].items())
    environment_of = content["environment"]
    lines += [
        "",
        f"- The first skill's logits with its expert, after all others were learnt: {same}.",
        f"- Routing costs at most {content['routed_margin']:.3f} over the skill's own expert.",
        f"- Cosine to the nearest known skill on arrival: {arrived}; new below "
        f"{plan['threshold']}. Other texts of {first} at the "
        f"end were taken for: {figures['returning']}.",
        f"- {seconds}, {environment_of['threads']} thread(s) of {environment_of['cpu']}; torch "
        f"{environment_of['libraries']['torch']}, commit {environment_of.get('commit')}.",
        "",
    ]
    return "\n".join(lines)


def write(content: dict[str, Any], folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(as_markdown(content), encoding="utf-8")


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Learn, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "dylora")
    parser.add_argument("--seeding", type=int, default=Plan.seeding)
    parser.add_argument("--consolidation", type=int, default=Plan.consolidation)
    parser.add_argument("--commit", default=None, help="the commit, if there is no repository here")
    arguments = parser.parse_args()
    plan = Plan(seeding=arguments.seeding, consolidation=arguments.consolidation)
    torch.manual_seed(0)
    location = locate_model(None)
    base = load_base(location, device=torch.device("cpu"))
    skills = real_data(base.tokenizer, plan)
    figures = learn_with_experts(base.model, skills, plan)
    base = load_base(location, device=torch.device("cpu"))
    learn_with_one_lora(base.model, skills, plan, figures)
    content = report(figures, plan, model="SmolLM2-135M-Instruct", commit=arguments.commit)
    write(content, arguments.out)
    sys.stdout.write(as_markdown(content))


if __name__ == "__main__":
    main()
