"""DyLoRA-MoE on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.dylora import DyLoRAMoE
from tests.dylora.tiny import counting, llama, randomise, token_ids
from tests.tolerances import assert_equal

SCOPES = ["module", "model"]


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_skills_and_experts_are_loaded_as_they_were(scope: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"lora_r": 4, "lora_dropout": 0.0, "router_scope": scope}
    model = DyLoRAMoE(llama(), num_experts=0, similarity_threshold=0.9999, **options)
    for first in (2, 30, 50):
        model.add_new_skill(f"from_{first}", counting(12, first=first), r=first // 10 + 1)
    model.mature("from_2")
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = DyLoRAMoE.from_pretrained(llama(), tmp_path, **options)
    assert loaded.skill_library.names == ["from_2", "from_30", "from_50"]
    assert [loaded.expert_manager.is_mature(e) for e in range(3)] == [True, False, False]
    assert loaded.expert_manager.is_frozen("from_2")
    ids = token_ids()
    assert_equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert_equal(loaded(ids, expert_id=1).logits, model(ids, expert_id=1).logits)
    assert loaded.add_new_skill("from_20", counting(12, first=20), force=True) == 3
