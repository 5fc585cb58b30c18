"""Describing: what the files say, checked against the model that was saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from moelora import (
    CheckpointError,
    ExpertLoad,
    ReportError,
    Router,
    compose,
    describe,
    export_expert,
    mark_mature,
)
from tests.adapters import CONFIG, save_lora
from tests.lm import TARGETS, lora_layers, mixture, mixture_config, tiny_llama, two_loras
from tests.report.tiny import made_up


def _norm(model: Any, name: str, expert: int, number: int) -> float:
    """The Frobenius norm of an expert's whole update, by forming it."""
    total = 0.0
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        r = a.shape[0] // number
        own = slice(expert * r, (expert + 1) * r)
        total += float(((b[:, own] @ a[own]) * layer.scaling[name]).square().sum())
    return math.sqrt(total)


@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_a_mixture_is_described_as_it_is(scope: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"router_scope": scope, "router_type": "learned_with_maturity"}
    model = mixture(router_hidden_size=5, **fields)
    mark_mature(model, experts=[1], mature=False)
    model.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert (told.kind, told.r, told.lora_alpha, told.layers) == ("mixture", 2, 4, 6)
    assert told.targets == dict.fromkeys(sorted(TARGETS), 2)
    assert [expert.name for expert in told.experts] == ["0", "1", "2"]
    assert [expert.mature for expert in told.experts] == [True, False, True]
    assert {expert.layers for expert in told.experts} == {6}
    for expert in told.experts:
        assert expert.update_norm == pytest.approx(_norm(model, "default", expert.index, 3))
    experts = sum(expert.parameters for expert in told.experts)
    routers = [p for n, p in model.named_parameters() if ".lora_router." in n]
    assert told.router is not None
    assert told.router.parameters == sum(p.numel() for p in routers)
    assert told.router.routers == {"module": 6, "layer": 2, "model": 1}[scope]
    assert (told.router.router_scope, told.router.hidden_size) == (scope, 5)
    assert (told.router.top_k, told.router.temperature) == (2, 2.0)
    buffers = 3 * told.router.routers
    assert told.parameters == experts + told.router.parameters + buffers
    assert sorted(told.dtypes) == ["BOOL", "F64"]


def test_digests_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    told = describe(tmp_path)
    names = ["adapter_model.safetensors", "router.safetensors"]
    assert list(told.digests) == names
    for name in names:
        content = (tmp_path / name).read_bytes()
        assert told.digests[name] == hashlib.sha256(content).hexdigest()
    assert told.bytes == sum((tmp_path / name).stat().st_size for name in names)


def test_fixed_routing_has_no_router_tensors(tmp_path: Path) -> None:
    mixture(router_type="fixed").save_pretrained(tmp_path)
    router = describe(tmp_path).router
    assert router is not None
    assert (router.router_type, router.routers, router.parameters) == ("fixed", 0, 0)
    assert (router.top_k, router.digest) == (None, None)


def test_experts_that_are_always_on_have_no_router(tmp_path: Path) -> None:
    config = mixture_config(use_moe_routing=False, router_type="learned_with_maturity")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert told.router is None
    assert len(told.notes) == 3
    assert "Expert '0' is zero: was it ever trained?" in told.notes


def test_padding_is_not_counted(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", r=5, target_modules=["q_proj"])
    save_lora(tmp_path / "b", seed=1, r=2, target_modules=["q_proj", "v_proj"])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    told = describe(tmp_path / "out")
    assert [(e.name, e.rank, e.layers) for e in told.experts] == [("a", 5, 2), ("b", 2, 4)]
    assert told.experts[0].parameters == 2 * 5 * (16 + 16)


def test_a_plain_lora_is_one_expert_without_a_router(tmp_path: Path) -> None:
    save_lora(tmp_path / "sql", r=3)
    told = describe(tmp_path / "sql")
    assert (told.kind, told.router, told.task_type) == ("lora", None, "CAUSAL_LM")
    assert [(expert.name, expert.rank) for expert in told.experts] == [("sql", 3)]


def test_adapters_under_an_attached_router_are_told_in_its_order(tmp_path: Path) -> None:
    model = two_loras()
    model.base_model.set_adapter(["second", "first"])
    model.attach_router(Router(16, 2, top_k=1, temperature=0.5, hidden_size=4).double())
    model.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert told.kind == "adapters"
    assert [(e.name, e.adapter, e.rank) for e in told.experts] == [
        ("second", "second", 3),
        ("first", "first", 2),
    ]
    assert told.router is not None
    assert (told.router.router_type, told.router.top_k) == ("attached", 1)
    assert (told.router.temperature, told.router.hidden_size) == (0.5, 4)
    assert "second/adapter_model.safetensors" in told.digests


def test_adapters_in_one_folder_without_a_router_are_told(tmp_path: Path) -> None:
    model = two_loras()
    model.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert (told.kind, told.router) == ("adapters", None)
    assert [expert.name for expert in told.experts] == ["first", "second"]


def test_experts_that_joined_one_by_one_are_told(tmp_path: Path) -> None:
    fields = {"num_experts": 1, "joins_mixture": True, "router_type": "learned_with_maturity"}
    model = get_peft_model(tiny_llama(), mixture_config(**fields), adapter_name="sql")
    model.add_adapter("french", mixture_config(**fields))
    model.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert [expert.name for expert in told.experts] == ["french", "sql"]
    assert told.router is not None
    assert told.router.routers == 12
    made = export_expert(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", expert="sql")
    assert (made.name, made.r) == ("sql", 2)


def test_an_adapter_that_is_more_than_a_pair_is_told_with_a_note(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), mixture_config(use_moe_routing=False, num_experts=1))
    model.save_pretrained(tmp_path / "one")
    save_lora(tmp_path / "dora", use_dora=True, r=7)
    told = describe(tmp_path / "dora")
    assert (told.experts[0].rank, told.experts[0].layers) == (7, 0)
    assert "use_dora=True" in told.notes[0]


def test_a_description_is_json(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    content = dataclasses.asdict(describe(tmp_path))
    assert json.loads(json.dumps(content))["kind"] == "mixture"


def test_a_description_changes_no_file(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    describe(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["config", "router", "weights"])
def test_what_cannot_be_loaded_is_not_described(damage: str, tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    name = {
        "config": CONFIG,
        "router": "router.safetensors",
        "weights": "adapter_model.safetensors",
    }[damage]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        describe(tmp_path)


def test_an_empty_folder_holds_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter_config"):
        describe(tmp_path)


def test_scaling_counts_in_the_norm(tmp_path: Path) -> None:
    norms = []
    for alpha in (2, 6):
        torch.manual_seed(0)
        save_lora(tmp_path / str(alpha), lora_alpha=alpha)
        norms.append(describe(tmp_path / str(alpha)).experts[0].update_norm)
    assert norms[1] == pytest.approx(3 * norms[0])


def test_the_loads_of_a_report_are_told(tmp_path: Path) -> None:
    mixture(expert_names=["sql", "french", "shell"]).save_pretrained(tmp_path)
    report = made_up()
    assert all(expert.load is None for expert in describe(tmp_path).experts)
    assert describe(tmp_path).measured is None
    # one of the report's two routers has no expert 1
    numbered = dataclasses.replace(report, experts=["E0", "E1", "E2"])
    told = describe(tmp_path, report=numbered)
    assert told.measured == {"a x": 10, "b x": 10}
    first, second, _ = (expert.load for expert in told.experts)
    assert first == ExpertLoad(0.45, 0.4, 0.5, {"a x": 0.6, "b x": 0.1})
    assert second == ExpertLoad(0.125, 0.25, 0.25, {"a x": 0.3, "b x": 0.2})
    # by name, whatever the order
    named = dataclasses.replace(report, experts=["shell", "sql", "french"])
    assert describe(tmp_path, report=named).experts[0].load == second


def test_a_report_of_other_experts_is_refused(tmp_path: Path) -> None:
    mixture(expert_names=["sql", "french", "shell"]).save_pretrained(tmp_path)
    for experts in (["sql", "french"], ["sql", "french", "medical"], ["sql", "sql", "shell"]):
        report = dataclasses.replace(made_up(), experts=experts)
        with pytest.raises(ReportError, match="report must be of the experts"):
            describe(tmp_path, report=report)
