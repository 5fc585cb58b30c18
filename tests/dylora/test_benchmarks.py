"""The benchmarks of DyLoRA's plan at tiny size: what they check, and what they report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import dylora
from benchmarks.correctness import WrongResultError
from benchmarks.shapes import BaseModels
from benchmarks.timing import Effort
from examples.dylora import DyLoRAMoE
from tests.dylora.tiny import llama, randomise, token_ids

SETTING = dylora.Setting(
    shape="tiny",
    experts=(2, 4),
    r=2,
    batch=2,
    tokens=16,
    effort=Effort(warmup=1, least=2, most=3, seconds=0.0),
)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return dylora.report(SETTING)


def test_the_report_names_what_was_measured_and_where(content: dict[str, Any]) -> None:
    assert json.loads(json.dumps(content))["setting"]["experts"] == [2, 4]
    # of a build for one device, the packaged version may lack the build's name
    measured_with = content["environment"]["libraries"]["torch"]
    assert measured_with.split("+")[0] == torch.__version__.split("+")[0]
    assert list(content["speed"]) == list(content["memory"]) == ["2", "4"]


def test_the_speed_of_every_way_is_reported(content: dict[str, Any]) -> None:
    for result in content["speed"].values():
        for kind in ("forward", "train"):
            times, speedup = result[kind]["wall_ms"], result[kind]["speedup"]
            assert list(times) == list(speedup) == list(dylora.WAYS)
            for way, quantiles in times.items():
                assert 0 < quantiles["p20"] <= quantiles["p50"] <= quantiles["p80"]
                assert speedup[way] == pytest.approx(quantiles["p50"] / times["one pass"]["p50"])


def test_the_memory_of_every_way_is_reported(content: dict[str, Any]) -> None:
    for result in content["memory"].values():
        for kind in ("forward", "train"):
            peaks, ratios = result[kind]["peak_bytes"], result[kind]["over_one_lora"]
            assert list(peaks) == list(dylora.WAYS)
            assert all(peak > 0 for peak in peaks.values())
            assert ratios["one LoRA"] == 1.0
            assert ratios["one pass"] == peaks["one pass"] / peaks["one LoRA"]
            totals = result[kind]["total_bytes"]
            assert all(totals[way] > peak for way, peak in peaks.items())
            total = totals["one pass"] / totals["one LoRA"]
            assert result[kind]["total_over_one_lora"]["one pass"] == total


def test_a_pass_for_each_expert_keeps_more_for_backward(content: dict[str, Any]) -> None:
    peaks = {e: r["train"]["peak_bytes"] for e, r in content["memory"].items()}
    assert peaks["4"]["N+1 passes"] > 1.5 * peaks["2"]["N+1 passes"]
    assert peaks["4"]["one pass"] < peaks["4"]["N+1 passes"] / 2


def test_the_table_has_a_row_for_every_way(content: dict[str, Any]) -> None:
    rows = dylora.table(content).splitlines()
    assert len(rows) == 2 + 2 * len(dylora.WAYS)
    assert [row.split(" | ")[1] for row in rows[2:6]] == list(dylora.WAYS)
    median = content["speed"]["2"]["forward"]["wall_ms"]["one pass"]["p50"]
    assert f"{median:.1f}" in rows[3]


@pytest.mark.parametrize("scope", ["module", "model"])
def test_every_routed_layer_is_checked(scope: Any) -> None:
    model = DyLoRAMoE(llama(), num_experts=3, lora_r=4, lora_dropout=0.0, router_scope=scope)
    randomise(model)
    assert 0 < dylora.check(model, token_ids(), dtype="fp32") < 1e-4


def test_a_layer_that_leaves_out_an_expert_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DyLoRAMoE(llama(), num_experts=3, lora_r=4, lora_dropout=0.0)
    randomise(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("1.self_attn.v_proj"))
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, **kw: 0.99 * right(x, **kw))
    with pytest.raises(WrongResultError, match=r"layers\.1\.self_attn\.v_proj is off by"):
        dylora.check(model, token_ids(), dtype="fp32")


def test_a_wrong_way_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dylora, "_slow_layer", lambda layer, x, _routing: layer.base_layer(x))
    with pytest.raises(WrongResultError, match="is off by"):
        dylora.ways_of(SETTING, BaseModels(torch.device("cpu")), experts=2)
