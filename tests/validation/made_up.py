"""A made-up report, whose texts may be nasty."""

from __future__ import annotations

from moelora.validation.agreement import Comparison
from moelora.validation.results import Report, Speed, Usage
from moelora.validation.speed import Measured, Seconds

NASTY = "<script>alert('x')</script> | *b* & \"q\""


def seconds(value: float) -> Seconds:
    return Seconds(value, 0.9 * value, 1.1 * value, 5)


def way(name: str, time: float, *, memory: int = 100, step: bool = True) -> Measured:
    return Measured(
        way=name,
        label=f"{name} way",
        passes=1,
        forward=seconds(time),
        step=seconds(3 * time) if step else None,
        resident=1000,
        forward_peak=memory,
        step_peak=2 * memory if step else None,
    )


def speed(experts: int) -> Speed:
    return Speed(
        experts,
        [
            way("base", 0.9, step=False),
            way("lora", 1.0),
            way("n_plus_1", 1.0 + experts, memory=300),
            way("two_passes", 2.5, memory=200),
            way("attached", 2.0),
            way("one_pass", 1.25, memory=150),
        ],
    )


def comparison(*, agrees: bool = True, demanded: bool = True, text: str = "a / b") -> Comparison:
    difference = 1e-7 if agrees else float("nan")
    return Comparison(
        text, demanded, agrees, difference, difference, difference, 1.0, 1.0, 0.0, f"why {text}"
    )


def report(*, agrees: bool = True, text: str = "plain", usage: bool = True) -> Report:
    return Report(
        settings={"dtype": "float32", "tolerance": 1e-4, "input": text},
        versions={"torch": "2"},
        checkpoint={"checkpoint": text, "ranks": [2, 4]},
        comparisons=[
            comparison(agrees=agrees, text=text),
            comparison(agrees=False, demanded=False),
        ],
        speed=[speed(2), speed(4)],
        usage=Usage([[0.75, 0.25], [0.5, 0.5]], [[1, *[0] * 19], [0] * 20], 0.9) if usage else None,
        memory_method="counted",
        notes=[text],
    )
