"""``docs/migration.md`` is run as it stands, on a tiny model and a checkpoint in the old layout."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.cli import main
from moelora.gate_router import GateRouter
from tests.demo.tiny import save_tiny_model, tiny_llama
from tests.validation.old_checkpoints import old_gate, old_model, save_old

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _run_bash(block: str) -> None:
    for line in block.strip().splitlines():
        command, *arguments = shlex.split(line, comments=True)
        if command == "pip":
            assert arguments[0] in ("install", "uninstall")
            continue
        assert command == "moelora"
        assert main(arguments) == 0, line


@pytest.fixture(scope="module")
def after_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and the variables after all blocks ran in order."""
    folder = tmp_path_factory.mktemp("migration")
    base = save_tiny_model(folder / "base")
    save_old(
        folder / "results" / "checkpoint-500",
        old_model(3, base=tiny_llama()),
        router="pt",
        gate=old_gate(3),
    )
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, (language, block) in enumerate(BLOCKS, start=1):
            block = block.replace(MODEL_NAME, base.as_posix())
            if language == "bash":
                _run_bash(block)
            else:
                exec(compile(block, f"migration.md, block {number}", "exec"), names)
    return folder, names


def test_every_block_is_of_a_language_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert len(BLOCKS) == PAGE.count("```") / 2


def test_the_reports_and_the_converted_experts_are_there(after_page: Any) -> None:
    folder, _ = after_page
    for path in (
        "report/report.html",
        "experts/router.safetensors",
        "experts/conversion.json",
        "mixture-trained/adapter_model.safetensors",
        "report-growing/report.json",
    ):
        assert (folder / path).is_file()


def test_the_two_passes_are_those_of_the_old_checkpoint(after_page: Any) -> None:
    _, names = after_page
    model, gate = old_model(3, base=tiny_llama()), old_gate(3)
    model.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
    with torch.no_grad():
        hidden = model(**names["batch"], output_hidden_states=True).hidden_states[-1]
        expected = model(**names["batch"], routing_weights=gate(hidden)).logits
    torch.testing.assert_close(names["logits"], expected)
    # where weights are mean ones, N+1 passes are another function
    assert not torch.allclose(names["old_logits"], expected, atol=1e-3)


def test_the_old_router_routes_by_itself_and_writes(after_page: Any) -> None:
    _, names = after_page
    assert isinstance(names["router"], GateRouter)
    assert names["routed"].shape == names["logits"].shape
    assert names["text"].shape[1] == names["batch"]["input_ids"].shape[1] + 4


def test_only_routers_learnt_in_the_mixture_and_only_the_new_skill_in_the_manager(
    after_page: Any,
) -> None:
    folder, names = after_page
    saved = [
        moelora.expert_tensors.read_experts(folder / n) for n in ("mixture", "mixture-trained")
    ]
    for old, new in zip(*saved, strict=True):
        assert all(torch.equal(old.layers[n].a, new.layers[n].a) for n in old.layers)
    manager = names["manager"]
    assert manager.get_all_adapter_names() == ["sql", "french", "shell"]
    original = moelora.expert_tensors.read_experts(folder / "experts" / "expert_0")[0]
    kept = moelora.expert_tensors.read_experts(folder / "growing" / "sql")[0]
    assert original.layers.keys() == kept.layers.keys()
    assert all(torch.equal(original.layers[n].a, kept.layers[n].a) for n in kept.layers)
    assert manager.all_mature


def test_every_message_of_the_table_is_one_of_ours() -> None:
    table = PAGE.split("## Troubleshooting")[1]
    messages = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    assert len(messages) >= 10
    files = sorted((ROOT / "moelora").rglob("*.py"))
    # strings that are broken over lines are one message
    sources = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text("utf-8")) for path in files)
    assert [message for message in messages if message not in sources] == []


def test_every_name_of_ours_in_the_tables_exists() -> None:
    names = re.findall(r"`moelora\.(\w+)", PAGE.split("## Names")[1].split("## Trouble")[0])
    assert len(names) == 4
    assert [name for name in names if not hasattr(moelora, name)] == []
