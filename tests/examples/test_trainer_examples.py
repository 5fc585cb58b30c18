"""The examples for Trainer and TRL, as a person runs them: offline, on the tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.examples.tiny import EXAMPLES, run_example, run_in_turn, save_base, write_lines

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
def test_the_sft_example_logs_the_router_loss_and_dpo_begins_at_ln_2_fresh_and_from_it(
    tmp_path: Path,
) -> None:
    sft, dpo, fresh = (tmp_path / name for name in ("sft", "dpo", "fresh"))
    printed, *of_dpo = run_in_turn(
        (EXAMPLES / "trl_sft.py", "--out", sft, "--steps", 4),
        # the tiny model is drawn anew each time, and the adapter fits any of them
        (EXAMPLES / "trl_dpo.py", "--adapter", sft, "--out", dpo, "--steps", 3),
        (EXAMPLES / "trl_dpo.py", "--out", fresh, "--steps", 2),
    )
    for out in (sft, dpo, fresh):
        assert saved(out) == ("MOELORA", 4)
    assert logged(printed, "aux_loss")
    assert logged(printed, "moe/load_max")
    assert len(of_dpo) == 2
    for each in of_dpo:
        first, aux_loss = logged(each, "loss")[0], logged(each, "aux_loss")[0]
        assert first == pytest.approx(math.log(2) + 0.01 * aux_loss, abs=1e-3)


@pytest.mark.parametrize("name", [*NAMES, "small_model.py"])
def test_the_example_fits_a_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
