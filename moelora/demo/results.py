"""What a demo run found out, as plain data: everything the report shows, and nothing else."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

NOISE = 0.02


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        key: ``base``, ``lora``, ``lora_total`` or ``mixture``.
        label: as the table shows it.
        parameters: trained parameters.
        losses: completion loss on validation, for each skill, in nats per token.
        seconds: spent on training.
    """

    key: str
    label: str
    parameters: int
    losses: dict[str, float]
    seconds: float

    @property
    def mean_loss(self) -> float:
        """The mean over skills, each counting the same."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Sample:
    """One validation prompt of a skill and what was written for it."""

    skill: str
    prompt: str
    completion: str
    base: str
    mixture: str


@dataclass(frozen=True)
class TokenView:
    """The tokens of one text and, for each router shown, the weight of each expert in percent."""

    skill: str
    tokens: list[str]
    weights: list[list[list[int]]]


@dataclass(frozen=True)
class Usage:
    """Expert shares in ``[0, 1]`` on the validation texts, and how they tell skills apart.

    Attributes:
        skills: skills x experts, the mean over all routers.
        layers: layers x experts, the mean over skills and the routers of a layer.
        shown: names of the clearest router of each layer, those that single views show.
        shown_skills: for each of them skills x experts.
        separations: for each of them the separation of the skills.
        mean_separation: over all routers.
        shuffled_separation: the same for texts sorted into skills at random.
        tokens: one text of each skill, token by token.
    """

    skills: list[list[float]]
    layers: list[list[float]]
    shown: list[str]
    shown_skills: list[list[list[float]]]
    separations: list[float]
    mean_separation: float
    shuffled_separation: float
    tokens: list[TokenView]


@dataclass(frozen=True)
class SkillSummary:
    """How much text a skill has and where it comes from."""

    name: str
    source: str
    train: int
    valid: int
    truncated: int


@dataclass(frozen=True)
class DemoResults:
    """All that a run measured; ``results.json`` holds it.

    Attributes:
        settings: the options, and the values they were completed with.
        versions: of the packages that matter.
        skills: in the order of every table and axis.
        contenders: the frozen base first, the mixture last.
        samples: one for each skill.
        usage: of the mixture's experts.
        reload_difference: largest absolute difference of the logits before saving and after
            loading in a new process.
        seconds: wall time of each part.
    """

    settings: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
    skills: list[SkillSummary]
    contenders: list[Contender]
    samples: list[Sample]
    usage: Usage
    reload_difference: float
    seconds: dict[str, float]

    def contender(self, key: str) -> Contender:
        """Return the contender of that key."""
        return next(each for each in self.contenders if each.key == key)


def to_json(results: DemoResults) -> str:
    """Write results as JSON, with the mean loss of every contender beside its losses."""
    tree = dataclasses.asdict(results)
    for branch, contender in zip(tree["contenders"], results.contenders, strict=True):
        branch["mean_loss"] = contender.mean_loss
    # indented, but rows of numbers stay rows; a quote never opens inside one
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", _one_line, text) + "\n"


def _one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers.group(1).split())}]"


def from_json(text: str) -> DemoResults:
    """Read what `to_json` wrote."""
    tree = json.loads(text)
    for branch in tree["contenders"]:
        branch.pop("mean_loss")
    usage = tree["usage"] | {"tokens": [TokenView(**view) for view in tree["usage"]["tokens"]]}
    return DemoResults(
        **tree
        | {
            "skills": [SkillSummary(**branch) for branch in tree["skills"]],
            "contenders": [Contender(**branch) for branch in tree["contenders"]],
            "samples": [Sample(**branch) for branch in tree["samples"]],
            "usage": Usage(**usage),
        }
    )


def read_results(folder: Path) -> DemoResults:
    """Read the results of a finished run.

    Args:
        folder: what ``--out`` named.
    """
    return from_json((folder / "results.json").read_text(encoding="utf-8"))


def loss_table(results: DemoResults) -> str:
    """Lay out the comparison as text: one row for each skill, one column for each contender."""
    heads = [contender.label for contender in results.contenders]
    rows = [
        [skill.name, *(f"{each.losses[skill.name]:.3f}" for each in results.contenders)]
        for skill in results.skills
    ]
    rows.append(["mean", *(f"{each.mean_loss:.3f}" for each in results.contenders)])
    table = [["validation loss", *heads], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def verdict(results: DemoResults) -> str:
    """Say in one sentence how the mixture compares, differences below 0.02 being noise."""
    base, lora, mixture = (results.contender(key) for key in ("base", "lora", "mixture"))
    better = sum(mixture.losses[name] < base.losses[name] for name in base.losses)
    gap = mixture.mean_loss - lora.mean_loss
    if abs(gap) <= NOISE:
        against = f"as good as {lora.label} ({gap:+.3f}, and {NOISE} is noise)"
    else:
        against = f"{abs(gap):.3f} {'higher' if gap > 0 else 'lower'} than that of {lora.label}"
    return (
        f"The mixture beats the frozen base on {better} of {len(base.losses)} skills; "
        f"its mean loss is {against}."
    )
