"""LoRA folders for the tests of the command line, on the tiny model of its fixtures."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from moelora.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a run of the program gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        content: dict[str, Any] = json.loads(self.out)
        return content


def moelora(*arguments: object) -> Outcome:
    """Run the program in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def save_loras(folder: Path, base: Path) -> list[Path]:
    """Two random LoRAs of unequal rank, alpha and targets."""
    for index, (name, fields) in enumerate(
        {
            "sql": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "french": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj"]},
        }.items()
    ):
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
        torch.manual_seed(index)
        get_peft_model(model, config).save_pretrained(folder / name)
    return [folder / "sql", folder / "french"]


def assert_one_line_error(outcome: Outcome, command: str, *parts: str) -> None:
    """Code 2, nothing on standard output, one line on standard error that holds all parts."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(f"moelora {command}: error: ")
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
