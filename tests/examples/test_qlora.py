"""The QLoRA example, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.tiny import EXAMPLES, run_example, save_base, write_lines

pytest.importorskip("bitsandbytes")


@pytest.mark.slow
def test_the_example_trains_saves_and_writes(tmp_path: Path) -> None:
    base, data = save_base(tmp_path / "base"), write_lines(tmp_path / "data.txt")
    done = run_example(
        EXAMPLES / "qlora.py",
        *("--model", base, "--data", data, "--out", tmp_path / "out", "--steps", 3),
    )
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"]) == ("MOELORA", 8)
    assert len(done.stdout.splitlines()[-1].split()) > 5


def test_the_example_fits_a_page() -> None:
    assert len((EXAMPLES / "qlora.py").read_text(encoding="utf-8").splitlines()) < 80
