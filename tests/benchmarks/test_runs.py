"""Tiny cases of every kind end to end on the CPU, and wrong variants that must be found out."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.baselines as baselines
import benchmarks.correctness as correctness
import benchmarks.hosttime as hosttime
import benchmarks.ops as ops
import benchmarks.runner as runner_module
from benchmarks.cases import BASE, LORA, MIXTURE, Case, Conditions, cases_of, groups_of, mixture
from benchmarks.memory import live_tensors
from benchmarks.runner import Runner, line_of, run_and_write
from benchmarks.shapes import SHAPES, BaseModels, unique_bytes
from benchmarks.steps import build_for, training_inputs
from benchmarks.timing import Effort, Step, time_steps

CPU = torch.device("cpu")
EFFORT = Effort(warmup=1, least=1, most=2, seconds=0.0)
GROUPS = groups_of(cases_of("tiny"))
TRAIN = Conditions("train", "tiny", 2, 8, dtype="fp32")
LEAK = Conditions("leak", "tiny", 2, 8, dtype="fp32")


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
    (result,) = run(Case(LEAK, baselines.Variant("loop", 3, 2, 4)))
    assert result["status"] == "wrong"
    assert "126 tensors more are alive after 10 steps" in result["reason"]


def test_a_case_that_cannot_run_does_not_take_the_others_with_it() -> None:
    wrong = Case(TRAIN, baselines.Variant("fused", 8, 2))
    results = run(wrong, Case(TRAIN, BASE))
    assert [result["status"] for result in results] == ["failed", "ok"]
    assert results[0]["reason"] == "KeyError: 'fused'"


def test_without_time_left_cases_are_skipped_and_said_to_be() -> None:
    results = run(Case(LEAK, BASE), Case(TRAIN, LORA), seconds=-1.0)
    assert [result["status"] for result in results] == ["skipped", "skipped"]
    assert line_of(results[0]).endswith("SKIPPED: no time left")


def test_the_file_is_whole_after_every_group(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "runs" / "one.json"
    prefill = Conditions("prefill", "tiny", 2, 8, dtype="fp32")
    cases = [Case(prefill, BASE), Case(prefill, LORA), Case(TRAIN, BASE)]
    seen = []
    original = Runner._join

    def join(self: Runner, case: Case, *others: Any) -> dict[str, Any]:
        seen.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
        return original(self, case, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_join", join)
        run_and_write(Runner(CPU, effort=EFFORT), cases, path, about={"suite": "tiny"})
    assert seen == [0, 0, 2]
    content = json.loads(path.read_text())
    assert [result["status"] for result in content["results"]] == ["ok", "ok", "ok"]
    assert [item.name for item in path.parent.iterdir()] == ["one.json"]
    progress = capsys.readouterr().err
    assert "prefill/tiny/2x8/fp32/eager/lora-r16: checked, ok" in progress
    assert "3/3] train/tiny/2x8/fp32/eager/base: wall_ms" in progress


def test_kernels_are_looked_at_when_everything_has_been_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[Any] = []

    def timed(steps: Sequence[Step], *rest: Any, **options: Any) -> Any:
        order.append(("timed", len(steps)))
        return time_steps(steps, *rest, **options)

    def profile(step: Any, *, top: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        assert step.run().isfinite().all()
        order.append(("profiled", top))
        return {"launches": 7.0}, [{"kernel": "gemm", "calls": 1, "ms": 1.0}]

    monkeypatch.setattr("benchmarks.runner.time_steps", timed)
    monkeypatch.setattr("benchmarks.runner.kernel_profile", profile)
    runner = Runner(CPU, effort=EFFORT, profile=2)
    monkeypatch.setattr(Runner, "looks_at_kernels", True)
    prefill = Conditions("prefill", "tiny", 2, 8, dtype="fp32")
    cases = [Case(TRAIN, BASE), Case(TRAIN, LORA), Case(prefill, BASE)]
    results = run_and_write(runner, cases, tmp_path / "one.json", about={})
    assert order == [("timed", 2), ("timed", 1), *[("profiled", 2)] * 3]
    assert [result["metrics"]["launches"] for result in results] == [7.0] * 3
    assert json.loads((tmp_path / "one.json").read_text())["results"][1]["kernels"]


def timed_with(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Sequence[Step]], Sequence[Step]]
) -> None:
    """Let ``look`` see, and change, the steps of a group before they are timed."""

    def timed(steps: Sequence[Step], *rest: Any, **options: Any) -> Any:
        return time_steps(look(steps), *rest, **options)

    monkeypatch.setattr("benchmarks.runner.time_steps", timed)


def test_a_variant_without_memory_in_its_turn_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def starve(steps: Sequence[Step]) -> Sequence[Step]:
        runs: list[int] = []

        def run_dry() -> Any:
            runs.append(1)
            # well in the warm-up, not when it is timed
            if len(runs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 57 GiB.")
            return steps[1].run()

        return [steps[0], replace(steps[1], run=run_dry), steps[2]]

    timed_with(monkeypatch, starve)
    results = run(Case(TRAIN, BASE), Case(TRAIN, LORA), Case(TRAIN, MIXTURE))
    assert [result["status"] for result in results] == ["ok", "out of memory", "ok"]
    assert results[1]["reason"].startswith("OutOfMemoryError: CUDA out of memory. Tried")
    assert "metrics" not in results[1]
    assert [results[i]["metrics"]["wall_ms"]["samples"] for i in (0, 2)] == [1, 1]


def test_a_variant_that_waits_for_its_turn_holds_no_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[Any] = []

    def keep(*arguments: Any) -> Any:
        built.append(build_for(*arguments))
        return built[-1]

    def gradients() -> list[int]:
        return [sum(p.grad is not None for p in one.trainable) for one in built]

    seen = []

    def watch(steps: Sequence[Step]) -> Sequence[Step]:
        def watched(step: Step) -> Any:
            seen.append(gradients())
            return step.run()

        return [replace(step, run=partial(watched, step)) for step in steps]

    monkeypatch.setattr("benchmarks.runner.build_for", keep)
    timed_with(monkeypatch, watch)
    run(Case(TRAIN, LORA), Case(TRAIN, MIXTURE))
    assert built[0].trainable
    assert seen
    assert all(counts == [0, 0] for counts in [*seen, gradients()])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that counts like a GPU's allocator: all that lives, and that as the peak too."""

    def live(_: Any = None) -> int:
        return live_tensors()[1]

    def nothing(_: Any = None) -> None:
        pass

    monkeypatch.setattr("benchmarks.memory.is_counted", lambda device: True)
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, live)
    # the rest of the test run need not be looked through each time
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("kind", ["train", "decode"])
def test_a_variant_needs_as_much_memory_beside_others_as_alone(kind: str) -> None:
    conditions = Conditions(kind, "tiny", 2, 8, dtype="fp32")
    variants = [LORA, MIXTURE, mixture(64), BASE]
    cases = [Case(conditions, variant) for variant in variants]
    alone = [run(case)[0]["metrics"] for case in cases]
    together = [result["metrics"] for result in run(*cases)]
    # a few small tensors are caches of the libraries, made by who comes first
    slack = 2**10 / 2**20
    for name in ("weights_mib", "peak_mib"):
        expected = [metrics[name] for metrics in alone]
        assert [m[name] for m in together] == pytest.approx(expected, rel=0, abs=slack)
    # the widest mixture's adapters alone are far more than that
    assert together[2]["weights_mib"] - together[3]["weights_mib"] > 100 * slack


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


# Whose experts are compared ----------------------------------------------------------------------


def test_a_graphs_decisions_are_those_of_a_recorded_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = []

    def capture(step: Step) -> Step:
        recorded.append(step)
        step.run()
        return Step(step.run)

    monkeypatch.setattr(correctness, "capture", capture)
    built = build_for(TRAIN, MIXTURE, BaseModels(CPU))
    inputs = training_inputs(built, TRAIN, CPU)
    forward = Step(lambda: built.call(**inputs))
    plain = correctness.record_of(MIXTURE, built, forward, TRAIN)
    assert not recorded
    in_graph = correctness.record_of(MIXTURE, built, forward, replace(TRAIN, mode="graph"))
    assert recorded == [forward]
    assert plain.routing.keys() == in_graph.routing.keys()
    for name, routing in plain.routing.items():
        other = in_graph.routing[name]
        assert torch.equal(routing.routing_weights, other.routing_weights)
        # copies: the graph's own memory is written anew by each replay
        assert routing.routing_weights.data_ptr() != other.routing_weights.data_ptr()


@pytest.mark.parametrize("kind", ["train", "prefill"])
def test_a_compiled_half_precision_mixture_is_held_against_the_slow_way_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    conditions = Conditions(kind, "tiny", 2, 8, mode="compile")
    (result,) = run(Case(conditions, MIXTURE))
    name = "loss" if kind == "train" else "logits"
    assert result["status"] == "ok", result
    assert result["errors"][name] == 0
    assert 0 < result["errors"][f"{name}, in float32"] < 1e-4
    in_float32 = [key for key in result["errors"] if key.endswith(", in float32")]
    assert len(in_float32) == (4 if kind == "train" else 1)
    (plain,) = run(Case(conditions, LORA))
    assert not any("float32" in key for key in plain["errors"])


def test_a_compiled_mixture_that_is_wrong_in_float32_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: Any) -> Any:
        def call(**inputs: Any) -> Any:
            output = model(**inputs)
            output.logits = output.logits * 1.001
            return output

        return call

    monkeypatch.setattr(torch, "compile", wrong)
    (result,) = run(Case(Conditions("prefill", "tiny", 2, 8, mode="compile"), MIXTURE))
    assert result["status"] == "wrong"
    assert "logits: relative error 1.00e-03" in result["reason"]


DECODE = Conditions("decode", "tiny", 2, 8)


def test_a_decoded_half_precision_token_is_judged_in_float32_and_by_its_own_decisions() -> None:
    (result,) = run(Case(DECODE, MIXTURE))
    assert result["status"] == "ok", result
    errors = result["errors"]
    assert errors.pop("logits") == 0
    assert errors.pop("logits of a recorded run") < 8e-2
    assert 0 < errors.pop("logits, in float32") < 1e-4
    assert not errors
    (plain,) = run(Case(DECODE, LORA))
    assert plain["errors"].keys() == {"logits"}
    (wide,) = run(Case(replace(DECODE, dtype="fp32"), MIXTURE))
    assert wide["errors"].keys() == {"logits"}


@pytest.mark.parametrize("wrong", ["in float32", "of a recorded run"])
def test_a_decoded_token_that_is_wrong_in_either_way_has_no_time(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = correctness.relative_error

    def relative_error(actual: Tensor, expected: Tensor) -> float:
        off = (actual.dtype == torch.float32) == (wrong == "in float32")
        return real(actual * 1.5 if off else actual, expected)

    monkeypatch.setattr(correctness, "relative_error", relative_error)
    (result,) = run(Case(DECODE, MIXTURE))
    assert result["status"] == "wrong"
    about = "logits" if wrong == "in float32" else "logits of a recorded run"
    assert f"{about}: relative error 5.0" in result["reason"]


# Host times --------------------------------------------------------------------------------------

HOST = Conditions("host", "tiny", 1, 4, dtype="fp32")


def test_host_times_of_a_group_come_in_turns_with_their_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[Step] = []

    def host_time(step: Step, device: torch.device, *, runs: int) -> list[float]:
        turns.append(step)
        return [10.0] * runs

    monkeypatch.setattr(hosttime, "host_time", host_time)
    results = run(Case(HOST, LORA), Case(HOST, MIXTURE))
    # a linear, the base, and both variants, forward and in training, each the same in each round
    assert len(set(map(id, turns[:8]))) == 8
    assert [id(step) for step in turns] == [id(step) for step in turns[:8]] * 5
    for result in results:
        metrics = result["metrics"]
        assert metrics["forward_us_per_linear"] == metrics["training_us_per_linear"] == 10
        assert metrics["training_added_us_per_linear"] == 0


def test_a_variant_without_host_times_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = hosttime.host_steps

    def host_steps(case: Case, bases: BaseModels) -> Any:
        if case.variant == LORA:
            raise RuntimeError("no LoRA today")
        return right(case, bases)

    monkeypatch.setattr(runner_module, "host_steps", host_steps)
    first, second = run(Case(HOST, LORA), Case(HOST, MIXTURE))
    assert (first["status"], first["reason"]) == ("failed", "RuntimeError: no LoRA today")
    assert second["status"] == "ok"
    assert second["metrics"]["training_us_per_linear"] > 0

    def failing(*_: Any) -> Any:
        raise RuntimeError("no clock")

    monkeypatch.setattr(runner_module, "measure_hosts", failing)
    (third,) = run(Case(HOST, MIXTURE))
    assert (third["status"], third["reason"]) == ("failed", "RuntimeError: no clock")
