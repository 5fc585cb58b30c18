"""The examples for Trainer and TRL, as a person runs them: offline, on the tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.examples.tiny import EXAMPLES, run_example, save_base, write_lines

NAMES = ["trainer.py", "trl_sft.py", "trl_dpo.py"]


def saved(folder: Path) -> tuple[str, int]:
    """What was saved, once all three files are there."""
    for name in ("adapter_model.safetensors", "router.safetensors"):
        assert (folder / name).is_file()
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["peft_type"], config["num_experts"]


def logged(output: str, name: str) -> list[float]:
    """The values of one figure in what a trainer printed, in order."""
    return [float(value) for value in re.findall(rf"'{name}': '([^']+)'", output)]


@pytest.mark.slow
def test_the_trainer_example_trains_logs_and_reloads(tmp_path: Path) -> None:
    data, out = write_lines(tmp_path / "data.txt"), tmp_path / "out"
    base = save_base(tmp_path / "base")
    done = run_example(
        EXAMPLES / "trainer.py",
        *("--model", base, "--data", data, "--out", out, "--steps", 4),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(out) == ("MOELORA", 4)
    assert f"saved to {out}, loaded with 4 experts" in done.stdout
    assert list(out.rglob("events.out.tfevents.*"))
    assert all(0 < value <= math.log(4) for value in logged(done.stdout, "moe/entropy"))


@pytest.mark.slow
def test_the_sft_example_trains_and_logs_the_router_loss_and_dpo_goes_on_from_it(
    tmp_path: Path,
) -> None:
    sft = run_example(EXAMPLES / "trl_sft.py", "--out", tmp_path / "sft", "--steps", 4)
    assert sft.returncode == 0, sft.stderr[-3000:]
    assert saved(tmp_path / "sft") == ("MOELORA", 4)
    assert logged(sft.stdout, "aux_loss")
    assert logged(sft.stdout, "moe/load_max")

    out = tmp_path / "dpo"
    adapter = ("--adapter", tmp_path / "sft")
    # the tiny model is drawn anew in each run, and the adapter fits any of them
    dpo = run_example(EXAMPLES / "trl_dpo.py", *adapter, "--out", out, "--steps", 3)
    assert dpo.returncode == 0, dpo.stderr[-3000:]
    assert saved(out) == ("MOELORA", 4)
    aux_loss = logged(dpo.stdout, "aux_loss")[0]
    first = logged(dpo.stdout, "loss")[0]
    assert first == pytest.approx(math.log(2) + 0.01 * aux_loss, abs=1e-3)


@pytest.mark.slow
def test_the_dpo_example_begins_at_ln_2_with_a_fresh_mixture(tmp_path: Path) -> None:
    done = run_example(EXAMPLES / "trl_dpo.py", "--out", tmp_path / "out", "--steps", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(tmp_path / "out") == ("MOELORA", 4)
    first, aux_loss = logged(done.stdout, "loss")[0], logged(done.stdout, "aux_loss")[0]
    assert first == pytest.approx(math.log(2) + 0.01 * aux_loss, abs=1e-3)


@pytest.mark.parametrize("name", [*NAMES, "small_model.py"])
def test_the_example_fits_a_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
