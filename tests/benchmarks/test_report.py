"""Tables from made-up runs, the aims by hand, and that the documents hold today's tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import benchmarks.report as report
from benchmarks.bar import AIMS, Aim, number, value_of
from benchmarks.baselines import Variant
from benchmarks.cases import (
    BASE,
    CPU_TRAIN,
    LORA,
    MIXTURE,
    TRAIN_EAGER,
    TRAIN_GRAPH,
    XLORA,
    Case,
    Conditions,
    UnknownNameError,
    mixture,
)
from benchmarks.report import load, markdown, shown, tables_of, update_files, updated
from benchmarks.runner import result_of

ENVIRONMENT = {
    "device": "A GPU",
    "driver": "1.2",
    "cores": 4,
    "threads": 4,
    "python": "3.12.3",
    "libraries": {"torch": "2.11.0", "triton": None},
    "commit": "0123456789abcdef",
    "dirty": False,
}


def timed(conditions: Conditions, variant: Variant, wall: float, **metrics: Any) -> dict[str, Any]:
    quantiles = {"p20": wall - 1, "p50": wall, "p80": wall + 1, "samples": 9}
    return result_of(
        Case(conditions, variant),
        status="ok",
        errors={},
        metrics={"wall_ms": quantiles, **metrics},
    )


def run_of(*results: dict[str, Any], time: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {
        "format": 1,
        "time": time,
        "file": f"run-{time[:10]}.json",
        "environment": ENVIRONMENT,
        "ceilings": {},
        "results": list(results),
    }


STEP = run_of(
    timed(TRAIN_GRAPH, BASE, 50.0, peak_mib=100.0),
    timed(TRAIN_GRAPH, LORA, 100.0, peak_mib=200.0),
    timed(TRAIN_GRAPH, MIXTURE, 60.0, peak_mib=150.0),
    timed(TRAIN_GRAPH, mixture(64), 90.0, peak_mib=300.0),
)


def test_an_aim_is_the_quotient_of_two_medians_of_one_run() -> None:
    aim = Aim("a figure", TRAIN_GRAPH, MIXTURE, LORA, 0.65)
    value = value_of(aim, [STEP])
    assert value is not None
    assert (value.above, value.below, value.quotient) == (60.0, 100.0, pytest.approx(0.6))
    assert value.run is STEP
    assert aim.reached(0.65)
    assert not aim.reached(0.66)


def test_an_aim_to_exceed_is_reached_from_above() -> None:
    aim = Aim("a figure", TRAIN_GRAPH, LORA, MIXTURE, 10, at_least=True)
    assert aim.reached(10)
    assert not aim.reached(9.9)


def test_cases_of_different_runs_are_not_compared() -> None:
    alone = run_of(timed(TRAIN_GRAPH, MIXTURE, 1.0), time="2026-02-02T00:00:00Z")
    aim = Aim("a figure", TRAIN_GRAPH, MIXTURE, LORA, 0.65)
    assert value_of(aim, [alone]) is None
    value = value_of(aim, [alone, STEP])
    assert value is not None
    assert (value.quotient, value.run) == (pytest.approx(0.6), STEP)


def test_the_table_of_aims_shows_what_earlier_runs_gave() -> None:
    newer = run_of(
        timed(TRAIN_GRAPH, LORA, 100.0), timed(TRAIN_GRAPH, MIXTURE, 70.0), time="2026-02-02T00:00"
    )
    line = tables_of([newer, STEP])["bar"].splitlines()[4]
    assert line.endswith("| ≤ 0.65 | 0.70 | **no** | 70.0 / 100 ms | 0.60 |")


def on(run: dict[str, Any], device: str, time: str, driver: str | None = "1.2") -> dict[str, Any]:
    """The same run of another device, at another time."""
    environment = {**run["environment"], "device": device, "driver": driver}
    file = f"{device.replace(' ', '-')}-{time[:10]}.json"
    return {**run, "environment": environment, "time": time, "file": file}


OLD = on(STEP, "An H100", "2026-02-01T00:00:00Z")
NEW = on(
    run_of(
        timed(TRAIN_GRAPH, BASE, 50.0),
        timed(TRAIN_GRAPH, LORA, 100.0),
        timed(TRAIN_GRAPH, MIXTURE, 55.0),
    ),
    "An H200",
    "2026-04-01T00:00:00Z",
)
NEWER = on(NEW, "An H200", "2026-04-02T00:00:00Z")
LAPTOP = on(
    run_of(timed(CPU_TRAIN, LORA, 10.0), timed(CPU_TRAIN, MIXTURE, 12.0)),
    "A CPU",
    "2026-03-01T00:00:00Z",
    driver=None,
)
SEVERAL = [NEWER, NEW, LAPTOP, OLD]


def test_each_device_has_a_table_of_its_own_that_of_the_aims_first() -> None:
    tables = tables_of(SEVERAL)["bar"].split("**A")
    devices = ["n H100", "n H200", " CPU"]
    assert [table.split("**")[0] for table in tables[1:]] == devices
    h100, h200, cpu = (table.split("**\n\n", 1)[1].splitlines() for table in tables[1:])
    # what nobody measured stands in the first, what another measured does not
    assert sum("not measured" in line for line in h100) == len(AIMS) - 4
    assert not any("SmolLM2" in line for line in h100)
    assert "not measured" not in "".join([*h200, *cpu])
    step = "| training step, 1B, 4096 tokens, CUDA graph / one PEFT LoRA | ≤ 0.65 |"
    assert h100[2] == f"{step} 0.60 | yes | 60.0 / 100 ms |  |"
    # earlier runs are those of the same device
    assert h200[2] == f"{step} 0.55 | yes | 55.0 / 100 ms | 0.55 |"
    assert len([line for line in h200 if line]) == 2 + 2
    assert cpu[2].endswith("| ≤ 1.35 | 1.20 | yes | 12.0 / 10.0 ms |  |")


def test_without_any_run_nothing_is_measured_on_nothing() -> None:
    lines = tables_of([])["bar"].splitlines()
    assert lines[0].startswith("| figure |")
    assert sum("not measured" in line for line in lines) == len(AIMS)


def test_the_readme_shows_the_newest_gpu_and_the_newest_cpu() -> None:
    ops = on(run_of(), "A GPU of which only the ops are known", "2026-05-01T00:00:00Z")
    table, _, summary = tables_of([ops, *SEVERAL])["headlines"].partition("\n\n")
    step = "| training step, CUDA graph | one LoRA, r = 16 | 55.0 ms | 100 ms | 0.55 | ≤ 0.65 |"
    assert step in table.splitlines()
    assert "| 12.0 ms | 10.0 ms | 1.20 | ≤ 1.35 |" in table
    assert summary == (
        f"Of {len(AIMS)} figures with an aim 3 are measured and 3 reached. "
        "An H200, torch 2.11.0, peft None: data "
        "[An-H200-2026-04-02](benchmarks/results/An-H200-2026-04-02.json). "
        "A CPU, torch 2.11.0, peft None: data "
        "[A-CPU-2026-03-01](benchmarks/results/A-CPU-2026-03-01.json)."
    )


def test_the_readme_leaves_out_what_only_another_device_has_a_value_for() -> None:
    lone = on(run_of(timed(TRAIN_EAGER, LORA, 2.0), timed(TRAIN_EAGER, MIXTURE, 1.0)), "B", "2027")
    table = tables_of([lone, OLD])["headlines"]
    assert "training step, eager | one LoRA, r = 16 | 1.00 ms" in table
    assert "CUDA graph | one LoRA" not in table
    assert "prefill of 4096 tokens, eager | frozen model | not measured" in table


def test_a_group_is_replaced_by_newer_runs_of_the_same_device_only() -> None:
    tables = tables_of(SEVERAL)
    parts = [part for part in tables["training"].split("\n\n") if part.startswith("`")]
    name = "`train/llama-1b/4x1024/bf16/graph`"
    assert parts == [f"{name}, An H100", f"{name}, An H200"]
    assert "| moelora-e8-k2-r16 | 55.0 (54.0-56.0) | 1.10 | 0.55 |" in tables["training"]
    assert "An H" not in tables["cpu"]
    files = [line.split("`")[1] for line in tables["environments"].splitlines()[2:]]
    assert files == [
        "A-CPU-2026-03-01.json",
        "An-H100-2026-02-01.json",
        "An-H200-2026-04-02.json",
    ]


def test_failures_and_kernels_say_whose_they_are_when_there_are_several_devices() -> None:
    bad = result_of(Case(TRAIN_EAGER, XLORA), status="out of memory", reason="57 GiB")
    profiled = {**timed(TRAIN_GRAPH, MIXTURE, 6.0), "kernels": []}
    profiled["kernels"] = [{"kernel": "gemm", "calls": 3, "ms": 1.25}]
    one = on(run_of(bad, profiled), "An H100", "2026-01-01T00:00:00Z")
    assert "An H100" not in tables_of([one])["failures"] + tables_of([one])["profiles"]
    tables = tables_of([on(one, "An H200", "2026-01-02T00:00:00Z"), one])
    case = Case(TRAIN_EAGER, XLORA).name
    assert f"| {case}, An H100 | out of memory | 57 GiB |" in tables["failures"]
    assert f"`{Case(TRAIN_GRAPH, MIXTURE).name}`, An H200\n" in tables["profiles"]


def test_a_failure_says_which_later_run_it_worked_in() -> None:
    bad = result_of(Case(TRAIN_EAGER, XLORA), status="wrong", reason="loss: 1e0")
    others = (timed(TRAIN_EAGER, LORA, 2.0), timed(TRAIN_EAGER, MIXTURE, 1.0))
    old = on(run_of(*others, bad), "An H100", "2026-01-02T00:00:00Z")
    worked = run_of(timed(TRAIN_EAGER, XLORA, 9.0))
    later = on(worked, "An H100", "2026-01-03T00:00:00Z")
    before = on(worked, "An H100", "2026-01-01T00:00:00Z")
    elsewhere = on(worked, "An H200", "2026-01-04T00:00:00Z")
    assert "| loss: 1e0 |  |" in tables_of([elsewhere, old, before])["failures"]
    assert f"| loss: 1e0 | `{later['file']}` |" in tables_of([later, old])["failures"]


def test_a_result_that_was_wrong_counts_nowhere() -> None:
    wrong = result_of(Case(TRAIN_GRAPH, MIXTURE), status="wrong", reason="loss: 1e0")
    run = run_of(timed(TRAIN_GRAPH, LORA, 100.0), wrong)
    assert value_of(Aim("a figure", TRAIN_GRAPH, MIXTURE, LORA, 0.65), [run]) is None
    assert "| loss: 1e0 |" in tables_of([run])["failures"]


def test_the_table_of_aims_says_reached_not_reached_and_not_measured() -> None:
    lines = tables_of([STEP])["bar"].splitlines()
    assert len(lines) == 4 + len(AIMS)
    assert lines[:2] == ["**A GPU**", ""]
    assert lines[4] == (
        "| training step, 1B, 4096 tokens, CUDA graph / one PEFT LoRA | ≤ 0.65 | 0.60 | yes "
        "| 60.0 / 100 ms |  |"
    )
    missed = "| training step, 1B, CUDA graph: E = 64 / E = 8 | ≤ 1.2 | 1.50 | **no** "
    assert f"{missed}| 90.0 / 60.0 ms |  |" in lines
    assert sum("not measured" in line for line in lines) == len(AIMS) - 3


def test_the_readme_has_few_rows_of_all_kinds_and_says_how_many_aims_there_are() -> None:
    table, _, summary = tables_of([STEP])["headlines"].partition("\n\n")
    lines = table.splitlines()
    assert 6 <= len(lines) - 2 <= 8
    step = "| training step, CUDA graph | one LoRA, r = 16 | 60.0 ms | 100 ms | 0.60 | ≤ 0.65 |"
    assert step in lines
    assert lines[-1].endswith("| not measured |  |  | ≤ 1.35 |")
    reached = sum(line.count("| yes |") for line in tables_of([STEP])["bar"].splitlines())
    assert summary == (
        f"Of {len(AIMS)} figures with an aim 3 are measured and {reached} reached. "
        "A GPU, torch 2.11.0, peft None: data "
        "[run-2026-01-01](benchmarks/results/run-2026-01-01.json)."
    )


def test_the_readme_says_what_was_missed_and_puts_moelora_first() -> None:
    slow = run_of(
        timed(TRAIN_EAGER, LORA, 100.0),
        timed(TRAIN_EAGER, MIXTURE, 120.0),
        timed(TRAIN_EAGER, XLORA, 600.0),
    )
    lines = tables_of([slow])["headlines"].splitlines()
    assert (
        "| training step, eager | one LoRA, r = 16 | 120 ms | 100 ms | 1.20 | ≤ 0.7, **missed** |"
        in lines
    )
    xlora = "X-LoRA, 8 experts (its time / ours)"
    assert (
        f"| training step, eager | {xlora} | 120 ms | 600 ms | 5.00 | ≥ 10, **missed** |" in lines
    )
    assert "training memory above weights | one LoRA, r = 16 | not measured" in "\n".join(lines)


def test_every_row_of_the_readme_is_one_of_the_aims() -> None:
    assert all(headline.aim in AIMS for headline in report.HEADLINES)


def test_a_group_is_shown_with_quantiles_and_both_ratios() -> None:
    table = tables_of([STEP])["training"]
    assert table.startswith("`train/llama-1b/4x1024/bf16/graph`\n")
    assert "| base | 50.0 (49.0-51.0) | 100.0 | 1.00 | 0.50 |" in table
    assert "| moelora-e8-k2-r16 | 60.0 (59.0-61.0) | 150.0 | 1.20 | 0.60 |" in table
    # what nobody measured has no column
    assert "launches" not in table


def test_a_group_comes_from_the_newest_run_that_compares_something() -> None:
    newer = run_of(
        timed(TRAIN_GRAPH, BASE, 5.0), timed(TRAIN_GRAPH, LORA, 8.0), time="2026-02-02T00:00:00Z"
    )
    alone = run_of(timed(TRAIN_GRAPH, LORA, 1.0), time="2026-03-03T00:00:00Z")
    table = tables_of([alone, newer, STEP])["training"]
    assert "| lora-r16 | 8.00 (7.00-9.00) | 1.60 | 1.00 |" in table
    assert "run-2026-02-02.json" in tables_of([alone, newer, STEP])["environments"]


def test_results_of_the_cpu_stand_apart() -> None:
    cpu = run_of(timed(Conditions("train", "smollm2-135m", 2, 128), BASE, 5.0))
    cpu["environment"] = {**ENVIRONMENT, "device": "A CPU", "driver": None, "threads": 2}
    tables = tables_of([cpu])
    assert tables["training"] == "Not measured."
    assert "smollm2-135m" in tables["cpu"]
    assert "A CPU, 4 cores, 2 threads" in tables["environments"]


def test_ops_hosts_and_leaks_have_tables_of_their_own() -> None:
    way = {"forward_ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "forward_floor_ms": 1.0}
    way |= {"training_ms": {"p20": 2.0, "p50": 4.0, "p80": 6.0}, "training_floor_ms": 1.0}
    op = result_of(
        Case(Conditions("op", "8x8", 1, 4), Variant("fused", 8, 2)),
        status="ok",
        errors={},
        metrics={**way, "forward_over_floor": 2.0, "training_over_floor": 4.0},
    )
    host = result_of(
        Case(Conditions("host", "tiny", 1, 4), LORA),
        status="ok",
        errors={},
        metrics={"forward_us_per_linear": 20.0, "forward_added_us_per_linear": 12.5},
    )
    leak = result_of(
        Case(Conditions("leak", "tiny", 1, 4), LORA),
        status="ok",
        errors={},
        metrics={
            "steps": 200,
            "early_bytes": 100,
            "late_bytes": 164,
            "early_tensors": 3,
            "late_tensors": 3,
        },
    )
    tables = tables_of([run_of(op, host, leak)])
    assert "| fused-e8-k2-r16 | 2.00 (1.00-3.00) | 1.00 | 2.00 | 4.00" in tables["ops"]
    assert "| lora-r16 | 20.0 | 12.5 |" in tables["host"]
    assert "| lora-r16 | 200 | 64 | 0 |" in tables["leaks"]


def test_profiled_steps_of_the_default_mixture_list_their_kernels() -> None:
    profiled = timed(TRAIN_GRAPH, MIXTURE, 60.0)
    profiled["kernels"] = [{"kernel": "gemm<bf16>", "calls": 3, "ms": 1.25}]
    table = tables_of([run_of(profiled)])["profiles"]
    assert table.endswith("| `gemm<bf16>` | 3 | 1.25 |")
    assert tables_of([STEP])["profiles"] == "Not measured."


def test_only_the_text_between_markers_is_made_anew() -> None:
    text = "a\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nb\n"
    new = updated(text, [STEP])
    assert new.startswith("a\n<!-- benchmarks:begin -->\n\n**A GPU**\n\n| figure |")
    assert new.endswith("|\n\n<!-- benchmarks:end -->\nb\n")
    assert "old" not in new
    assert updated(new, [STEP]) == new


def test_a_marker_of_an_unknown_table_is_refused() -> None:
    text = "<!-- benchmarks:begin speed -->\n<!-- benchmarks:end -->\n"
    with pytest.raises(UnknownNameError, match="Unknown table 'speed': choose one of bar, "):
        updated(text, [])


def test_documents_are_rewritten_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- benchmarks:begin bar -->\n<!-- benchmarks:end -->\n")
    monkeypatch.setattr(report, "DOCUMENTS", (path,))
    assert update_files([STEP], write=False) == [path]
    assert "0.60" not in path.read_text()
    assert update_files([STEP], write=True) == [path]
    assert "| 0.60 | yes | 60.0" in path.read_text()
    assert update_files([STEP], write=True) == []


def test_runs_are_loaded_newest_first_and_other_files_refused(tmp_path: Path) -> None:
    for name, day in (("a", "02"), ("b", "03"), ("c", "01")):
        run = {**STEP, "time": f"2026-01-{day}T00:00:00Z"}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    assert [run["file"] for run in load(tmp_path)] == ["b.json", "a.json", "c.json"]
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(UnknownNameError, match="d.json has format None; 1 is known"):
        load(tmp_path)


def test_numbers_keep_their_significant_digits() -> None:
    assert [shown(x) for x in (None, 0.01234, 1.0, 12.345, 1234.5)] == [
        "",
        "0.012",
        "1.00",
        "12.3",
        "1234",
    ]
    assert markdown(["a"], [["1"]]) == "| a |\n| --- |\n| 1 |"
    assert number({"x": 2}, "x") == 2.0
    assert number({}, "x") is None


def test_the_tables_in_the_documents_are_those_of_the_committed_results() -> None:
    """If this fails: python -m benchmarks table --write."""
    assert update_files(load(report.RESULTS), write=False) == []


def test_committed_results_say_what_they_were_measured_on() -> None:
    for run in load(report.RESULTS):
        about = run["environment"]
        assert about["device"]
        assert about["commit"] != "unknown"
        assert {"torch", "peft", "transformers"} <= {k for k, v in about["libraries"].items() if v}
        for result in run["results"]:
            # how the case was timed then, not what it is
            fields = {k: v for k, v in result["conditions"].items() if k != "in_turns"}
            case = Case(Conditions(**fields), Variant(**result["sizes"]))
            assert case.name == result["case"]
            assert asdict(case.variant) == result["sizes"]
