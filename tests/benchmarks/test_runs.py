"""Tiny cases of every kind end to end on the CPU, and wrong variants that must be found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.baselines as baselines
import benchmarks.ops as ops
from benchmarks.cases import BASE, LORA, MIXTURE, Case, Conditions, cases_of, groups_of
from benchmarks.runner import Runner, line_of, run_and_write
from benchmarks.shapes import SHAPES, BaseModels, unique_bytes
from benchmarks.timing import Effort

CPU = torch.device("cpu")
EFFORT = Effort(warmup=1, least=1, most=2, seconds=0.0)
GROUPS = groups_of(cases_of("tiny"))
TRAIN = Conditions("train", "tiny", 2, 8, dtype="fp32")


def run(*cases: Case, **options: Any) -> list[dict[str, Any]]:
    return list(Runner(CPU, effort=EFFORT, leak_steps=10, **options).run(cases))


@pytest.mark.parametrize("conditions", GROUPS, ids=lambda conditions: conditions.name)
def test_every_kind_of_case_runs_and_is_right(conditions: Conditions) -> None:
    results = run(*GROUPS[conditions])
    assert [(r["case"], r["status"], r.get("reason")) for r in results] == [
        (case.name, "ok", None) for case in GROUPS[conditions]
    ]
    for result in results:
        assert result["metrics"]
        json.dumps(result)
        if result["sizes"]["kind"] not in {"base", "linear"} and conditions.kind != "generate":
            assert result["errors"]


def test_training_compares_the_gradients_of_a_b_and_the_router() -> None:
    (result,) = run(Case(TRAIN, MIXTURE))
    assert sorted(result["errors"]) == [
        "gradient of lora_A",
        "gradient of lora_B",
        "gradient of lora_router",
        "loss",
    ]


def test_a_baseline_that_leaves_out_an_expert_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.loop_forward

    def forgetful(layer: Any, x: Tensor, *args: Any, weights: Tensor, **kwargs: Any) -> Tensor:
        return right(layer, x, *args, weights=weights * (torch.arange(3) > 0), **kwargs)

    monkeypatch.setattr(baselines, "loop_forward", forgetful)
    (result,) = run(Case(TRAIN, baselines.Variant("loop", 3, 2, 4)))
    assert result["status"] == "wrong"
    assert "relative error" in result["reason"]
    assert "metrics" not in result


def test_a_mixture_whose_loss_lacks_the_balancing_part_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = baselines.MoELoraConfig
    monkeypatch.setattr(
        baselines, "MoELoraConfig", lambda **fields: right(**fields, router_aux_loss_coef=0.0)
    )
    (result,) = run(Case(TRAIN, MIXTURE))
    assert result["status"] == "wrong"
    assert "gradient of lora_router" in result["reason"]


def test_an_op_with_a_wrong_weight_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.lora_combine
    monkeypatch.setattr(ops, "lora_combine", lambda x, a, b, w: right(x, a, b, 1.01 * w))
    case = Case(
        Conditions("op", "32x48", 1, 8, dtype="fp32"), baselines.Variant("combine", 4, 2, 4)
    )
    (result,) = run(case)
    assert result["status"] == "wrong"
    assert "values: 1.00e-02" in result["reason"]


def test_a_step_that_keeps_a_tensor_each_time_is_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    right = baselines.loop_forward

    def hoarding(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.append(x.detach().clone())
        return right(layer, x, *args, **kwargs)

    monkeypatch.setattr(baselines, "loop_forward", hoarding)
    leak = Conditions("leak", "tiny", 2, 8, dtype="fp32")
    (result,) = run(Case(leak, baselines.Variant("loop", 3, 2, 4)))
    assert result["status"] == "wrong"
    assert "126 tensors more are alive after 10 steps" in result["reason"]


def test_a_case_that_cannot_run_does_not_take_the_others_with_it() -> None:
    wrong = Case(TRAIN, baselines.Variant("fused", 8, 2))
    results = run(wrong, Case(TRAIN, BASE))
    assert [result["status"] for result in results] == ["failed", "ok"]
    assert results[0]["reason"] == "KeyError: 'fused'"


def test_without_time_left_cases_are_skipped_and_said_to_be() -> None:
    turns = Conditions("train", "tiny", 2, 8, dtype="fp32", in_turns=True)
    results = run(Case(TRAIN, BASE), Case(turns, LORA), seconds=-1.0)
    assert [result["status"] for result in results] == ["skipped", "skipped"]
    assert line_of(results[0]).endswith("SKIPPED: no time left")


def test_the_file_is_whole_after_every_case(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "runs" / "one.json"
    cases = [Case(Conditions("prefill", "tiny", 2, 8, dtype="fp32"), BASE), Case(TRAIN, BASE)]
    runner = Runner(CPU, effort=EFFORT)
    seen = []
    original = Runner._outcome

    def outcome(self: Runner, case: Case) -> dict[str, Any]:
        if path.exists():
            seen.append(len(json.loads(path.read_text())["results"]))
        return original(self, case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_outcome", outcome)
        run_and_write(runner, cases, path, about={"suite": "tiny"})
    assert seen == [1]
    content = json.loads(path.read_text())
    assert [result["status"] for result in content["results"]] == ["ok", "ok"]
    assert [item.name for item in path.parent.iterdir()] == ["one.json"]
    progress = capsys.readouterr().err
    assert "2/2] train/tiny/2x8/fp32/eager/base: wall_ms" in progress


def test_kernels_are_looked_at_when_everything_has_been_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order = []
    measured = Runner._outcome

    def outcome(self: Runner, case: Case) -> dict[str, Any]:
        order.append(("timed", case.variant.name))
        return measured(self, case)

    def profile(step: Any, *, top: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        assert step.run().isfinite()
        order.append(("profiled", top))
        return {"launches": 7.0}, [{"kernel": "gemm", "calls": 1, "ms": 1.0}]

    monkeypatch.setattr(Runner, "_outcome", outcome)
    monkeypatch.setattr("benchmarks.runner.kernel_profile", profile)
    runner = Runner(CPU, effort=EFFORT, profile=2)
    monkeypatch.setattr(Runner, "looks_at_kernels", True)
    cases = [Case(TRAIN, BASE), Case(TRAIN, LORA)]
    results = run_and_write(runner, cases, tmp_path / "one.json", about={})
    kinds = [kind for kind, _ in order]
    assert kinds == ["timed", "timed", "profiled", "profiled"]
    assert [result["metrics"]["launches"] for result in results] == [7.0, 7.0]
    assert json.loads((tmp_path / "one.json").read_text())["results"][1]["kernels"]


def test_copies_of_a_base_model_share_its_weights_but_no_module() -> None:
    bases = BaseModels(CPU)
    one, other = bases.copy_of("tiny", "fp32"), bases.copy_of("tiny", "fp32")
    assert one.model.layers[0] is not other.model.layers[0]
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert left is right
    # embeddings are tied, and count once
    sizes = SHAPES["tiny"].fields
    assert unique_bytes(one) < 4 * sum(p.numel() for p in one.parameters()) + 1000
    assert sizes["tie_word_embeddings"]
