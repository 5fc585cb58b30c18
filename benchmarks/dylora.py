"""DyLoRA-MoE's ways to run its experts: a pass for each of them, two passes, one pass.

    python -m benchmarks.dylora --shape smollm2-135m --experts 2,4,8

The two functions have the names of DyLoRA's own plan. They report and fail on wrong results only,
never on time. Each layer of the routed ways is held against a loop over its experts in float64
before anything is measured. Writes ``dylora.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Variant, build, draw_adapters, targets_of
from benchmarks.correctness import TOLERANCES, WrongResultError, relative_error
from benchmarks.environment import environment
from benchmarks.report import RESULTS
from benchmarks.shapes import BaseModels, adapted_layers, unique_bytes
from benchmarks.steps import token_ids
from benchmarks.timing import Effort, Step, time_steps
from examples.dylora import DyLoRAMoE
from moelora import Routing, record_routing
from moelora.validation.speed import peak_bytes

#: The slowest way last; speed-ups are over it.
WAYS = ("one LoRA", "one pass", "two passes", "N+1 passes")
_SCOPES: dict[str, Any] = {"one pass": "module", "two passes": "model"}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        shape: a model of :data:`benchmarks.shapes.SHAPES`, with random weights.
        experts: numbers of experts to try.
        top_k: experts per token.
        r: rank of an expert, and of the one LoRA.
        batch: rows.
        tokens: positions per row.
        dtype: of the base model.
        device: where.
        effort: how long each is timed.
    """

    shape: str = "smollm2-135m"
    experts: tuple[int, ...] = (2, 4, 8)
    top_k: int = 2
    r: int = 16
    batch: int = 2
    tokens: int = 128
    dtype: str = "fp32"
    device: str = "cpu"
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True)
class Way:
    """One way to run a model, ready to be measured."""

    name: str
    model: nn.Module
    call: Callable[..., Any]

    def forward(self, ids: Tensor) -> None:
        """A forward without gradient."""
        self.model.eval()
        with torch.no_grad():
            self.call(input_ids=ids)

    def train(self, ids: Tensor) -> None:
        """Forward and backward."""
        self.model.train()
        self.call(input_ids=ids, labels=ids).loss.backward()
        self.model.zero_grad()


def ways_of(setting: Setting, bases: BaseModels, *, experts: int) -> list[Way]:
    """All ways over the same base; the routed ones are checked.

    Raises:
        WrongResultError: if a routed way computes something else than its experts' weighted sum.
    """
    device, ways = torch.device(setting.device), []
    for name in WAYS:
        base = bases.copy_of(setting.shape, setting.dtype)
        sizes = {"batch": setting.batch, "tokens": setting.tokens}
        if name == "one LoRA":
            built = build(Variant("lora", r=setting.r), base, **sizes)
            ways.append(Way(name, built.model, built.call))
        elif name == "N+1 passes":
            variant = Variant("npasses", experts, min(setting.top_k, experts), setting.r)
            built = build(variant, base, **sizes)
            ways.append(Way(name, built.model, built.call))
        else:
            torch.manual_seed(1)
            model = DyLoRAMoE(
                base,
                num_experts=experts,
                lora_r=setting.r,
                lora_dropout=0.0,
                target_modules=targets_of(base),
                top_k=setting.top_k,
                router_scope=_SCOPES[name],
            ).to(device)
            draw_adapters(model)
            check(model, token_ids(base.config.vocab_size, 2, 8, device), dtype=setting.dtype)
            ways.append(Way(name, model, model))
    return ways


def check(model: DyLoRAMoE, ids: Tensor, *, dtype: str) -> float:
    """Hold every adapted layer against ``base(x) + sum_e w_e scaling_e B_e A_e x`` in float64.

    Args:
        model: in any mode.
        ids: ``(batch, seq)``.
        dtype: of the base model, for the tolerance.

    Returns:
        The largest relative error.

    Raises:
        WrongResultError: if a layer's update is beyond the tolerance.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    prefix = "foundation_model.base_model.model."
    layers = {n.removeprefix(prefix): layer for n, layer in adapted_layers(model).items()}

    def look(name: str) -> Any:
        return lambda _layer, args, output: seen.__setitem__(name, (args[0], output))

    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), record_routing(model.foundation_model) as record:
            model.eval()(ids)
    finally:
        for hook in hooks:
            hook.remove()
    worst = 0.0
    for name, layer in layers.items():
        x, output = seen[name]
        routing = record.routing.get(name, record.routing.get("model"))
        expected = _slow_layer(layer, x, routing)
        worst = max(worst, relative_error(output, expected))
        if worst > TOLERANCES[dtype][0]:
            raise WrongResultError(f"Layer {name} is off by {worst:.2e} (relative).")
    return worst


@torch.no_grad()
def _slow_layer(layer: Any, x: Tensor, routing: Routing | None) -> Tensor:
    result = layer.base_layer(x).double()
    for index, name in enumerate(layer.active_adapters):
        down, up = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        delta = (x.double() @ down.T) @ up.T * layer.scaling[name]
        weights = None if routing is None else routing.routing_weights[:, index].double()
        result += delta if weights is None else delta * weights.reshape(*x.shape[:-1], 1)
    expected: Tensor = result
    return expected


def test_forward_pass_speedup(setting: Setting) -> dict[str, Any]:
    """Milliseconds of a forward and of a training step of every way, and how often one pass fits.

    Args:
        setting: what to measure.

    Returns:
        For each number of experts the quantiles of every way, and ``speedup``: the median time of
        each way over that of one pass.
    """
    device, bases = torch.device(setting.device), BaseModels(torch.device(setting.device))
    found: dict[str, Any] = {}
    for experts in setting.experts:
        ways = ways_of(setting, bases, experts=experts)
        ids = _ids(setting, ways)
        result: dict[str, Any] = {}
        for kind in ("forward", "train"):
            steps = [Step(partial(getattr(way, kind), ids)) for way in ways]
            times = time_steps(steps, device, setting.effort)
            by_way = {w.name: metrics["wall_ms"] for w, metrics in zip(ways, times, strict=True)}
            fast = by_way["one pass"]["p50"]
            result[kind] = {
                "wall_ms": by_way,
                "speedup": {name: each["p50"] / fast for name, each in by_way.items()},
            }
        found[str(experts)] = result
    return found


def test_memory_usage_comparison(setting: Setting) -> dict[str, Any]:
    """Bytes that every way allocates at most beyond its weights.

    Args:
        setting: what to measure.

    Returns:
        For each number of experts the peak of a forward and of a training step, gradients
        included, as ``{way: bytes}``; ``total_bytes`` with the weights; and the ratios of both to
        one LoRA's.
    """
    device, bases = torch.device(setting.device), BaseModels(torch.device(setting.device))
    found: dict[str, Any] = {}
    for experts in setting.experts:
        ways = ways_of(setting, bases, experts=experts)
        ids = _ids(setting, ways)
        result: dict[str, Any] = {}
        for kind in ("forward", "train"):
            peaks: dict[str, int] = {}
            totals: dict[str, int] = {}
            for way in ways:
                run = partial(getattr(way, kind), ids)
                run()
                peak = peak_bytes(device, run)
                if peak is not None:
                    peaks[way.name] = peak
                    totals[way.name] = peak + unique_bytes(way.model)
            result[kind] = {
                "peak_bytes": peaks,
                "over_one_lora": _over_one_lora(peaks),
                "total_bytes": totals,
                "total_over_one_lora": _over_one_lora(totals),
            }
        found[str(experts)] = result
    return found


def _over_one_lora(found: dict[str, int]) -> dict[str, float]:
    return {name: each / found["one LoRA"] for name, each in found.items()}


def _ids(setting: Setting, ways: Sequence[Way]) -> Tensor:
    vocabulary: int = ways[0].model.config.vocab_size  # type: ignore[union-attr, assignment]
    return token_ids(vocabulary, setting.batch, setting.tokens, torch.device(setting.device))


def report(setting: Setting, *, commit: str | None = None) -> dict[str, Any]:
    """Both measurements, as JSON writes them."""
    return {
        "name": "dylora",
        "setting": asdict(setting),
        "speed": test_forward_pass_speedup(setting),
        "memory": test_memory_usage_comparison(setting),
        "environment": environment(torch.device(setting.device), commit=commit),
    }


def table(content: dict[str, Any]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| experts | way | forward ms | step ms | one pass faster by | memory / one LoRA |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for experts, result in content["speed"].items():
        memory = content["memory"][experts]["train"]["total_over_one_lora"]
        for way in WAYS:
            forward, train = (result[kind]["wall_ms"][way]["p50"] for kind in ("forward", "train"))
            speedup = " / ".join(f"{result[k]['speedup'][way]:.2f}x" for k in ("forward", "train"))
            ratio = f"{memory[way]:.2f}" if way in memory else "-"
            row = [experts, way, f"{forward:.1f}", f"{train:.1f}", speedup, ratio]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=Setting.shape)
    parser.add_argument("--experts", default="2,4,8", help="numbers, separated by commas")
    parser.add_argument("--batch", type=int, default=Setting.batch)
    parser.add_argument("--tokens", type=int, default=Setting.tokens)
    parser.add_argument("--dtype", default=Setting.dtype, choices=sorted(TOLERANCES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time each comparison for so long"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "dylora")
    parser.add_argument("--commit", default=None, help="the commit, if there is no repository here")
    arguments = parser.parse_args()
    setting = Setting(
        shape=arguments.shape,
        experts=tuple(int(number) for number in arguments.experts.split(",")),
        batch=arguments.batch,
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        device=arguments.device,
        effort=Effort(warmup=1, least=3, seconds=arguments.seconds),
    )
    content = report(setting, commit=arguments.commit)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "dylora.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(content))


if __name__ == "__main__":
    main()
