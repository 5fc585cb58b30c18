"""A router that grows: expand, shrink, freeze, maturity, and its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moelora import CheckpointError, ConfigError, Router
from moelora.gate_router import GateRouter
from tests.experts import manager
from tests.models import llama_config, token_ids, unchecked_types
from tests.tolerances import assert_equal

WIDTH = 6
OPTIONS: list[dict[str, Any]] = [{}, {"hidden_size": 3}, {"track_maturity": True}]


def grown(*sizes: int, seed: int = 0, **options: Any) -> Router:
    """A router that got its rows in blocks of these sizes."""
    torch.manual_seed(seed)
    router = Router(WIDTH, sizes[0], growing=True, **options)
    for size in sizes[1:]:
        router.expand(size)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def states(router: Router) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in router.state_dict().items()}


@st.composite
def routers(draw: Any) -> tuple[Router, Tensor]:
    """A router with some history, of either class, and hidden states for it."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    options = draw(st.sampled_from(OPTIONS))
    router = grown(*sizes, seed=draw(st.integers(0, 2**31 - 1)), **options)
    if draw(st.booleans()):
        columns = st.lists(st.integers(0, router.num_experts - 1), max_size=3)
        router.freeze(draw(columns))
    return router, torch.randn(draw(st.integers(0, 4)), WIDTH)


# Laws ------------------------------------------------------------------------------------------


@given(routers(), st.integers(1, 3))
def test_expanding_leaves_the_logits_of_the_others_equal_to_the_bit(
    drawn: tuple[Router, Tensor], number: int
) -> None:
    router, x = drawn
    before = router.logits(x)
    router.expand(number)
    after = router.logits(x)
    assert after.shape[-1] == before.shape[-1] + number
    assert_equal(after[:, : before.shape[-1]], before)


@given(routers(), st.integers(1, 3))
def test_expanding_and_shrinking_again_is_the_identity(
    drawn: tuple[Router, Tensor], number: int
) -> None:
    router, x = drawn
    parameters, before, weights = list(router.parameters()), states(router), router(x)
    old = router.num_experts
    router.expand(number)
    router.shrink(range(old, old + number))
    assert list(map(id, router.parameters())) == list(map(id, parameters))
    assert states(router).keys() == before.keys()
    assert_equal(list(states(router).values()), list(before.values()))
    assert_equal(router(x), weights)


@given(routers(), st.data())
def test_shrinking_leaves_the_logits_of_the_others_equal_to_the_bit(
    drawn: tuple[Router, Tensor], data: Any
) -> None:
    router, x = drawn
    number = router.num_experts
    gone = data.draw(st.sets(st.integers(0, number - 1), max_size=number - 1))
    kept = [column for column in range(number) if column not in gone]
    before = router.logits(x)[:, kept]
    router.shrink(gone)
    assert_equal(router.logits(x), before)


@given(routers(), st.data())
def test_freezing_changes_no_output_and_no_row(drawn: tuple[Router, Tensor], data: Any) -> None:
    router, x = drawn
    columns = data.draw(st.lists(st.integers(0, router.num_experts - 1)))
    weights, rows = router(x), router.stacked("weight").clone()
    router.freeze(columns)
    assert all(router.is_frozen(column) for column in columns)
    assert_equal(router(x), weights)
    assert_equal(router.stacked("weight"), rows)
    router.unfreeze()
    assert not any(router.is_frozen(column) for column in range(router.num_experts))
    assert_equal(router(x), weights)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_in_how_many_steps_a_router_grew_changes_nothing(sizes: list[int]) -> None:
    in_steps, at_once = grown(*sizes, track_maturity=True), grown(sum(sizes), track_maturity=True)
    at_once.load_state_dict(in_steps.state_dict())
    assert in_steps.mature is not None
    assert at_once.mature is not None
    x = torch.randn(3, WIDTH)
    assert_equal(at_once(x), in_steps(x))


@given(routers())
def test_a_routers_config_and_state_make_the_same_router(drawn: tuple[Router, Tensor]) -> None:
    router, x = drawn
    again = Router(**router.config())
    again.load_state_dict(router.state_dict())
    assert_equal(again(x), router(x))
    assert again.row_blocks == router.row_blocks
    assert again.config() == router.config()


@given(routers())
def test_rows_move_between_routers_however_they_are_cut(drawn: tuple[Router, Tensor]) -> None:
    router, x = drawn
    config = {key: value for key, value in router.config().items() if key != "row_blocks"}
    whole = Router(**config)
    whole.load_state_dict(router.state_dict())
    assert_equal(whole(x), router(x))
    with torch.no_grad():
        whole.weight.mul_(2)
    router.load_state_dict(whole.state_dict())
    assert_equal(whole(x), router(x))


@pytest.mark.parametrize("frozen", [[0], [1, 2], [0, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("hidden", [None, 3])
def test_no_optimiser_moves_a_bit_of_frozen_rows(frozen: list[int], hidden: int | None) -> None:
    router = grown(2, 2, hidden_size=hidden, track_maturity=True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.randn(8, WIDTH)

    def step() -> None:
        loss: Any = router(x)[:, 0].sum() + router.logits(x).pow(2).mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    router.freeze(frozen)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5)
    before, logits = router.stacked("weight").detach().clone(), router.logits(x).detach()
    for _ in range(100):
        step()
    trained = [column for column in range(4) if column not in frozen]
    assert_equal(router.stacked("weight")[frozen], before[frozen])
    assert_equal(router.logits(x)[:, frozen], logits[:, frozen])
    assert all((router.stacked("weight")[c] != before[c]).any() for c in trained)


def test_a_gradient_that_was_there_does_not_move_a_frozen_row() -> None:
    router = grown(3)
    router.logits(torch.randn(4, WIDTH)).sum().backward()
    router.freeze([1])
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    before = router.stacked("weight").detach().clone()
    optimizer.step()
    after = router.stacked("weight")
    assert_equal(after[1], before[1])
    assert (after[0] != before[0]).all()
    assert (after[2] != before[2]).all()


# Maturity --------------------------------------------------------------------------------------


def test_a_new_expert_makes_the_routing_dense_until_it_is_mature() -> None:
    router = Router(WIDTH, 3, top_k=2, track_maturity=True)
    x = torch.randn(5, WIDTH)
    assert (router(x) > 0).sum(dim=-1).tolist() == [2] * 5
    router.expand()
    assert (router(x) > 0).sum(dim=-1).tolist() == [4] * 5
    assert [router.is_mature(column) for column in range(4)] == [True, True, True, False]
    router.mark_mature([3])
    assert (router(x) > 0).sum(dim=-1).tolist() == [2] * 5


def test_without_tracking_a_router_is_sparse_at_once() -> None:
    router = Router(WIDTH, 3, top_k=2)
    router.expand()
    assert router.is_mature(3)
    assert (router(torch.randn(5, WIDTH)) > 0).sum(dim=-1).tolist() == [2] * 5


def test_maturity_follows_the_experts_when_one_goes() -> None:
    router = Router(WIDTH, 3, top_k=1, track_maturity=True)
    router.mark_mature([1], mature=False)
    router.shrink([0])
    assert router.mature is not None
    assert router.mature.tolist() == [False, True]


def test_a_growing_router_uses_as_many_experts_as_there_are() -> None:
    router = Router(WIDTH, 1, top_k=2, growing=True)
    x = torch.randn(4, WIDTH)
    assert_equal(router(x), torch.ones(4, 1))
    router.expand(2)
    assert (router(x) > 0).sum(dim=-1).tolist() == [2] * 4


# The router of DyLoRA-MoE ----------------------------------------------------------------------


def test_a_gate_router_grows_with_its_bias() -> None:
    router = GateRouter(WIDTH, 2, top_k=1, track_maturity=True)
    with torch.no_grad():
        router.bias.normal_()
        router.weight.normal_()
    x = torch.randn(4, WIDTH)
    before = router.routing(x).router_logits
    router.expand()
    router.freeze([0])
    assert_equal(router.routing(x).router_logits[:, :2], before)
    assert router.row_blocks == [1, 1, 1]
    assert [name for name, p in router.named_parameters() if not p.requires_grad] == [
        "weight",
        "bias",
    ]
    again = GateRouter(**router.config())
    again.load_state_dict(router.state_dict())
    assert_equal(again(x), router(x))


# Files -----------------------------------------------------------------------------------------


def with_router(router: nn.Module) -> PeftModel:
    experts = manager(3)
    model: PeftModel = experts.model
    model.attach_router(router)
    return model


@pytest.mark.parametrize("kind", [Router, GateRouter])
def test_a_grown_router_comes_back_with_its_adapters(kind: type[Router], tmp_path: Path) -> None:
    router = kind(16, 1, top_k=2, growing=True, track_maturity=True)
    router.expand(2)
    router.mark_mature([1])
    router.freeze([0])
    model = with_router(router)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM(llama_config()), tmp_path / "expert_0", adapter_name="expert_0"
    )
    assert type(loaded.router) is kind
    assert loaded.router.config() == router.config()
    assert_equal(list(loaded.router.state_dict().values()), list(router.state_dict().values()))


def test_a_router_that_was_cut_later_takes_the_file_of_a_whole_one(tmp_path: Path) -> None:
    router = Router(16, 3)
    saved = copy.deepcopy(router)
    model = with_router(router)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        router.weight.zero_()
    router.freeze([1])
    model.load_adapter(tmp_path / "expert_1", "again")
    assert router.row_blocks == [1, 1, 1]
    assert_equal(router.stacked("weight"), saved.weight)


def test_a_router_that_never_grew_is_saved_as_before(tmp_path: Path) -> None:
    config = Router(16, 3).config()
    assert set(config) == {
        "input_size",
        "num_experts",
        "top_k",
        "temperature",
        "hidden_size",
        "track_maturity",
    }
    assert set(Router(16, 3).state_dict()) == {"weight"}


def test_a_router_of_another_number_of_experts_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        grown(2, 1).load_state_dict(grown(2, 2).state_dict())


def test_a_file_for_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model = with_router(Router(16, 3))
    model.save_pretrained(tmp_path)
    model.router.expand()
    with pytest.raises(CheckpointError, match="does not fit the router Router"):
        model.load_adapter(tmp_path / "expert_1", "again")


def test_a_model_with_a_grown_router_can_be_copied(tmp_path: Path) -> None:
    experts = manager(2)
    experts.add_router()
    experts.create_expert()
    twin = copy.deepcopy(experts.model)
    assert_equal(twin.router.stacked("weight"), experts.model.router.stacked("weight"))
    hidden = torch.randn(1, 2, 16)
    assert_equal(twin.router(hidden), experts.model.router(hidden))
    assert experts.model(token_ids(), routing_weights=torch.ones(3)).logits is not None


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: r.expand(0), "number must be an integer of at least 1, got 0"),
        (lambda r: r.expand(True), "number must be an integer of at least 1, got True"),
        (lambda r: r.shrink([4]), r"must be in \[0, 4\), got 4"),
        (lambda r: r.shrink([-1]), r"must be in \[0, 4\), got -1"),
        (lambda r: r.shrink(range(4)), "At least 1 of 4 experts must stay, but 4 were to be taken"),
        (lambda r: r.freeze([1.0]), r"must be in \[0, 4\), got 1.0"),
        (lambda r: r.unfreeze(["0"]), r"must be in \[0, 4\), got '0'"),
        (lambda r: r.is_frozen(4), r"must be in \[0, 4\), got 4"),
        (lambda r: r.mark_mature([9]), r"must be in \[0, 4\), got 9"),
        (lambda r: r.mark_mature(), "does not track maturity"),
    ],
)
def test_wrong_columns_are_refused_and_change_nothing(call: Any, match: str) -> None:
    router = grown(2, 2)
    before = states(router)
    with unchecked_types(), pytest.raises(ConfigError, match=match):
        call(router)
    assert_equal(list(states(router).values()), list(before.values()))
    assert not any(router.is_frozen(column) for column in range(4))


def test_a_router_that_is_not_growing_keeps_top_k_experts() -> None:
    with pytest.raises(ConfigError, match="At least 2 of 3 experts must stay"):
        Router(WIDTH, 3, top_k=2).shrink([0, 1])


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ([1, 1], r"row_blocks must make num_experts=3 rows, got \[1, 1\]"),
        ([3, 0], "row_blocks must be a list of positive integers"),
        ([4, -1], "row_blocks must be a list of positive integers"),
        ([True, 2], "row_blocks must be a list of positive integers"),
        ("3", "row_blocks must be a list of positive integers"),
        ([], r"row_blocks must make num_experts=3 rows, got \[\]"),
    ],
)
def test_wrong_blocks_are_refused(blocks: Any, match: str) -> None:
    with unchecked_types(), pytest.raises(ConfigError, match=match):
        Router(WIDTH, 3, row_blocks=blocks)


def test_growing_must_be_a_flag() -> None:
    with (
        unchecked_types(),
        pytest.raises(ConfigError, match="growing must be True or False, got 1"),
    ):
        Router(WIDTH, 1, growing=1)  # type: ignore[arg-type]


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="reads hidden states of width input_size=6, got 5"):
        grown(2).logits(torch.zeros(1, 5))
