"""DyLoRA-MoE's gate: its formula, its modes, and its way through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from moelora.errors import ConfigError, RoutingWeightsError
from moelora.gate_router import GateRouter
from tests.lm import tiny_llama, token_ids, two_loras


def gate(**options: object) -> GateRouter:
    torch.manual_seed(0)
    router = GateRouter(16, 4, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.normal_()
        router.bias.normal_()
    return router.eval()


def by_hand(router: GateRouter, x: Tensor, *, dense: bool) -> Tensor:
    """Token by token, as the published router is described."""
    rows = []
    for token in x.reshape(-1, 16):
        scores = [(token @ w + b).item() for w, b in zip(router.weight, router.bias, strict=True)]
        tensor = torch.tensor(scores, dtype=torch.float64)
        if dense:
            rows.append(torch.softmax(tensor / router.temperature, dim=0))
            continue
        best = sorted(range(4), key=lambda e: -scores[e])[: router.top_k]
        row = torch.zeros(4, dtype=torch.float64)
        row[best] = torch.softmax(tensor[best], dim=0)
        rows.append(row)
    return torch.stack(rows).reshape(*x.shape[:-1], 4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mature_experts_are_chosen_by_their_raw_scores(top_k: int) -> None:
    router, x = gate(top_k=top_k, temperature=3.0), torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(router(x), by_hand(router, x, dense=False))


@pytest.mark.parametrize("state", ["training", "immature"])
def test_a_young_or_training_gate_shares_by_temperature(state: str) -> None:
    router = gate(top_k=1, temperature=3.0, track_maturity=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    if state == "training":
        router.train()
    else:
        assert router.mature is not None
        router.mature[2] = False
    torch.testing.assert_close(router(x), by_hand(router, x, dense=True))


def test_a_gate_whose_experts_are_all_mature_is_sparse() -> None:
    router, x = gate(top_k=1, track_maturity=True), torch.randn(3, 16, dtype=torch.float64)
    assert router(x).amax(dim=-1).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hidden_states_are_routed_in_float32(dtype: torch.dtype) -> None:
    router = gate().to(torch.float32)
    assert router(torch.randn(2, 3, 16, dtype=dtype)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_attached_gate_comes_back_from_its_file(tmp_path: Path) -> None:
    model, router = two_loras(), GateRouter(16, 2, top_k=1, track_maturity=True).double()
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.5, -0.5]))
    model.attach_router(router)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", adapter_name="first")
    assert type(loaded.router) is GateRouter
    hidden = torch.randn(2, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(loaded.router.eval()(hidden), router.eval()(hidden))
    assert loaded.get_routing_weights(hidden).shape == (*token_ids(2, 3).shape, 2)


def test_a_wrong_width_and_a_hidden_layer_are_refused() -> None:
    with pytest.raises(RoutingWeightsError, match="width input_size=16, got 8"):
        gate()(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="hidden_size of a GateRouter must be None, got 3"):
        gate(hidden_size=3)
    with pytest.raises(ConfigError, match="top_k must be between 1 and num_experts=4, got 5"):
        gate(top_k=5)
