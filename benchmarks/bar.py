"""The table of aims: each figure is one number of one case over one number of another, same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.baselines import Variant
from benchmarks.cases import (
    BASE,
    BLOCKS_EAGER,
    BLOCKS_GRAPH,
    BLOCKS_LONG,
    CHECKPOINTED,
    CHECKPOINTED_GRAPH,
    CPU_TRAIN,
    DECODE_EAGER,
    DECODE_GRAPH,
    HALF_LORA,
    HOST,
    LORA,
    MIXTURE,
    PREFILL,
    PREFILL_GRAPH,
    PREPARED,
    TRAIN_8B,
    TRAIN_EAGER,
    TRAIN_GRAPH,
    TRAIN_LONG,
    XLORA,
    Case,
    Conditions,
    mixture,
)


@dataclass(frozen=True)
class Aim:
    """One figure.

    Attributes:
        figure: what it says.
        conditions: of both cases.
        variant: above the line.
        over: below the line.
        bound: the value to reach.
        metric: which of the cases' numbers.
        at_least: whether larger is better.
    """

    figure: str
    conditions: Conditions
    variant: Variant
    over: Variant
    bound: float
    metric: str = "wall_ms"
    at_least: bool = False

    @property
    def cases(self) -> tuple[str, str]:
        """Names of the case above and of the one below the line."""
        return (
            Case(self.conditions, self.variant).name,
            Case(self.conditions, self.over).name,
        )

    def reached(self, value: float) -> bool:
        """Whether a value is as good as the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


def _over(conditions: Conditions, where: str, bounds: Sequence[tuple[Variant, float]]) -> list[Aim]:
    names = {
        BASE: "frozen base",
        LORA: "one PEFT LoRA",
        HALF_LORA: "one PEFT LoRA, bf16 adapters",
    }
    return [
        Aim(f"{where} / {names[over]}", conditions, MIXTURE, over, bound) for over, bound in bounds
    ]


def _ratio_of_mixtures(experts: int, bound: float) -> Aim:
    figure = f"training step, 1B, CUDA graph: E = {experts} / E = 8"
    return Aim(figure, TRAIN_GRAPH, mixture(experts), MIXTURE, bound)


def _xlora(figure: str, conditions: Conditions, bound: float, metric: str = "wall_ms") -> Aim:
    return Aim(
        f"X-LoRA, E = 8 / moelora: {figure}", conditions, XLORA, MIXTURE, bound, metric, True
    )


def _training(of: str, graph: Conditions, eager: Conditions, long: Conditions) -> Iterator[Aim]:
    """The aims of training one model."""
    three = [(LORA, 0.65), (HALF_LORA, 0.95), (BASE, 1.20)]
    yield from _over(graph, f"training step, {of}, 4096 tokens, CUDA graph", three)
    yield from _over(long, f"training step, {of}, 8192 tokens, eager", three)
    yield from _over(eager, f"training step, {of}, 4096 tokens, eager", [(LORA, 0.70)])
    figure = f"peak memory above weights, training, {of} / one PEFT LoRA"
    yield Aim(figure, eager, MIXTURE, LORA, 0.75, "peak_mib")
    yield _xlora(f"training time, {of}, eager", eager, 10)
    yield _xlora(f"training memory, {of}", eager, 5, "peak_mib")


_MODES = {"eager": "eager", "graph": "CUDA graph"}

AIMS: list[Aim] = [
    *_training("1B", TRAIN_GRAPH, TRAIN_EAGER, TRAIN_LONG),
    *_training("1B's blocks", BLOCKS_GRAPH, BLOCKS_EAGER, BLOCKS_LONG),
    *_over(
        TRAIN_8B,
        "training step, 8B-like layers, 4096 tokens, eager",
        [(LORA, 0.65), (HALF_LORA, 0.95), (BASE, 1.15)],
    ),
    *(
        aim
        for conditions in (*CHECKPOINTED, *CHECKPOINTED_GRAPH)
        for aim in _over(
            conditions,
            f"{conditions.checkpointing} checkpointing, training step, 1B, "
            f"{_MODES[conditions.mode]}",
            [(BASE, 1.25)],
        )
    ),
    *(
        aim
        for conditions in (PREFILL, PREFILL_GRAPH)
        for aim in _over(
            conditions,
            f"prefill, 1B, 4096 tokens, {_MODES[conditions.mode]}",
            [(BASE, 1.25), (LORA, 0.60)],
        )
    ),
    Aim("prefill, 1B, 4096 tokens, eager, prepared / frozen base", PREFILL, PREPARED, BASE, 1.25),
    Aim("prefill, 1B, 4096 tokens, eager, prepared / one PEFT LoRA", PREFILL, PREPARED, LORA, 0.60),
    _xlora("prefill, 1B, eager", PREFILL, 15),
    *(
        Aim(
            f"decoding, 1B, CUDA graph, batch {conditions.batch}, k = 2 of {variant.experts}"
            " / frozen base",
            conditions,
            variant,
            BASE,
            1.30,
        )
        for conditions in DECODE_GRAPH
        for variant in (MIXTURE, mixture(64))
    ),
    *_over(DECODE_EAGER, "decoding, 1B, eager, batch 1", [(LORA, 1.0)]),
    _ratio_of_mixtures(16, 1.06),
    _ratio_of_mixtures(64, 1.20),
    *(
        Aim(
            f"host time per adapted linear, {name} / one PEFT LoRA",
            HOST,
            MIXTURE,
            LORA,
            1.0,
            f"{name}_us_per_linear",
        )
        for name in ("forward", "training")
    ),
    Aim(
        "training step, SmolLM2-135M, two CPU cores, E = 8 / one PEFT LoRA",
        CPU_TRAIN,
        MIXTURE,
        LORA,
        1.35,
    ),
]


def number(metrics: dict[str, Any], name: str) -> float | None:
    """A metric's value: its median where it has quantiles; None where it was not measured.

    Example:
        >>> number({"wall_ms": {"p50": 2.0}}, "wall_ms")
        2.0
    """
    value = metrics.get(name)
    if isinstance(value, dict):
        value = value["p50"]
    return None if value is None else float(value)


@dataclass(frozen=True)
class Value:
    """What an aim came to: its two numbers, and the run they are from."""

    above: float
    below: float
    run: dict[str, Any]

    @property
    def quotient(self) -> float:
        """The figure."""
        return self.above / self.below


def values_of(aim: Aim, runs: Sequence[dict[str, Any]]) -> list[Value]:
    """An aim's values in all runs that hold both cases, in the order of the runs."""
    values = []
    for run in runs:
        found = {
            result["case"]: number(result["metrics"], aim.metric)
            for result in run["results"]
            if result["status"] == "ok" and result["case"] in aim.cases
        }
        above, below = (found.get(name) for name in aim.cases)
        if above is not None and below:
            values.append(Value(above, below, run))
    return values


def value_of(aim: Aim, runs: Sequence[dict[str, Any]]) -> Value | None:
    """An aim's value in the newest run that holds both cases; None if none does."""
    return next(iter(values_of(aim, runs)), None)
