"""Merging: the plain LoRA is the weighted sum, and its distance from the routing is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from moelora import (
    CheckpointError,
    ConfigError,
    MergeError,
    MoELoraConfig,
    Router,
    compose,
    merge_experts,
)
from tests.adapters import save_lora
from tests.lm import (
    assert_same_snapshot,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    snapshot,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.models import LAYER_KINDS, Block, t5_config, unchecked_types
from tests.tolerances import assert_close

WEIGHTS = [0.7, -0.2, 1.5]


def _saved(folder: Path, **fields: Any) -> PeftModel:
    model = mixture(**fields)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("weights", [WEIGHTS, [0.0, 1.0, 0.0], [1 / 3] * 3])
def test_the_lora_is_the_weighted_sum_of_the_experts(weights: list[float], tmp_path: Path) -> None:
    model = _saved(tmp_path / "mixture")
    merged = merge_experts(tmp_path / "mixture", tmp_path / "out", weights=weights, unmeasured=True)
    assert merged.r == 2 * sum(weight != 0 for weight in weights)
    assert (merged.truncation_error, merged.exact, merged.distance) == (0.0, False, None)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    expected = model(token_ids(), routing_weights=torch.tensor(weights, dtype=torch.float64)).logits
    assert_close(plain(token_ids()).logits, expected)


@pytest.mark.parametrize("kind", [n for n in LAYER_KINDS if n != "Conv2d with groups"])
@pytest.mark.parametrize("rank", [None, 3])
def test_layers_of_every_kind_merge(kind: str, rank: int | None, tmp_path: Path) -> None:
    base = Block(LAYER_KINDS[kind].make()).double()
    state = base.state_dict()
    config = MoELoraConfig(r=2, num_experts=3, target_modules=["layer"], router_type="learned")
    model = get_peft_model(base, config)
    perturb(model)
    model.eval().save_pretrained(tmp_path / "mixture", save_embedding_layers=False)
    x = LAYER_KINDS[kind].draw(2, 3)
    x = x.double() if x.is_floating_point() else x
    merged = merge_experts(
        tmp_path / "mixture", tmp_path / "out", weights=WEIGHTS, rank=rank, unmeasured=True
    )
    fresh = Block(LAYER_KINDS[kind].make()).double()
    fresh.load_state_dict(state)
    plain = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    expected = model(x, routing_weights=torch.tensor(WEIGHTS, dtype=torch.float64))
    if rank is None:
        assert_close(plain(x), expected)
    else:
        assert merged.truncation_error > 0
        assert merged.r <= rank


def test_truncation_is_the_best_of_its_rank_and_its_error_is_told(tmp_path: Path) -> None:
    model = _saved(tmp_path / "mixture")
    merged = merge_experts(
        tmp_path / "mixture", tmp_path / "out", weights=WEIGHTS, rank=2, unmeasured=True
    )
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lost = total = worst = 0.0
    weights = torch.tensor(WEIGHTS, dtype=torch.float64).repeat_interleave(2)
    config = LoraConfig.from_pretrained(tmp_path / "out")
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole = (b * weights) @ a * layer.scaling["default"]
        key = name if name.startswith("base_model") else f"base_model.model.{name}"
        mine = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        error = float((mine * config.lora_alpha / config.r - whole).square().sum())
        best = float(torch.linalg.svdvals(whole)[2:].square().sum())
        assert error == pytest.approx(best)
        size = float(whole.square().sum())
        lost, total, worst = lost + error, total + size, max(worst, (error / size) ** 0.5)
    assert merged.truncation_error == pytest.approx((lost / total) ** 0.5)
    assert merged.worst_layer_error == pytest.approx(worst)


def test_a_rank_that_holds_all_loses_nothing(tmp_path: Path) -> None:
    _saved(tmp_path / "mixture")
    merged = merge_experts(
        tmp_path / "mixture", tmp_path / "out", weights=WEIGHTS, rank=6, unmeasured=True
    )
    assert merged.r == 6
    assert merged.truncation_error < 1e-7


# The distance ------------------------------------------------------------------------------------


def test_the_distance_is_that_of_the_two_models_logits(tmp_path: Path) -> None:
    model = _saved(tmp_path / "mixture")
    base = tiny_llama()
    before = snapshot(base)
    inputs = [token_ids(2, 7), token_ids(1, 4, seed=5)]
    merged = merge_experts(
        tmp_path / "mixture",
        tmp_path / "out",
        weights=WEIGHTS,
        base_model=base,
        inputs=inputs,
    )
    assert_same_snapshot(snapshot(base), before)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    kls, losses, same = [], [], []
    for ids in inputs:
        p, q = (m(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1) for m in (model, plain))
        kls.append((p.exp() * (p - q)).sum(-1))
        targets = ids[:, 1:].reshape(-1, 1)
        losses.append(torch.cat([-p.gather(1, targets), -q.gather(1, targets)], dim=1))
        same.append(p.argmax(-1) == q.argmax(-1))
    distance = merged.distance
    assert distance is not None
    assert (distance.texts, distance.tokens) == (3, 15)
    assert distance.mean_kl == pytest.approx(float(torch.cat(kls).mean()))
    assert distance.largest_kl == pytest.approx(float(torch.cat(kls).max()))
    routed_loss, merged_loss = torch.cat(losses).mean(0).tolist()
    assert distance.routed_loss == pytest.approx(routed_loss)
    assert distance.merged_loss == pytest.approx(merged_loss)
    assert distance.agreement == pytest.approx(float(torch.cat(same).double().mean()))
    assert distance.mean_kl > 1e-3


def test_the_distance_is_zero_where_the_merged_lora_is_the_mixture(tmp_path: Path) -> None:
    fixed = {"router_type": "fixed", "fixed_routing_weights": WEIGHTS}
    _saved(tmp_path / "mixture", **fixed)
    merged = merge_experts(
        tmp_path / "mixture", tmp_path / "out", base_model=tiny_llama(), inputs=[token_ids()]
    )
    assert merged.exact
    assert list(merged.weights.values()) == WEIGHTS
    assert merged.distance is not None
    assert abs(merged.distance.mean_kl) < 1e-12
    assert merge_experts(tmp_path / "mixture", tmp_path / "out2").exact
    with pytest.raises(MergeError, match="its distance is unknown"):
        merge_experts(tmp_path / "mixture", tmp_path / "out3", weights=[1, 1, 1])
    with pytest.raises(MergeError, match="its distance is unknown"):
        merge_experts(tmp_path / "mixture", tmp_path / "out3", rank=2)


def test_experts_that_are_always_on_merge_exactly(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(), mixture_config(use_moe_routing=False, router_type="learned_with_maturity")
    )
    perturb(model)
    model.eval().save_pretrained(tmp_path / "on")
    merged = merge_experts(tmp_path / "on", tmp_path / "out")
    assert (merged.exact, list(merged.weights.values())) == (True, [1.0, 1.0, 1.0])
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close(plain(token_ids()).logits, model(token_ids()).logits)


def test_adapters_under_an_attached_router_are_measured_against_it(tmp_path: Path) -> None:
    model = two_loras()
    config = MoELoraConfig(num_experts=2, top_k_experts=2)
    model.attach_router(Router(16, 2).double(), config)
    with torch.no_grad():
        model.router.weight.normal_()
    model.eval().save_pretrained(tmp_path / "both")
    merged = merge_experts(
        tmp_path / "both",
        tmp_path / "out",
        weights=[0.5, 0.5],
        base_model=tiny_llama(),
        inputs=[token_ids()],
    )
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    p, q = (m(token_ids()).logits[:, :-1].log_softmax(-1) for m in (model, plain))
    assert merged.distance is not None
    assert merged.distance.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))


def test_a_composed_mixture_merges(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", r=2, target_modules=["q_proj"])
    save_lora(tmp_path / "b", seed=1, r=3, lora_alpha=7, target_modules=["v_proj", "q_proj"])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "mixture")
    merged = merge_experts(
        tmp_path / "mixture",
        tmp_path / "out",
        weights=[0.25, 0.5],
        base_model=tiny_llama(),
        inputs=[token_ids()],
    )
    assert merged.weights == {"a": 0.25, "b": 0.5}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixture").eval()
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    weights = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert_close(plain(token_ids()).logits, model(token_ids(), routing_weights=weights).logits)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "weights must be given, one for each of"),
        ([1.0], "weights must be 3 finite numbers"),
        ([1.0, 2.0, 3.0, 4.0], "weights must be 3 finite numbers"),
        ([1.0, float("nan"), 0.0], "weights must be 3 finite numbers"),
        ([1.0, "1", 0.0], "weights must be 3 finite numbers"),
        ([True, 1.0, 0.0], "weights must be 3 finite numbers"),
        ("0.5", "weights must be 3 finite numbers"),
        (7, "weights must be 3 finite numbers"),
        ([0.0, 0.0, 0.0], "must not all be 0"),
    ],
)
def test_weights_are_checked(weights: Any, message: str, tmp_path: Path) -> None:
    _saved(tmp_path / "mixture")
    with unchecked_types(), pytest.raises(ConfigError, match=message):
        merge_experts(tmp_path / "mixture", tmp_path / "out", weights=weights, unmeasured=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, MergeError, "without texts its distance is unknown"),
        ({"rank": 0}, ConfigError, "rank must be None or an integer of at least 1"),
        ({"rank": 1.5}, ConfigError, "rank must be None or an integer of at least 1"),
        ({"inputs": [torch.ones(1, 3)]}, ConfigError, "inputs need a base_model"),
        (
            {"inputs": [torch.ones(3, dtype=torch.long)], "base_model": nn.Linear(1, 1)},
            ConfigError,
            r"token ids of shape \(batch, seq\), got \(3,\)",
        ),
        (
            {"inputs": ["text"], "base_model": nn.Linear(1, 1)},
            ConfigError,
            r"token ids of shape \(batch, seq\), got 'text'",
        ),
    ],
)
def test_arguments_are_checked(
    arguments: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    _saved(tmp_path / "mixture")
    with unchecked_types(), pytest.raises(error, match=message):
        merge_experts(tmp_path / "mixture", tmp_path / "out", weights=WEIGHTS, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]


def test_what_cannot_be_measured_is_not_written(tmp_path: Path) -> None:
    _saved(tmp_path / "mixture")
    two_loras().save_pretrained(tmp_path / "two")

    def merge(base: nn.Module, ids: Tensor, source: str = "mixture") -> None:
        weights = WEIGHTS if source == "mixture" else [1.0, 1.0]
        merge_experts(
            tmp_path / source, tmp_path / "out", weights=weights, base_model=base, inputs=[ids]
        )

    with pytest.raises(MergeError, match="an encoder and a decoder"):
        merge(T5ForConditionalGeneration(t5_config()), token_ids())
    with pytest.raises(MergeError, match="base_model must have no adapters"):
        merge(two_loras(), token_ids())
    with pytest.raises(MergeError, match="LlamaModel predicts no next token"):
        merge(tiny_llama().model, token_ids())
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(MergeError, match="texts of at least two tokens"):
        merge(base, token_ids(2, 1))
    with pytest.raises(MergeError, match="no router that is saved with these adapters"):
        merge(base, token_ids(), source="two")
    with pytest.raises(CheckpointError, match="shape"):
        merge(tiny_llama(intermediate_size=32), token_ids())
    assert_same_snapshot(snapshot(base), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixture", "two"]
