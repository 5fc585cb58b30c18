"""``accelerate launch`` with each of the example's configs, on two processes of the CPU."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed.launched import IDS
from tests.examples.tiny import EXAMPLES, ROOT, run_example, save_base, write_lines
from tests.tolerances import assert_equal

FOLDER = EXAMPLES / "distributed"
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
# how far the experts of two processes may be from one's, relative to how far they moved: sums of
# gradients are rounded in another order (measured: 1e-5, FSDP2 and ZeRO-2 3e-7)
MOVED_TOLERANCE = 1e-3


def _kinds() -> list[object]:
    without = pytest.mark.skipif(
        find_spec("deepspeed") is None,
        reason="needs DeepSpeed (extra: integrations)",
    )
    return [pytest.param(k, marks=[without] if k.startswith("zero") else []) for k in TYPES]


KINDS = pytest.mark.parametrize("kind", _kinds())


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and some lines."""
    folder = tmp_path_factory.mktemp("given")
    save_base(folder / "base")
    write_lines(folder / "lines.txt")
    return folder


def arguments(given: Path) -> list[str]:
    """Of the example: four steps with a checkpoint after two."""
    data = ["--model", given / "base", "--data", given / "lines.txt"]
    steps = ["--steps", 4, "--save-steps", 2, "--cpu"]
    return [*map(str, [*data, *steps])]


@pytest.fixture(scope="module")
def launched(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a kind's trainings lie: each kind is launched once, when it is first asked for."""

    folders: dict[str, Path] = {}

    def launch(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            start(kind, folders[kind])
        assert (folders[kind] / "done").exists(), "the launch failed: see the first test of it"
        return folders[kind]

    def start(kind: str, folder: Path) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # DeepSpeed takes a CUDA toolkit for a GPU
        cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        config = ["--config_file", FOLDER / f"{kind}.yaml", "--main_process_port", free_port()]
        # the files ask for bfloat16, in which one process and two differ by more than rounding
        launcher = ["-m", "accelerate.commands.launch", *config, "--mixed_precision", "no"]
        script = [ROOT / "tests" / "distributed" / "launched.py", folder]
        distributed = ["--backend", "gloo", "--expect", TYPES[kind]]
        command = [*launcher, *script, *arguments(given), *distributed]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, **cpu},
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        (folder / "done").touch()

    return launch


@pytest.fixture(scope="module")
def one_process(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on one process, of the joined batches, without a launcher."""
    folder = tmp_path_factory.mktemp("one")
    joined = ["--out", folder / "out", "--batch-size", 4, "--expect", "NO"]
    done = run_example(FOLDER / "train.py", *arguments(given), *joined)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def adapter(folder: Path) -> dict[str, Tensor]:
    """A saved mixture's tensors."""
    return load_file(folder / "adapter_model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors by name, to the bit."""
    assert found.keys() == expected.keys()
    names = sorted(expected)
    assert_equal([found[name] for name in names], [expected[name] for name in names])


@pytest.mark.slow
@KINDS
def test_several_processes_learn_what_one_learns(
    kind: str, launched: Callable[[str], Path], one_process: Path
) -> None:
    found, expected = adapter(launched(kind) / "out"), adapter(one_process / "out")
    assert found.keys() == expected.keys()
    assert {name: t.dtype for name, t in found.items()} == {
        name: t.dtype for name, t in expected.items()
    }
    # B starts at zero, so that it is how far it has moved
    moved = [name for name in expected if "lora_B" in name]
    errors = [(found[name] - expected[name]).norm() / expected[name].norm() for name in moved]
    assert max(errors) < MOVED_TOLERANCE


@pytest.mark.slow
@KINDS
def test_resuming_ends_where_the_uninterrupted_training_ends(
    kind: str, launched: Callable[[str], Path]
) -> None:
    folder = launched(kind)
    assert_same(adapter(folder / "resumed"), adapter(folder / "out"))
    states = [
        json.loads((folder / run / "checkpoint-4" / "trainer_state.json").read_text())
        for run in ("out", "resumed")
    ]
    losses = [[entry.get("loss") for entry in state["log_history"]] for state in states]
    assert losses[0] == losses[1]
    assert len([loss for loss in losses[0] if loss is not None]) == 4


@pytest.mark.slow
@KINDS
def test_one_process_loads_what_several_saved(
    kind: str, given: Path, launched: Callable[[str], Path]
) -> None:
    folder = launched(kind)
    base = AutoModelForCausalLM.from_pretrained(given / "base", dtype="float32")
    model = PeftModel.from_pretrained(base, folder / "out").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        with model.disable_adapter():
            without = model(input_ids=IDS).logits
    assert_equal(logits, load_file(folder / "logits.safetensors")["logits"])
    assert not torch.equal(logits, without)


@pytest.mark.slow
@KINDS
def test_a_checkpoint_on_the_way_is_a_mixture_too(
    kind: str, given: Path, launched: Callable[[str], Path]
) -> None:
    folder = launched(kind)
    last = folder / "out" / "checkpoint-4"
    assert_same(adapter(last), adapter(folder / "out"))
    base = AutoModelForCausalLM.from_pretrained(given / "base", dtype="float32")
    loaded = PeftModel.from_pretrained(base, last)
    assert loaded.peft_config["default"].num_experts == 8


def test_another_kind_than_expected_stops_the_example(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(FOLDER / "train.py")
    monkeypatch.setattr(
        sys, "argv", [script, *arguments(given), "--out", str(tmp_path), "--expect", "FSDP"]
    )
    with pytest.raises(SystemExit, match=r"Expected distributed type FSDP, but got NO\."):
        runpy.run_path(script, run_name="__main__")


def test_the_example_is_short() -> None:
    assert len((FOLDER / "train.py").read_text().splitlines()) < 80
