"""The examples for Trainer, TRL and QLoRA, as a person runs them: offline, on the tiny model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.examples.tiny import EXAMPLES, run_in_turn, save_base, write_lines

NAMES = ["trainer.py", "trl_sft.py", "trl_dpo.py", "qlora.py"]
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None


def saved(folder: Path) -> tuple[str, int]:
    """What was saved, once all three files are there."""
    for name in ("adapter_model.safetensors", "router.safetensors"):
        assert (folder / name).is_file()
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["peft_type"], config["num_experts"]


def logged(output: str, name: str) -> list[float]:
    """The values of one figure in what a trainer printed, in order."""
    return [float(value) for value in re.findall(rf"'{name}': '([^']+)'", output)]


@dataclass(frozen=True)
class Runs:
    """The folder of what the examples wrote, and what each printed."""

    folder: Path
    printed: dict[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All examples in one new process, since starting it costs the most."""
    folder = tmp_path_factory.mktemp("examples")
    given = ("--model", save_base(folder / "base"), "--data", write_lines(folder / "data.txt"))
    told: dict[str, tuple[object, ...]] = {
        "trainer": (EXAMPLES / "trainer.py", *given, "--steps", 4),
        "sft": (EXAMPLES / "trl_sft.py", "--steps", 4),
        # the tiny model is drawn anew each time, and the adapter fits any of them
        "dpo": (EXAMPLES / "trl_dpo.py", "--adapter", folder / "sft", "--steps", 3),
        "fresh": (EXAMPLES / "trl_dpo.py", "--steps", 2),
    }
    if HAS_BITSANDBYTES:
        told["qlora"] = (EXAMPLES / "qlora.py", *given, "--steps", 3)
    printed = run_in_turn(*[(*words, "--out", folder / name) for name, words in told.items()])
    return Runs(folder, dict(zip(told, printed, strict=True)))


@pytest.mark.slow
def test_the_trainer_example_trains_logs_and_reloads(runs: Runs) -> None:
    out, printed = runs.folder / "trainer", runs.printed["trainer"]
    assert saved(out) == ("MOELORA", 4)
    assert f"saved to {out}, loaded with 4 experts" in printed
    assert list(out.rglob("events.out.tfevents.*"))
    entropies = logged(printed, "moe/entropy")
    assert entropies
    assert all(0 < value <= math.log(4) for value in entropies)


@pytest.mark.slow
def test_the_sft_example_logs_the_router_loss(runs: Runs) -> None:
    assert saved(runs.folder / "sft") == ("MOELORA", 4)
    assert logged(runs.printed["sft"], "aux_loss")
    assert logged(runs.printed["sft"], "moe/load_max")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "fresh"])
def test_the_dpo_example_begins_at_ln_2_from_the_sft_examples_and_fresh(
    name: str, runs: Runs
) -> None:
    assert saved(runs.folder / name) == ("MOELORA", 4)
    printed = runs.printed[name]
    first, aux_loss = logged(printed, "loss")[0], logged(printed, "aux_loss")[0]
    assert first == pytest.approx(math.log(2) + 0.01 * aux_loss, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes (extra: test)")
def test_the_qlora_example_trains_saves_and_writes(runs: Runs) -> None:
    printed = runs.printed["qlora"]
    assert "trainable params" in printed
    config = json.loads((runs.folder / "qlora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"]) == ("MOELORA", 8)
    assert len(printed.splitlines()[-1].split()) > 5


@pytest.mark.parametrize("name", [*NAMES, "small_model.py"])
def test_the_example_fits_a_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
