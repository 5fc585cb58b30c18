"""ExpertManager and the hub: a set of experts, or one of them, by its id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from moelora import CheckpointError, ExpertManager
from tests.experts import manager, output
from tests.models import llama_config, token_ids
from tests.test_hub import ONLINE, REPO, Hub, hub  # noqa: F401 - a fixture
from tests.tolerances import assert_equal


def base_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config())


@ONLINE
@pytest.mark.parametrize("routed", [False, True])
def test_a_set_of_experts_loads_by_its_id(routed: bool, hub: Hub) -> None:  # noqa: F811
    experts = manager(2, routed=routed)
    if not routed:
        experts.add_router()
    experts.save(hub.folder(REPO))
    loaded = ExpertManager.load(base_model(), REPO)
    assert loaded.get_all_adapter_names() == ["expert_0", "expert_1"]
    ids = token_ids()
    weights: dict[str, Any] = {} if routed else {"routing_weights": torch.tensor([0.3, 0.7])}
    assert_equal(output(loaded, ids, **weights), output(experts, ids, **weights))
    assert (loaded.model.router is None) == routed
    assert loaded.record(1) == experts.record(1)


def test_one_expert_is_imported_by_its_id(hub: Hub) -> None:  # noqa: F811
    source = manager(2)
    source.update_record(1, skill="sql")
    source.save(hub.folder(REPO))
    source.export_expert(0, hub.folder("someone/alone"))
    target = manager(1)
    target.import_expert(REPO, "sql", adapter="expert_1")
    target.import_expert("someone/alone")
    assert target.get_all_adapter_names() == ["expert_0", "sql", "alone"]
    assert target.record("sql").skill == "sql"
    ids = token_ids()
    for name, number in (("sql", 1), ("alone", 0)):
        target.set_active_expert(name)
        source.set_active_expert(number)
        assert_equal(output(target, ids), output(source, ids))


def test_an_unknown_id_is_refused(hub: Hub) -> None:  # noqa: F811
    experts = manager(1)
    with pytest.raises(CheckpointError, match="holds no adapter_config.json"):
        experts.import_expert("someone/nothing")
    with pytest.raises(
        CheckpointError, match="holds neither experts.json nor an adapter|not to be had"
    ):
        ExpertManager.load(base_model(), "someone/nothing")
    assert hub.downloads
