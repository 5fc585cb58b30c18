"""``docs/report.md`` is run as it stands, with a tiny random model for the one it names."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moelora.cli import main
from moelora.report import RoutingReport
from tests.demo.tiny import save_tiny_model, tiny_llama
from tests.lm import mixture

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def _run_bash(block: str) -> list[str]:
    outputs = []
    for line in block.strip().splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "moelora"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main(arguments) == 0
        outputs.append(output.getvalue())
    return outputs


@pytest.fixture(scope="module")
def after_page(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the variables and the commands' outputs after all blocks ran in order."""
    folder = tmp_path_factory.mktemp("report-page")
    base = save_tiny_model(folder / "base")
    model = mixture(tiny_llama())
    model.peft_config["default"].base_model_name_or_path = base.as_posix()
    model.save_pretrained(folder / "my-mixture")
    (folder / "queries.jsonl").write_text('{"text": "SELECT 1;"}\n' * 9)
    (folder / "letters.txt").write_text("Il fait beau.\n" * 40)
    names: dict[str, Any] = {}
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, (language, block) in enumerate(BLOCKS, start=1):
            if language == "bash":
                outputs += _run_bash(block)
                continue
            code = block.replace(MODEL_NAME, base.as_posix())
            exec(compile(code, f"report.md, block {number}", "exec"), names)
    return folder, names, outputs


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) == PAGE.count("```") / 2


def test_the_page_leaves_the_files_it_names(after_page: Any) -> None:
    folder, names, outputs = after_page
    report = RoutingReport.from_json((folder / "my-report" / "report.json").read_text("utf-8"))
    assert report == names["again"]
    assert (folder / "my-report" / "report.html").is_file()
    assert (folder / "my-report.html").is_file()
    assert json.loads(outputs[1])["routers"] == 3
    assert names["report"].training.steps == [10, 20]


def test_the_picture_is_there_and_small() -> None:
    (name,) = re.findall(r"\]\((images/[^)]+)\)", PAGE)
    picture = (ROOT / "docs" / name).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) < 150_000
