"""The page of the DyLoRA example: its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.examples.tiny import EXAMPLES, save_base

PAGE = EXAMPLES / "dylora" / "README.md"


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    base = save_base(tmp_path / "base")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    monkeypatch.chdir(tmp_path)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", base.as_posix())
    exec(code.replace('"SELECT name FROM users;", "SELECT 1;"', '"w1 w2 w3", "w4 w5"'), {})
    assert (tmp_path / "my-experts" / "sql" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-experts" / "skill_library.safetensors").is_file()
