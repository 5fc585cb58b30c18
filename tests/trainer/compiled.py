"""Trainings with ``torch_compile=True`` beside the same ones without: ``FOLDER CELL...``.

One process for all, since importing and warming up costs more than a cell; a line of JSON for each.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer

from moelora import AuxLossError, MoETrainerCallback
from tests.auxiliary import without_loss
from tests.lm import mixture, tiny_llama
from tests.test_trainer import (
    NON_REENTRANT,
    REENTRANT,
    UNEQUAL,
    KeepGradients,
    arguments,
    sum_of_squares,
)
from tests.trainer.test_callback import KeepLogs
from tests.trainer.test_settings import OwnLoss


@dataclass(frozen=True)
class Cell:
    """A training.

    Attributes:
        backend: of the compiler.
        fields: arguments of the Trainer.
        trainer: its class.
        trainer_fields: what else the class takes.
        logs: whether our callback is there.
        mixture: fields of the mixture.
    """

    backend: str
    fields: dict[str, Any] = field(default_factory=dict)
    trainer: Any = Trainer
    trainer_fields: dict[str, Any] = field(default_factory=dict)
    logs: bool = True
    mixture: dict[str, Any] = field(default_factory=dict)


CELLS = {
    # one kind of layer: each kernel is a file for the C++ compiler
    "labels": Cell("inductor", logs=False, mixture={"target_modules": ["v_proj"]}),
    "three_steps": Cell("aot_eager", {"max_steps": 3, "gradient_accumulation_steps": 1}),
    "per_block": Cell("eager", mixture={"router_scope": "layer"}),
    # both break the trace within the forward
    "reentrant": Cell("eager", REENTRANT),
    "non_reentrant": Cell("eager", NON_REENTRANT),
    "loss_func": Cell("aot_eager", trainer_fields={"compute_loss_func": sum_of_squares}),
    "own_loss": Cell("aot_eager", trainer=OwnLoss),
    "refused": Cell("eager", trainer=OwnLoss, logs=False),
}


def run(cell: Cell, model: PeftModel, folder: Path, **fields: Any) -> tuple[list[Tensor], Any]:
    """The gradients of the first step, and what was logged."""
    gradients, logs = KeepGradients(), KeepLogs()
    model = copy.deepcopy(model)
    trainer = cell.trainer(
        model=model,
        args=arguments(
            folder,
            **{
                "gradient_accumulation_steps": len(UNEQUAL),
                "logging_steps": 1,
                "learning_rate": 0.0,
                **cell.fields,
                **fields,
            },
        ),
        train_dataset=UNEQUAL,
        data_collator=lambda items: dict(items[0]),
        callbacks=[gradients, logs, *([MoETrainerCallback()] if cell.logs else [])],
        **cell.trainer_fields,
    )
    if cell.trainer is OwnLoss:
        trainer.loss_is_scaled_for_ga = True
    trainer.train()
    figures = [{k: v for k, v in log.items() if k.startswith("moe/")} for log in logs.logs]
    return gradients.steps[0], [each for each in figures if each]


def verdict(cell: Cell, folder: Path) -> dict[str, Any]:
    """How a compiled training compares with a plain one."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fields: dict[str, Any] = {"target_modules": ["v_proj", "down_proj"], **cell.mixture}
    model = mixture(
        tiny_llama(dtype=torch.float32, num_hidden_layers=1),
        router_aux_loss_coef=2.0,
        expert_capacity_factor=1.0,
        **fields,
    )
    has_compiler = shutil.which("g++") or shutil.which("clang++")
    backend = "aot_eager" if cell.backend == "inductor" and not has_compiler else cell.backend
    compiled: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": backend}
    try:
        found, found_logs = run(cell, model, folder, **compiled)
    except AuxLossError as error:
        return {"error": str(error)}
    expected, expected_logs = run(cell, model, folder)
    without, _ = run(cell, without_loss(model), folder)
    close = [
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True)
    ]
    same = [torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, without, strict=True)]
    return {
        "error": None,
        "close": all(close),
        "matters": not all(same),
        "logs": found_logs,
        "expected_logs": expected_logs,
    }


def main() -> None:
    """Write a line for each cell."""
    warnings.simplefilter("ignore")
    folder, *cells = sys.argv[1:]
    # every training ends with a garbage collection: not of what the imports made
    gc.freeze()
    for name in cells:
        result = verdict(CELLS[name], Path(folder) / name)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        line = json.dumps({"cell": name, "graphs": graphs, **result})
        sys.stdout.write(f"CELL {line}\n")
