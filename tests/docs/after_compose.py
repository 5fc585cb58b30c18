"""What ``docs/compose.md`` leaves."""

from __future__ import annotations

from peft import LoraConfig

import moelora
from tests.docs.blocks import After


def check_the_composed_mixture_is_inspected(after: After) -> None:
    made, told = after.names["made"], after.names["told"]
    assert [expert.name for expert in made.experts] == ["sql", "french", "shell"]
    assert [expert.rank for expert in told.experts] == [8, 16, 4]
    assert after.outcomes[1].out.startswith("skills: a mixture of 3 experts")
    assert (after.folder / "skills-report" / "report.html").is_file()


def check_only_the_router_was_trained(after: After) -> None:
    folders = [after.folder / name for name in ("to-train", "trained")]
    old_experts, new_experts = map(moelora.expert_tensors.read_experts, folders)
    assert [expert.name for expert in new_experts] == ["sql", "french", "shell"]
    for old, new in zip(old_experts, new_experts, strict=True):
        assert all(bool((old.layers[n].a == new.layers[n].a).all()) for n in old.layers)
        assert all(bool((old.layers[n].b == new.layers[n].b).all()) for n in old.layers)
    digests = [moelora.describe(folder).router for folder in folders]
    assert digests[0] != digests[1]


def check_the_exported_experts_are_plain_loras(after: After) -> None:
    french = LoraConfig.from_pretrained(after.folder / "french-again")
    assert (type(french), french.r) == (LoraConfig, 16)
    exported = after.names["exported"]
    assert (exported.name, exported.r) == ("shell", 8)
    plain = after.names["plain"].peft_config["default"]
    assert not isinstance(plain, moelora.MoELoraConfig)


def check_the_merged_lora_tells_its_distance(after: After) -> None:
    assert "Distance from the routed model on" in after.outcomes[-1].out
    assert 0 < after.names["merged"].truncation_error < 1
