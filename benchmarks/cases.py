"""Every case that can be measured, and the suites that group them.

A case is one variant under one set of conditions; cases with equal conditions form a group and are
compared with each other only within one run.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.baselines import Variant

COMPILED = ("compile", "reduce-overhead")
MODES = ("eager", "graph", *COMPILED)
#: Whole models that are run as they are.
_MODEL_KINDS = ("train", "prefill", "decode", "generate")


class UnknownNameError(ValueError):
    """No case, suite or table has this name."""


@dataclass(frozen=True)
class Conditions:
    """What the variants of a group have in common.

    Attributes:
        kind: ``train``, ``prefill``, ``decode``, ``generate``, ``host``, ``leak`` or ``op``.
        shape: the model, or the layer of an op, by name.
        batch: rows.
        tokens: positions per row; for decoding, those already in the cache.
        dtype: of the base model.
        mode: how it is run, one of :data:`MODES`.
        checkpointing: ``""``, ``reentrant`` or ``nonreentrant``.
        optimizer: whether the training step has an optimiser step (AdamW, fused on the GPU).
    """

    kind: str
    shape: str
    batch: int
    tokens: int
    dtype: str = "bf16"
    mode: str = "eager"
    checkpointing: str = ""
    optimizer: bool = False

    @property
    def in_turns(self) -> bool:
        """Whether all variants are timed in turns instead of one after the other.

        What the host launches depends on its speed, which on shared machines changes within
        minutes; a recorded graph does not. Ops and host times look after that themselves.
        """
        return self.mode == "eager" and self.kind in _MODEL_KINDS

    @property
    def name(self) -> str:
        """As in case names."""
        parts = [self.kind, self.shape, f"{self.batch}x{self.tokens}", self.dtype, self.mode]
        if self.checkpointing:
            parts.append(self.checkpointing)
        if self.optimizer:
            parts.append("adamw")
        return "/".join(parts)


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    conditions: Conditions
    variant: Variant

    @property
    def name(self) -> str:
        """The name by which it is asked for, and that results are stored under."""
        return f"{self.conditions.name}/{self.variant.name}"


BASE = Variant("base")
LORA = Variant("lora")
HALF_LORA = Variant("lora", adapter_dtype="base")


def mixture(experts: int, top_k: int = 2, *, r: int = 16, detail: str = "") -> Variant:
    """A ``MoELoraConfig`` mixture with default dtypes."""
    return Variant("moelora", experts, top_k, r, detail=detail)


MIXTURE = mixture(8)
PREPARED = mixture(8, detail="prepared")
XLORA = Variant("xlora", 8, 8)
LOOP = Variant("loop", 8, 2)


def group(conditions: Conditions, *variants: Variant) -> list[Case]:
    """The cases of one group."""
    return [Case(conditions, variant) for variant in variants]


def _train(shape: str, batch: int, tokens: int, mode: str = "eager", **fields: Any) -> Conditions:
    return Conditions("train", shape, batch, tokens, mode=mode, **fields)


# What the table of the project's aims asks for ---------------------------------------------------

TRAIN_GRAPH = _train("llama-1b", 4, 1024, "graph")
TRAIN_EAGER = _train("llama-1b", 4, 1024)
TRAIN_LONG = _train("llama-1b", 8, 1024)
TRAIN_8B = _train("llama-8b-6-layers", 4, 1024)
BLOCKS_GRAPH = _train("llama-1b-blocks", 4, 1024, "graph")
BLOCKS_EAGER = _train("llama-1b-blocks", 4, 1024)
BLOCKS_LONG = _train("llama-1b-blocks", 8, 1024)
TRAIN_ADAMW = _train("llama-1b", 4, 1024, optimizer=True)
CHECKPOINTED = [
    _train("llama-1b", 4, 1024, checkpointing=kind) for kind in ("nonreentrant", "reentrant")
]
CHECKPOINTED_GRAPH = [replace(conditions, mode="graph") for conditions in CHECKPOINTED]
PREFILL = Conditions("prefill", "llama-1b", 4, 1024)
PREFILL_GRAPH = replace(PREFILL, mode="graph")
DECODE_GRAPH = [Conditions("decode", "llama-1b", rows, 512, mode="graph") for rows in (1, 8)]
DECODE_EAGER = Conditions("decode", "llama-1b", 1, 512)
HOST = Conditions("host", "llama-1b-4-layers", 1, 16)
CPU_TRAIN = Conditions("train", "smollm2-135m", 2, 128, dtype="fp32")


def _bar() -> Iterator[Case]:
    yield from group(
        TRAIN_GRAPH,
        BASE,
        LORA,
        HALF_LORA,
        MIXTURE,
        mixture(16),
        mixture(64),
        Variant("lora", r=128),
    )
    yield from group(TRAIN_EAGER, BASE, LORA, HALF_LORA, MIXTURE, XLORA, LOOP)
    yield from group(BLOCKS_GRAPH, BASE, LORA, HALF_LORA, MIXTURE)
    yield from group(BLOCKS_EAGER, BASE, LORA, HALF_LORA, MIXTURE, XLORA)
    yield from group(BLOCKS_LONG, BASE, LORA, HALF_LORA, MIXTURE)
    yield from group(TRAIN_ADAMW, LORA, HALF_LORA, MIXTURE)
    for conditions in (*CHECKPOINTED, *CHECKPOINTED_GRAPH):
        yield from group(conditions, BASE, LORA, MIXTURE)
    yield from group(TRAIN_LONG, BASE, LORA, HALF_LORA, MIXTURE)
    yield from group(PREFILL, BASE, LORA, HALF_LORA, MIXTURE, PREPARED, XLORA, LOOP)
    yield from group(PREFILL_GRAPH, BASE, LORA, HALF_LORA, MIXTURE)
    for conditions in DECODE_GRAPH:
        yield from group(conditions, BASE, LORA, HALF_LORA, MIXTURE, mixture(64))
    yield from group(DECODE_EAGER, BASE, LORA, HALF_LORA, MIXTURE)
    yield from group(TRAIN_8B, BASE, LORA, HALF_LORA, MIXTURE, mixture(64))
    yield from group(HOST, BASE, LORA, HALF_LORA, MIXTURE)


# How the figures move with each size -------------------------------------------------------------

_BLOCKS = "llama-1b-4-layers"
SWEEP = _train(_BLOCKS, 4, 1024, "graph")
SWEEP_TOKENS = [_train(_BLOCKS, *size, "graph") for size in ((1, 256), (1, 1024), (2, 1024))]
SWEEP_LONG = _train(_BLOCKS, 8, 1024, "graph")
EXPERTS = (2, 4, 8, 16, 64, 128)


def _sweep() -> Iterator[Case]:
    by_experts = [mixture(experts) for experts in EXPERTS]
    by_top_k = [mixture(8, top_k) for top_k in (1, 4, 8)]
    by_top_k += [mixture(64, top_k) for top_k in (1, 4)]
    by_rank = [mixture(8, r=r) for r in (8, 64)] + [Variant("lora", r=r) for r in (8, 64)]
    ours = [Variant("explicit", 1, 1), Variant("explicit", 8, 2)]
    ours += [mixture(8, detail=detail) for detail in ("layer", "given", "fixed")]
    ours.append(Variant("moelora", 8, 2, adapter_dtype="base"))
    others = [Variant("explicit", 8, 2), LOOP, mixture(8, detail="model"), XLORA]
    others += [Variant("npasses", 8, 2)]
    yield from group(
        SWEEP, BASE, LORA, HALF_LORA, *by_experts, *by_top_k, *by_rank, *ours, Variant("loop", 8, 2)
    )
    for conditions in (*SWEEP_TOKENS, SWEEP_LONG):
        yield from group(conditions, BASE, LORA, HALF_LORA, MIXTURE, mixture(64))
    yield from group(_train(_BLOCKS, 4, 1024), BASE, LORA, HALF_LORA, MIXTURE, *others)
    for dtype in ("fp16", "fp32"):
        yield from group(_train(_BLOCKS, 4, 1024, "graph", dtype=dtype), BASE, LORA, MIXTURE)
    for mode in COMPILED:
        yield from group(_train(_BLOCKS, 4, 1024, mode), BASE, LORA, MIXTURE, mixture(64))
        yield from group(Conditions("decode", _BLOCKS, 1, 512, mode=mode), BASE, LORA, MIXTURE)
    dora = [Variant("dora"), Variant("doraexplicit", 1, 1), Variant("doraexplicit", 8, 2)]
    yield from group(_train(_BLOCKS, 2, 1024), BASE, LORA, *dora)
    arrow = Variant("arrow", 8, 2)
    yield from group(Conditions("prefill", _BLOCKS, 4, 1024), BASE, LORA, MIXTURE, *others, arrow)
    yield from group(_train("qwen3-0.6b", 4, 1024, "graph"), BASE, LORA, HALF_LORA, MIXTURE)
    yield from group(_train("gpt2", 4, 1024, "graph"), BASE, LORA, HALF_LORA, MIXTURE)
    for rows in (1, 8, 64):
        for mode in ("graph", "eager"):
            yield from group(
                Conditions("decode", _BLOCKS, rows, 512, mode=mode),
                *(BASE, LORA, HALF_LORA, MIXTURE, mixture(64)),
            )
    yield from group(Conditions("generate", _BLOCKS, 1, 128), BASE, LORA, MIXTURE)


# The op alone, on the linears of the two large models ---------------------------------------------


def _ops() -> Iterator[Case]:
    for shape in ("2048x2048", "2048x8192", "8192x2048", "4096x14336"):
        for rows in (4096, 1):
            yield from group(
                Conditions("op", shape, 1, rows),
                Variant("linear"),
                *(Variant("fused", experts, min(experts, 2)) for experts in (1, 8, 16, 64)),
                *(Variant("routed", experts, 2) for experts in (8, 16, 64)),
                Variant("combine", 8, 2),
                Variant("loop", 8, 2),
            )
    yield from group(
        Conditions("op", "2048x2048", 1, 4096),
        *(Variant("routed", 8, 2, r) for r in (8, 64)),
        *(Variant("routed", 64, top_k) for top_k in (1, 4)),
        *(Variant("routed", 8, top_k) for top_k in (1, 4, 8)),
        Variant("routed", 128, 2),
    )
    for dtype in ("fp16", "fp32"):
        yield from group(
            Conditions("op", "2048x2048", 1, 4096, dtype=dtype),
            *(Variant("linear"), Variant("fused", 8, 2), Variant("combine", 8, 2)),
        )


def _memory() -> Iterator[Case]:
    for kind in ("", "nonreentrant", "reentrant"):
        yield from group(
            Conditions("leak", "llama-1b-4-layers", 2, 512, checkpointing=kind),
            *(LORA, MIXTURE, mixture(8, detail="layer"), Variant("explicit", 8, 2)),
        )
    yield from group(Conditions("leak", "llama-1b-4-layers", 2, 512, mode="graph"), MIXTURE)


def _cpu() -> Iterator[Case]:
    yield from group(CPU_TRAIN, BASE, LORA, mixture(4), MIXTURE, Variant("xlora", 8, 8), LOOP)
    yield from group(
        Conditions("prefill", "smollm2-135m", 1, 256, dtype="fp32"),
        *(BASE, LORA, MIXTURE),
    )
    yield from group(
        Conditions("decode", "smollm2-135m", 1, 64, dtype="fp32"),
        *(BASE, LORA, MIXTURE),
    )


_TINY_OPS = ("fused", "routed", "combine", "loop")
_TINY_GROUPS = (
    group(
        Conditions("train", "tiny", 2, 8, dtype="fp32"),
        *(BASE, LORA, Variant("dora", r=4), MIXTURE, mixture(4, 1, r=4), mixture(4, 4, r=4)),
        *(mixture(4, r=4, detail=detail) for detail in ("layer", "model", "fixed", "given")),
        *(Variant(kind, 3, 2, 4) for kind in ("explicit", "doraexplicit", "loop", "npasses")),
        Variant("xlora", 3, 3, 4),
    ),
    group(Conditions("train", "tiny", 2, 8, dtype="bf16"), BASE, LORA, HALF_LORA, MIXTURE),
    group(Conditions("train", "tiny", 2, 8, dtype="fp16"), LORA, MIXTURE),
    group(Conditions("train", "tiny", 2, 8, dtype="fp32", optimizer=True), LORA, MIXTURE),
    group(Conditions("train", "tiny-gpt2", 2, 8, dtype="fp32"), BASE, LORA, MIXTURE),
    *(
        group(Conditions("train", "tiny", 2, 8, dtype="fp32", checkpointing=kind), BASE, MIXTURE)
        for kind in ("reentrant", "nonreentrant")
    ),
    group(
        Conditions("prefill", "tiny", 2, 8, dtype="fp32"),
        *(BASE, LORA, MIXTURE, mixture(4, r=4, detail="prepared"), Variant("arrow", 3, 2, 4)),
        Variant("npasses", 3, 2, 4),
        Variant("xlora", 3, 3, 4),
    ),
    group(
        Conditions("decode", "tiny", 2, 8, dtype="fp32"),
        *(BASE, LORA, MIXTURE, Variant("explicit", 3, 2, 4)),
    ),
    group(Conditions("generate", "tiny", 2, 8, dtype="fp32"), BASE, MIXTURE),
    group(Conditions("host", "tiny", 1, 4, dtype="fp32"), BASE, LORA, MIXTURE),
    group(Conditions("leak", "tiny", 2, 8, dtype="fp32"), LORA, MIXTURE),
    group(
        Conditions("op", "32x48", 1, 8, dtype="fp32"),
        *(Variant("linear"), *(Variant(kind, 4, 2, 4) for kind in _TINY_OPS)),
    ),
)


def _tiny() -> Iterator[Case]:
    for cases in _TINY_GROUPS:
        yield from cases


def _smoke() -> Iterator[Case]:
    for mode in ("graph", *COMPILED):
        for kind in ("train", "prefill", "decode"):
            conditions = Conditions(kind, "tiny", 2, 16, dtype="fp32", mode=mode)
            yield from group(conditions, BASE, LORA, MIXTURE)
    for mode in ("eager", "graph"):
        yield from group(Conditions("train", "tiny", 2, 16, mode=mode), *_SMOKED)
    yield from group(Conditions("train", "tiny", 2, 16, optimizer=True), LORA, MIXTURE)
    for kind in ("reentrant", "nonreentrant"):
        yield from group(Conditions("train", "tiny", 2, 16, checkpointing=kind), BASE, MIXTURE)
    yield from group(
        Conditions("prefill", "tiny", 2, 16), PREPARED, XLORA, LOOP, Variant("arrow", 8, 2)
    )
    yield from group(Conditions("host", "tiny", 1, 16), BASE, LORA, MIXTURE)
    yield from group(Conditions("leak", "tiny", 2, 16), MIXTURE)
    yield from group(
        Conditions("op", "64x128", 1, 64),
        *(Variant("linear"), *(Variant(kind, 8, 2) for kind in ("fused", "routed", "combine"))),
    )


_SMOKED = (
    *(BASE, LORA, HALF_LORA, MIXTURE, mixture(64), XLORA, LOOP, Variant("explicit", 8, 2)),
    *(mixture(8, detail=detail) for detail in ("layer", "model", "fixed", "given")),
)

SUITES = {
    "bar": (_bar, "every row of the table of aims; one H100"),
    "sweep": (_sweep, "time and memory against E, k, r, tokens, dtype, model, mode; one H100"),
    "ops": (_ops, "the ops alone, with FLOPs and bytes; one H100"),
    "memory": (_memory, "200 steps each: does the allocated memory stay flat?"),
    "cpu": (_cpu, "SmolLM2-135M's shape on two cores; under ten minutes"),
    "smoke": (_smoke, "tiny models in every mode on a GPU: does it all run? two minutes"),
    "tiny": (_tiny, "every kind of case within seconds; what the tests run"),
}


def cases_of(suite: str) -> list[Case]:
    """The cases of a suite, in order, each once.

    Raises:
        UnknownNameError: if there is no such suite.
    """
    if suite not in SUITES:
        raise UnknownNameError(f"Unknown suite {suite!r}: choose one of {', '.join(SUITES)}.")
    return list(dict.fromkeys(SUITES[suite][0]()))


def select(cases: Sequence[Case], filters: Iterable[str]) -> list[Case]:
    """The cases whose name matches any filter, all without filters.

    A filter is a part of the name, or a pattern with ``*`` for the whole name.

    Raises:
        UnknownNameError: if a filter matches nothing.
    """
    wanted = list(filters)
    if not wanted:
        return list(cases)
    for one in wanted:
        if not any(matches(case, one) for case in cases):
            raise UnknownNameError(
                f"No case matches {one!r}: `python -m benchmarks list` shows all names."
            )
    return [case for case in cases if any(matches(case, one) for one in wanted)]


def matches(case: Case, wanted: str) -> bool:
    """Whether a filter matches a case's name."""
    if any(letter in wanted for letter in "*?["):
        return fnmatch.fnmatchcase(case.name, wanted)
    return wanted in case.name


def groups_of(cases: Iterable[Case]) -> dict[Conditions, list[Case]]:
    """Cases by their conditions, in order."""
    groups: dict[Conditions, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.conditions, []).append(case)
    return groups
