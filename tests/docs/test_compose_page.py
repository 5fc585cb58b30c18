"""``docs/compose.md`` is run as it stands, with a tiny random model for the one it names."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import moelora
from tests.cli.adapters import moelora as run_moelora
from tests.demo.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGES = ("python", "bash")


def _blocks() -> list[tuple[str, str]]:
    """Language and content of every block, also of indented ones."""
    pattern = r"^( *)```(\w*)\n(.*?)^\1```$"
    found = re.findall(pattern, PAGE, flags=re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(code)) for _, language, code in found]


def _run_bash(block: str) -> list[str]:
    """Run every ``moelora`` line; other commands must be the installation."""
    outputs = []
    for line in block.strip().splitlines():
        command, *arguments = shlex.split(line, comments=True)
        if command == "pip":
            assert arguments == ["install", "moelora"]
            continue
        assert command == "moelora"
        outcome = run_moelora(*arguments)
        assert outcome.code == 0, outcome.err
        outputs.append(outcome.out)
    return outputs


@pytest.fixture(scope="module")
def after_page(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the variables and the commands' outputs after all blocks ran in order."""
    folder = tmp_path_factory.mktemp("compose-page")
    model = save_tiny_model(folder / "base")
    for name in ("sql", "french"):
        (folder / f"{name}.txt").write_text(f"some {name} text, to be routed\n" * 5)
    names: dict[str, Any] = {}
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, (language, block) in enumerate(_blocks(), start=1):
            if language == "bash":
                outputs += _run_bash(block)
                continue
            code = block.replace(MODEL_NAME, model.as_posix())
            exec(compile(code, f"compose.md, block {number}", "exec"), names)
    return folder, names, outputs


def test_every_block_is_of_a_language_that_is_run() -> None:
    assert {language for language, _ in _blocks()} == set(LANGUAGES)
    assert len(_blocks()) == PAGE.count("```") / 2


def test_the_composed_mixture_is_inspected(after_page: Any) -> None:
    folder, names, outputs = after_page
    assert [expert.name for expert in names["made"].experts] == ["sql", "french", "shell"]
    assert [expert.rank for expert in names["told"].experts] == [8, 16, 4]
    assert outputs[1].startswith("skills: a mixture of 3 experts")
    assert (folder / "skills-report" / "report.html").is_file()


def test_only_the_router_was_trained(after_page: Any) -> None:
    folder, _, _ = after_page
    before, after = (
        moelora.expert_tensors.read_experts(folder / n) for n in ("to-train", "trained")
    )
    assert [expert.name for expert in after] == ["sql", "french", "shell"]
    for old, new in zip(before, after, strict=True):
        assert all(bool((old.layers[n].a == new.layers[n].a).all()) for n in old.layers)
        assert all(bool((old.layers[n].b == new.layers[n].b).all()) for n in old.layers)
    digests = [moelora.describe(folder / n).router for n in ("to-train", "trained")]
    assert digests[0] != digests[1]


def test_the_exported_experts_are_plain_loras(after_page: Any) -> None:
    folder, names, _ = after_page
    french = LoraConfig.from_pretrained(folder / "french-again")
    assert (type(french), french.r) == (LoraConfig, 16)
    assert (names["exported"].name, names["exported"].r) == ("shell", 8)
    assert not isinstance(names["plain"].peft_config["default"], moelora.MoELoraConfig)


def test_the_merged_lora_tells_its_distance(after_page: Any) -> None:
    _, names, outputs = after_page
    assert "Distance from the routed model on" in outputs[-1]
    assert 0 < names["merged"].truncation_error < 1


def test_every_message_of_the_table_exists_in_the_library() -> None:
    rows = re.findall(r"^\| `([^`]+)` +\|", PAGE.split("When something is refused")[1], re.M)
    sources = "".join(
        re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in (ROOT / "moelora").glob("*.py")
    )
    plain = re.sub(r"\{[^}]*\}", "", sources)
    for row in rows[1:]:
        words = re.sub(r"='[^']*'|=True", "=", row).strip(". ")
        assert words.replace("use_dora", "") in plain, row
