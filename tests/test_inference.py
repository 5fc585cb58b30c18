"""What a prepared model keeps between its forwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora import prepare_for_inference
from moelora.errors import UnsupportedLayerError
from moelora.ops import Member, packing
from moelora.ops.packing import KeptRows
from moelora.ops.routed_triton import Sizes, sizes_of
from tests.lm import gradients_of, lora_layers, mixture, token_ids
from tests.tolerances import assert_equal


def members(number: int = 2) -> list[Member]:
    return [
        Member(torch.ones(3, 2), None, *(nn.Parameter(torch.ones(4, 4)) for _ in range(3)))
        for _ in range(number)
    ]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks the kept rows of members; what it gives is the number of times they were packed."""
    packs, store = [], KeptRows()

    def pack(x: Tensor, some: list[Member], _sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
        packs.append(some)
        return x.new_full((1,), len(packs)), [member.lora_b for member in some]

    monkeypatch.setattr(packing, "pack", pack)

    def ask(some: list[Member], dtype: torch.dtype = torch.float32) -> int:
        rows, lora_bs = store.get(
            torch.ones(1, 2, dtype=dtype), some, sizes_of(4, 2, 4, dtype, len(some))
        )
        assert all(a is m.lora_b for a, m in zip(lora_bs, some, strict=True))
        return int(rows)

    return ask


def test_rows_are_packed_once_for_each_number_of_members(kept: Any) -> None:
    some = members()
    assert [kept(some), kept(some), kept(some[:1]), kept(some), kept(some[:1])] == [1, 1, 2, 1, 2]


@pytest.mark.parametrize("which", [2, 3, 4], ids=["A", "B", "router"])
@pytest.mark.parametrize("member", [0, 1])
def test_rows_are_packed_anew_when_any_parameter_has_changed(
    kept: Any, member: int, which: int
) -> None:
    some = members()
    assert kept(some) == 1
    with torch.no_grad():
        some[member][which].add_(1)
    assert [kept(some), kept(some)] == [2, 2]
    fields = list(some[member])
    fields[which] = nn.Parameter(torch.ones(4, 4))
    some[member] = Member(*fields)
    assert [kept(some), kept(some)] == [3, 3]


def test_rows_are_packed_for_each_dtype_of_the_input(kept: Any) -> None:
    some = members()
    assert [kept(some), kept(some, torch.bfloat16), kept(some, torch.bfloat16)] == [1, 2, 2]


def test_parameters_without_a_version_are_packed_each_time(kept: Any) -> None:
    with torch.inference_mode():
        some = [
            Member(torch.ones(3, 2), None, *(torch.ones(4, 4) for _ in range(3))) for _ in range(2)
        ]
    assert [kept(some), kept(some)] == [1, 2]


def test_a_prepared_model_gives_and_learns_the_same() -> None:
    model, ids = mixture(), token_ids()
    plain = copy.deepcopy(model)
    prepared = prepare_for_inference(model)
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        assert_equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    for each in (model, plain):
        each.train()
        each(input_ids=ids, labels=ids).loss.backward()
    assert_equal(gradients_of(model), gradients_of(plain))
    prepared.remove()
    prepared.remove()
    assert not any("keeps_rows" in key for la in lora_layers(model).values() for key in vars(la))


def test_a_prepared_model_can_be_copied_and_pickled() -> None:
    model, ids = mixture().eval(), token_ids()
    with prepare_for_inference(model), torch.no_grad():
        expected = model(input_ids=ids).logits
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(each(input_ids=ids).logits, expected)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="needs LoRA layers, but Linear has none"):
        moelora.prepare_for_inference(nn.Linear(2, 2))
