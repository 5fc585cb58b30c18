"""What ``README.md`` leaves."""

from __future__ import annotations

from tests.docs.blocks import After


def check_the_story_trains_and_saves_a_mixture(after: After) -> None:
    assert sorted(path.name for path in (after.folder / "my-mixture").glob("*.*")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "router.safetensors",
    ]
    assert after.names["config"].num_experts == 4


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
