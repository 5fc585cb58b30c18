"""FLOPs, bytes and floors by hand; pictures from made-up runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.baselines import Variant
from benchmarks.cases import BASE, LORA, SWEEP, SWEEP_LONG, Case, Conditions, mixture
from benchmarks.roofline import Ceilings, measure_ceilings, work_of
from benchmarks.runner import result_of
from tests.benchmarks.test_report import run_of, timed


def test_the_work_of_a_frozen_linear() -> None:
    sizes = {"ranks": 0, "with_base": True, "itemsize": 2}
    forward = work_of(10, 4, 6, **sizes, training=False)
    # 2 T in out; x, y and W once
    assert forward.flops == 480
    assert forward.moved == 2 * (40 + 60 + 24)
    training = work_of(10, 4, 6, **sizes, training=True)
    # dx = dy W: as much again; dy is read, dx written, W read again
    assert training.flops == 960
    assert training.moved == 2 * (40 + 60 + 24) * 2


def test_the_work_of_an_update_counts_two_products_forward_and_four_backward() -> None:
    sizes = {"ranks": 2, "with_base": False, "itemsize": 2}
    forward = work_of(10, 4, 6, **sizes, training=False)
    assert forward.flops == 2 * 10 * 2 * (4 + 6)
    training = work_of(10, 4, 6, **sizes, training=True)
    assert training.flops == 3 * forward.flops
    # x twice more in backward than y; A and B twice; their gradients in float32
    assert training.moved == 2 * (100 + 20) + 2 * (100 + 40 + 20) + 4 * 20


def test_base_and_update_together_read_the_input_once() -> None:
    sizes = {"itemsize": 2, "training": False}
    both = work_of(10, 4, 6, ranks=2, with_base=True, **sizes)
    base = work_of(10, 4, 6, ranks=0, with_base=True, **sizes)
    update = work_of(10, 4, 6, ranks=2, with_base=False, **sizes)
    assert both.flops == base.flops + update.flops
    assert both.moved == base.moved + update.moved - 2 * (40 + 60)


def test_the_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    ceilings = Ceilings(flops=1e12, bandwidth=1e9)
    assert ceilings.floor_ms(2e9, 0) == pytest.approx(2.0)
    assert ceilings.floor_ms(2e9, 3e6) == pytest.approx(3.0)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bandwidth < 1e13


def test_pictures_are_drawn_of_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw_all

    results = [timed(SWEEP, BASE, 5.0, peak_mib=1.0), timed(SWEEP, LORA, 9.0, peak_mib=2.0)]
    results += [timed(SWEEP, mixture(e), 5.0 + e / 8, peak_mib=1.0 + e) for e in (2, 8, 64)]
    results += [timed(SWEEP_LONG, BASE, 9.0, peak_mib=4.0)]
    way = {"p50": 1.0}
    metrics = {"forward_flops": 1e9, "forward_bytes": 1e6, "forward_ms": way}
    metrics |= {"training_flops": 3e9, "training_bytes": 2e6, "training_ms": way}
    op = Case(Conditions("op", "8x8", 1, 4), Variant("fused", 8, 2))
    results.append(result_of(op, status="ok", errors={}, metrics=metrics))
    run = run_of(*results)
    run["ceilings"] = {"bf16": {"flops": 8e14, "bandwidth": 3e12}}
    drawn = draw_all([run], tmp_path)
    assert [path.name for path in drawn] == [
        "benchmark-experts.svg",
        "benchmark-tokens.svg",
        "benchmark-roofline.svg",
    ]
    first = [path.read_bytes() for path in drawn]
    assert b"one PEFT LoRA" in first[0]
    assert all(b">A GPU<" in content for content in first)
    # other mixtures of the same sizes are no points of the line
    others = [replace(mixture(8), adapter_dtype="base"), mixture(8, detail="layer")]
    results += [timed(SWEEP, variant, 7.0, peak_mib=9.0) for variant in others]
    run = {**run, "results": results}
    assert [path.read_bytes() for path in draw_all([run], tmp_path)] == first
    assert draw_all([], tmp_path / "none") == []
    # a newer device that was not swept is not drawn, one that was is
    newer = {**run, "environment": {**run["environment"], "device": "Another GPU"}}
    alone = {**newer, "results": results[:2]}
    assert [path.read_bytes() for path in draw_all([alone, run], tmp_path)] == first
    for path in draw_all([newer, run], tmp_path):
        assert b">Another GPU<" in path.read_bytes()
