"""Packing the rows of many layers at once: what is learnt, and what is given up."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora.ops import Member, rows_together
from moelora.ops.routed_triton import sizes_of
from moelora.ops.rows_together import RowsTogether

X = torch.ones(3, 4)
RANKS, EXPERTS, WIDTH = 4, 2, 5


class NoLaunch:
    """Stands for the kernels; what they would write is looked at in Triton's interpreter."""

    def __init__(self) -> None:
        self.launches = 0

    def pack_all(self, *_arguments: Any) -> None:
        self.launches += 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that were packed alone, by number of members."""
    packed: list[int] = []

    def pack(x: Tensor, members: list[Member], _sizes: Any) -> tuple[Tensor, list[Tensor]]:
        packed.append(len(members))
        return x.new_zeros(1), [member.lora_b for member in members]

    kernels = NoLaunch()
    monkeypatch.setattr(rows_together, "pack", pack)
    monkeypatch.setattr(rows_together, "launchers", lambda: kernels)
    return packed


def layer(dtype: torch.dtype = torch.float32) -> Member:
    shapes = [(RANKS, 4), (WIDTH, RANKS), (EXPERTS, 4)]
    return Member(
        torch.ones(WIDTH, 4), None, *(nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes)
    )


def forward(together: RowsTogether, *groups: list[Member]) -> None:
    rows = together.begin()
    for members in groups:
        rows.get(X, members, sizes_of(RANKS, EXPERTS, 4, X.dtype, len(members)))
    rows.end()


def test_what_one_forward_packs_alone_the_next_packs_at_once(alone: list[int]) -> None:
    together, layers = RowsTogether(), [layer() for _ in range(4)]
    groups = [layers[:3], layers[3:]]
    forward(together, *groups)
    assert alone == [3, 1]
    forward(together, *groups)
    forward(together, *groups)
    assert alone == [3, 1]


def test_layers_that_come_later_are_learnt_too(alone: list[int]) -> None:
    together, layers = RowsTogether(), [layer() for _ in range(3)]
    forward(together, layers[:1])
    forward(together, layers[:1], layers[1:])
    assert alone == [1, 2]
    forward(together, layers[:1], layers[1:])
    assert alone == [1, 2]


def test_layers_that_most_forwards_leave_out_are_forgotten(alone: list[int]) -> None:
    together, layers = RowsTogether(), [layer() for _ in range(5)]
    forward(together, *([one] for one in layers))
    forward(together, [layers[0]])
    alone.clear()
    forward(together, *([one] for one in layers))
    assert len(alone) == 4


def test_a_forward_without_any_packing_forgets_nothing(alone: list[int]) -> None:
    together, one = RowsTogether(), [layer()]
    forward(together, one)
    forward(together)
    alone.clear()
    forward(together, one)
    assert alone == []


def test_a_layer_that_goes_is_not_kept_alive(alone: list[int]) -> None:
    together, layers = RowsTogether(), [layer(), layer()]
    groups = [layers[:1], layers[1:]]
    forward(together, *groups)
    del groups, layers[1:]
    gc.collect()
    alone.clear()
    # once alone, since what is known is out of date; then at once again
    forward(together, layers)
    forward(together, layers)
    forward(together, layers)
    assert alone == [1]


def test_parameters_whose_memory_is_away_are_packed_when_it_is_back(alone: list[int]) -> None:
    together, one = RowsTogether(), layer()
    forward(together, [one])
    # as FSDP does between forwards
    one.lora_a.data.untyped_storage().resize_(0)
    alone.clear()
    forward(together, [one])
    assert alone == [1]
    one.lora_a.data.untyped_storage().resize_(RANKS * 4 * 4)
    forward(together, [one])
    assert alone == [1]


def test_parameters_of_another_shape_are_packed_for_it(alone: list[int]) -> None:
    together, one = RowsTogether(), layer()
    forward(together, [one])
    one.lora_a.data, one.lora_b.data = torch.ones(2 * RANKS, 4), torch.ones(WIDTH, 2 * RANKS)
    sizes = sizes_of(2 * RANKS, EXPERTS, 4, X.dtype, 1)
    alone.clear()
    for packed in (1, 1):
        rows = together.begin()
        rows.get(X, [one], sizes)
        rows.end()
        assert len(alone) == packed
    # views of the same memory
    one.lora_a.data, one.lora_b.data = one.lora_a.data[:RANKS], one.lora_b.data[:, :RANKS].clone()
    forward(together, [one])
    assert len(alone) == 2


def test_parameters_that_move_every_time_are_packed_alone_in_the_end(alone: list[int]) -> None:
    together, one = RowsTogether(), layer()
    places = []
    for _ in range(rows_together._MAX_MOVES + 4):
        # all are kept, so each is somewhere else
        places.append(torch.ones(RANKS, 4))
        one.lora_a.data = places[-1]
        forward(together, [one])
    assert len(alone) == 3


@pytest.mark.parametrize("kind", ["dtype", "not contiguous"])
def test_parameters_that_one_kernel_cannot_read_are_packed_alone(
    alone: list[int], kind: str
) -> None:
    together, one, other = RowsTogether(), layer(), layer()
    if kind == "dtype":
        other = other._replace(router=nn.Parameter(other.router.detach().double()))
    else:
        other.router.data = torch.ones(4, EXPERTS).t()
    for _ in range(3):
        forward(together, [one], [other])
    assert alone == [1, 1] * 3


def launches_of(together: RowsTogether) -> int:
    return len(set(map(id, together._portions.values())))


def test_layers_of_each_kind_are_packed_together(alone: list[int]) -> None:
    together = RowsTogether()
    layers = [layer(), layer(), layer(torch.float64), layer(torch.float64)]
    for _ in range(3):
        forward(together, *([one] for one in layers))
    assert alone == [1] * 4
    assert rows_together.launchers().launches == 2 * 2
    assert launches_of(together) == 2


def test_a_portion_is_no_larger_than_it_may_be(
    alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, layers = RowsTogether(), [layer() for _ in range(5)]
    sizes = sizes_of(RANKS, EXPERTS, 4, X.dtype, 1)
    monkeypatch.setattr(rows_together, "_PORTION", 2 * (sizes.rows * 4 + WIDTH * RANKS))
    for _ in range(2):
        forward(together, *([one] for one in layers))
    assert alone == [1] * 5
    assert rows_together.launchers().launches == launches_of(together) == 3
    # one layer may be more than a portion
    monkeypatch.setattr(rows_together, "_PORTION", 1)
    forward(together, *([one] for one in layers), [layer()])
    assert launches_of(together) == 6


def test_without_gradients_one_portion_is_held_at_a_time(
    alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_together, "_PORTION", 1)
    together, layers = RowsTogether(), [layer() for _ in range(3)]
    forward(together, *([one] for one in layers))
    sizes = sizes_of(RANKS, EXPERTS, 4, X.dtype, 1)
    for keeps in (True, False):
        rows = together.begin()
        packer = rows.get if keeps else rows.lend
        held = [weakref.ref(packer(X, [one], sizes)[0]) for one in layers]
        assert [own() is not None for own in held] == [keeps, keeps, True]
        # asked for once more, as by a model that runs a block twice
        packer(X, layers[:1], sizes)
        rows.end()
    assert alone == [1] * 3
    assert rows_together.launchers().launches == 3 + 4


@pytest.mark.parametrize("width", [4, 6, 64, 100])
def test_all_matrices_are_aligned_and_none_overlap(width: int) -> None:
    shapes = [(3, width), (5, 8), (1, width), (7, 8), (2, width)]
    layout = rows_together._layout(shapes)
    out = torch.full((layout.size,), -1)
    views = [view for region in layout.regions for view in region.views(out)]
    for number, (shape, start, place) in enumerate(
        zip(shapes, layout.starts, layout.places, strict=True)
    ):
        view = views[place]
        assert view.shape == shape
        assert view.is_contiguous()
        assert view.storage_offset() == start
        assert start % rows_together._ALIGNMENT == 0
        assert bool((view == -1).all())
        view.fill_(number)


def test_layers_that_learning_never_helps_are_packed_alone_in_the_end(alone: list[int]) -> None:
    together, one, other = RowsTogether(), layer(), layer()
    # one reads another dtype than the other, in each forward
    wide = X.double()
    for _ in range(rows_together._MAX_MOVES + 5):
        rows = together.begin()
        rows.get(X, [one], sizes_of(RANKS, EXPERTS, 4, X.dtype, 1))
        rows.get(wide, [other], sizes_of(RANKS, EXPERTS, 4, wide.dtype, 1))
        rows.end()
    launches = rows_together.launchers().launches
    assert launches == rows_together._MAX_MOVES + 1
    assert not together.knows((id(one.lora_a), 1))


def test_what_another_thread_has_forgotten_is_packed_alone(
    alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, one = RowsTogether(), layer()
    forward(together, [one])
    monkeypatch.setattr(together, "knows", lambda key: together._want({}) or True)
    forward(together, [one])
    assert alone == [1, 1]


def test_changes_in_a_forward_are_seen_until_its_recomputation(alone: list[int]) -> None:
    together, one = RowsTogether(), layer()
    sizes = sizes_of(RANKS, EXPERTS, 4, X.dtype, 1)
    forward(together, [one])
    rows = together.begin()
    first = rows.get(X, [one], sizes)[0]
    rows.end()
    assert rows.get(X, [one], sizes)[0] is first
    alone.clear()
    with torch.no_grad():
        one.lora_b.add_(1)
    rows.get(X, [one], sizes)
    assert alone == [1]


def test_a_scope_that_is_pickled_takes_nothing_along() -> None:
    from moelora.scope import RoutingScope

    scope = RoutingScope()
    forward(scope.rows)
    assert pickle.loads(pickle.dumps(scope)).rows is not scope.rows
