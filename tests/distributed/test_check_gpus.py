"""The script for several GPUs, on two processes of the CPU: DDP and FSDP2 against one process."""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import pytest

from tests.examples.tiny import EXAMPLES, run_example

SCRIPT = EXAMPLES / "distributed" / "check_gpus.py"
CHECKS = {
    *(f"DDP: gradients, scope {scope}" for scope in ("module", "layer", "model")),
    *(f"DDP: gradients, balance over ranks, {kind}" for kind in ("aux_loss", "switch", "z_loss")),
    "DDP: 64 experts, one per token",
    "DDP: gradients, non-reentrant checkpointing",
    "DDP: gradients, reentrant checkpointing",
    "DDP: parameters after 5 steps",
    "DDP: saved, reloaded on one process",
    *(f"FSDP2: gradients, scope {scope}" for scope in ("module", "layer", "model")),
    "FSDP2: gradients, non-reentrant checkpointing",
    "FSDP2: gradients, reentrant checkpointing",
    "FSDP2: parameters after 5 steps",
    "FSDP2: resuming continues to the bit",
    "FSDP2: saved, reloaded on one process",
    "FSDP2: bfloat16, the loss falls",
    *(
        f"{kind}: experts, one frozen, {how}{step}"
        for kind in ("DDP", "FSDP2")
        for how in ("weights given", "a router attached")
        for step in ("", ", step")
    ),
}
GPU_CHECKS = {"on another GPU than the current one", "layers on two GPUs"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by check."""
    report = tmp_path_factory.mktemp("report") / "report.json"
    done = run_example(SCRIPT, "--device", "cpu", "--report", report)
    assert report.is_file(), done.stderr[-3000:]
    ranks = json.loads(report.read_text())["ranks"]
    return [{entry["check"]: entry for entry in rank} for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted(CHECKS))
def test_two_processes_do_what_one_does(check: str, results: list[dict[str, Any]]) -> None:
    assert len(results) == 2
    for rank in results:
        assert rank[check]["result"] == "ok", rank[check]["note"]


@pytest.mark.slow
def test_the_script_checks_all_of_these(results: list[dict[str, Any]]) -> None:
    assert [set(rank) for rank in results] == [CHECKS | GPU_CHECKS] * 2


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted(GPU_CHECKS))
def test_what_needs_gpus_is_said_to_be_left_out(check: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank[check]["result"] == "skip"
        assert rank[check]["note"] == "needs two GPUs"


def test_without_gpus_the_script_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # its checks are a package beside it
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", "999"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith("999 GPUs are needed, ")
