"""The notebook: run from its first cell to its last on a tiny model, and the outputs it shows."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.demo.tiny import save_tiny_model
from tests.examples.tiny import EXAMPLES, ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

PATH = EXAMPLES / "moe_routing_example.ipynb"


def _read() -> Any:
    return nbformat.read(PATH, as_version=4)


def _outputs(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def _text(outputs: list[Any]) -> str:
    return "".join(out.text for out in outputs if out.get("name") == "stdout")


def _pictures(outputs: list[Any]) -> list[bytes]:
    found = [out.get("data", {}).get("image/png") for out in outputs]
    return [base64.b64decode(picture) for picture in found if picture]


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_its_text_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, value in {
        "PYTHONPATH": search,
        "HF_HUB_OFFLINE": "1",
        "MOELORA_BASE": str(save_tiny_model(tmp_path / "base")),
        "MOELORA_STEPS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = _read()
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = {"metadata": {"path": str(tmp_path)}}
    # a cell that raises ends this, and so the test
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources=folder
    ).execute()
    outputs = _outputs(notebook)
    text = _text(outputs)
    assert "The reloaded mixture gives the same logits: True" in text
    difference = re.search(r"largest difference from the mixture: (\S+)", text)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert "6 routers; the last one:\nmodel.layers.1.mlp.down_proj" in text
    assert "a mixture of 2 experts, router learned" in text
    assert len(_pictures(outputs)) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in _pictures(outputs))
    made = tmp_path / "moe-routing-example"
    assert {path.name for path in made.iterdir()} >= {"mixture", "report", "expert-0", "pair"}


def test_the_outputs_in_the_repository_are_of_one_run_and_name_no_machine() -> None:
    assert PATH.stat().st_size < 500_000
    notebook = _read()
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = _outputs(notebook)
    assert {out.output_type for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(out.get("name") != "stderr" for out in outputs)
    assert len(_pictures(outputs)) == 4
    shown = _text(outputs) + "".join(
        str(text) for out in outputs for kind, text in out.get("data", {}).items() if "text" in kind
    )
    assert len(shown) > 500
    assert re.findall(r"/(?:home|root|tmp|usr|work|opt)/|Warning", shown) == []
