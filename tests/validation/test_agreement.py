"""Ways that must agree do, in float64 to the last digits; a wrong one is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.validation.agreement import TOLERANCES, Agreement, Comparison, compare
from moelora.validation.candidate import Candidate, load_candidate
from moelora.validation.inputs import weights_for
from moelora.validation.slow_path import slow_logits
from moelora.validation.stacking import stack_experts, why_not_stackable
from moelora.validation.ways import activate, mixed_logits, seeded_weights
from tests.validation.checkpoints import KINDS, save
from tests.validation.old_checkpoints import old_model, save_old
from tests.validation.tiny import VOCABULARY, save_base, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def load(folder: Path, base: Path, dtype: torch.dtype = torch.float64) -> Candidate:
    return load_candidate(folder, base=str(base), dtype=dtype, device=torch.device("cpu"))


def agreement(candidate: Candidate, *, dtype: torch.dtype = torch.float64) -> Agreement:
    torch.manual_seed(2)
    tokens = torch.randint(1, VOCABULARY, (2, 7))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    weights, _ = weights_for(candidate, batch, seed=0)
    dense = seeded_weights(2, 7, len(candidate.experts), seed=1, device=tokens.device)
    return Agreement(
        candidate,
        batch,
        weights,
        dense.double(),
        tolerance=TOLERANCES[dtype],
        stackable=why_not_stackable(candidate.model, candidate.experts) is None,
    )


def results(one: Agreement) -> list[Comparison]:
    return [comparison for check in one.checks for comparison in check()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_agrees_where_it_must(
    kind: str, base: Path, tmp_path: Path
) -> None:
    candidate = load(save(kind, tmp_path / "saved"), base)
    found = results(agreement(candidate))
    demanded = [one for one in found if one.demanded]
    assert [one.name for one in demanded if not one.agrees] == []
    expected = 4 + bool(candidate.mixtures) + (candidate.router is not None)
    assert len(demanded) == expected
    # the others are other functions, and far away at these sizes of B
    assert all(one.relative_difference > 0.01 for one in found if not one.demanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_within_its_own_tolerance(
    dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    candidate = load(save("mixture", tmp_path / "saved"), base, dtype)
    found = results(agreement(candidate, dtype=dtype))
    assert [one.name for one in found if one.demanded and not one.agrees] == []


def test_conv1d_models_agree_too(tmp_path: Path) -> None:
    model = old_model(2, base=tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    base = save_base(tmp_path / "base", tiny_gpt2())
    candidate = load(save_old(tmp_path / "old", model), base)
    found = results(agreement(candidate))
    assert [one.name for one in found if one.demanded and not one.agrees] == []


def test_dora_experts_are_compared_without_being_stacked(base: Path, tmp_path: Path) -> None:
    model = old_model(2, use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data.abs() + 0.5
    candidate = load(save_old(tmp_path / "old", model, layout="nested"), base)
    reason = why_not_stackable(candidate.model, candidate.experts)
    assert reason is not None
    assert reason.startswith("expert 'expert_0' is of another kind than plain LoRA")
    found = results(agreement(candidate))
    assert [one.name for one in found if one.demanded and not one.agrees] == []
    assert not any("stacked" in one.name for one in found)


@pytest.mark.parametrize("kind", ["mixture", "old"])
def test_a_wrong_single_pass_is_found(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = load(save(kind, tmp_path / "saved"), base)
    original = Agreement._one_pass_logits

    def shifted(self: Agreement, adapters: Any, weights: Tensor) -> Tensor:
        return original(self, adapters, weights.roll(1, dims=-1))

    monkeypatch.setattr(Agreement, "_one_pass_logits", shifted)
    failed = [one for one in results(agreement(candidate)) if one.demanded and not one.agrees]
    assert len(failed) == 4


def test_slow_sum_is_the_formula(base: Path, tmp_path: Path) -> None:
    """At one adapted layer that ends the model, the formula is a line."""
    model = old_model(2, target_modules=["lm_head"], lora_alpha=6).double()
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (2, 5))
    weights = torch.randn(2, 5, 2, dtype=torch.float64)
    names = ["expert_0", "expert_1"]
    with torch.no_grad(), model.disable_adapter():
        output = model(tokens, output_hidden_states=True)
    expected, hidden = output.logits, output.hidden_states[-1]
    layer = model.base_model.model.lm_head
    for index, name in enumerate(names):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        scaling = 6 / a.shape[0]
        expected = expected + weights[..., index : index + 1] * (hidden @ a.T @ b.T) * scaling
    found = slow_logits(model, names, weights, {"input_ids": tokens})
    torch.testing.assert_close(found, expected)
    # there the passes may be mixed by their logits, too, for weights that sum to 1
    even = weights.softmax(dim=-1)
    mixed = mixed_logits(model, names, even, {"input_ids": tokens})
    activate(model, names)
    torch.testing.assert_close(mixed, model(tokens, routing_weights=even).logits)


def test_the_slow_sum_leaves_the_model_as_it_was(base: Path, tmp_path: Path) -> None:
    candidate = load(save("old", tmp_path / "saved"), base)
    model = candidate.model
    activate(model, ["expert_1"])
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        before = model(tokens).logits
        slow_logits(model, candidate.experts, torch.ones(1, 4, 3), {"input_ids": tokens})
        assert torch.equal(model(tokens).logits, before)
    assert model.active_adapters == ["expert_1"]


def test_stacked_experts_of_unequal_rank_and_scaling_are_the_same_experts(
    base: Path, tmp_path: Path
) -> None:
    candidate = load(save("old", tmp_path / "saved"), base)
    model, experts = candidate.model, candidate.experts
    model.peft_config["expert_1"].lora_alpha = 99
    stack_experts(model, [*experts, "expert_0"], "stack")
    weights = torch.randn(2, 5, 4, dtype=torch.float64)
    tokens = torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        activate(model, ["stack"])
        found = model(tokens, routing_weights=weights).logits
        activate(model, experts)
        folded = weights[..., :3].clone()
        folded[..., 0] += weights[..., 3]
        expected = model(tokens, routing_weights=folded).logits
    torch.testing.assert_close(found, expected)


def test_figures_of_a_comparison_are_what_they_say() -> None:
    reference = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 2.0, 0.5], [0.0, 1.0, 0.0]])
    found = compare("a", reference, other, tolerance=0.1, demanded=True, why="w")
    assert found.max_difference == 1.0
    assert found.mean_difference == pytest.approx(2.5 / 6)
    assert found.relative_difference == 0.5
    assert found.cosine == pytest.approx((4 / (2 * math.sqrt(4.25)) + 0) / 2)
    assert found.top_1 == 0.5
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (reference, other))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    assert not found.agrees


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_agrees_with_what_is_no_number(bad: float) -> None:
    reference, other = torch.ones(1, 3), torch.full((1, 3), bad)
    assert not compare("a", reference, other, tolerance=1e9, demanded=True, why="w").agrees
    assert not compare("a", other, reference, tolerance=1e9, demanded=True, why="w").agrees


def test_zeros_agree_with_zeros_only() -> None:
    zeros = torch.zeros(2, 3)
    assert compare("a", zeros, zeros, tolerance=0.0, demanded=True, why="w").agrees
    assert not compare("a", zeros, zeros + 1e-9, tolerance=1.0, demanded=True, why="w").agrees


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"a: shapes \(2, 3\) and \(3, 2\) must be the same"):
        compare("a", torch.ones(2, 3), torch.ones(3, 2), tolerance=1.0, demanded=True, why="w")
