"""What ``docs/migration.md`` leaves of a checkpoint in the old layout."""

from __future__ import annotations

import torch

import moelora
from moelora.gate_router import GateRouter
from tests.demo.tiny import tiny_llama
from tests.docs.blocks import After
from tests.validation.old_checkpoints import old_gate, old_model


def check_the_reports_and_the_converted_experts_are_there(after: After) -> None:
    for path in (
        "report/report.html",
        "experts/router.safetensors",
        "experts/conversion.json",
        "mixture-trained/adapter_model.safetensors",
        "report-growing/report.json",
    ):
        assert (after.folder / path).is_file()


def check_the_two_passes_are_those_of_the_old_checkpoint(after: After) -> None:
    names = after.names
    model, gate = old_model(3, base=tiny_llama()), old_gate(3)
    model.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
    with torch.no_grad():
        hidden = model(**names["batch"], output_hidden_states=True).hidden_states[-1]
        expected = model(**names["batch"], routing_weights=gate(hidden)).logits
    torch.testing.assert_close(names["logits"], expected)
    # where weights are mean ones, N+1 passes are another function
    assert not torch.allclose(names["old_logits"], expected, atol=1e-3)


def check_the_old_router_routes_by_itself_and_writes(after: After) -> None:
    names = after.names
    assert isinstance(names["router"], GateRouter)
    assert names["routed"].shape == names["logits"].shape
    assert names["text"].shape[1] == names["batch"]["input_ids"].shape[1] + 4


def check_only_routers_learnt_in_the_mixture(after: After) -> None:
    saved = [
        moelora.expert_tensors.read_experts(after.folder / n)
        for n in ("mixture", "mixture-trained")
    ]
    for old, new in zip(*saved, strict=True):
        assert all(torch.equal(old.layers[n].a, new.layers[n].a) for n in old.layers)


def check_only_the_new_skill_learnt_in_the_manager(after: After) -> None:
    manager = after.names["manager"]
    assert manager.get_all_adapter_names() == ["sql", "french", "shell"]
    read = moelora.expert_tensors.read_experts
    (original,) = read(after.folder / "experts" / "expert_0")
    (kept,) = read(after.folder / "growing" / "sql")
    assert original.layers.keys() == kept.layers.keys()
    assert all(torch.equal(original.layers[n].a, kept.layers[n].a) for n in kept.layers)
    assert manager.all_mature
