"""What ``README.md`` leaves."""

from __future__ import annotations

import json

from peft import LoraConfig

from tests.docs.blocks import After


def check_the_first_lines_show_how_tokens_are_routed(after: After) -> None:
    routing = after.names["routing"]
    assert routing.selected_experts.shape == (after.names["tokens"]["input_ids"].numel(), 2)
    assert after.names["loss"].requires_grad


def check_the_story_trains_and_saves_a_mixture(after: After) -> None:
    assert sorted(path.name for path in (after.folder / "my-mixture").glob("*.*")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "router.safetensors",
    ]
    config = json.loads((after.folder / "my-mixture" / "adapter_config.json").read_text("utf-8"))
    assert (config["num_experts"], config["peft_type"]) == (4, "MOELORA")


def check_adapters_become_experts_and_an_expert_an_adapter(after: After) -> None:
    assert (after.folder / "skills-report" / "report.html").is_file()
    exported = LoraConfig.from_pretrained(after.folder / "french-again")
    given = LoraConfig.from_pretrained(after.folder / "french")
    assert (type(exported), exported.r) == (LoraConfig, given.r)


def check_explicit_weights_act_and_get_gradients(after: After) -> None:
    names = after.names
    assert names["by_text"].logits.shape[:2] == names["tokens"]["input_ids"].shape
    assert names["weights"].grad.shape == names["weights"].shape


def check_the_router_is_saved_beside_its_experts(after: After) -> None:
    saved = {p.relative_to(after.folder).as_posix() for p in after.folder.rglob("*.safetensors")}
    assert {
        "my-experts/sql/adapter_model.safetensors",
        "my-experts/french/adapter_model.safetensors",
        "my-experts/router.safetensors",
    } <= saved
