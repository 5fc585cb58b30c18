"""Laws of loads, entropy, information and similarity, and small cases by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora.errors import ReportError
from moelora.report.statistics import (
    coactivation_sums,
    cosines,
    entropy,
    load_of,
    mutual_information,
    pair_products,
    shuffled_labels,
    token_shares,
)


def _generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Sparse routing weights of either sign, tokens x experts; some tokens have none."""
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    generator = _generator(draw)
    values = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return values * (torch.rand(tokens, experts, generator=generator) < 0.6)


@st.composite
def sums(draw: st.DrawFn) -> Tensor:
    """Sums of shares, domains x experts."""
    sizes = [draw(st.integers(1, 5)), draw(st.integers(1, 6))]
    values = torch.rand(*sizes, generator=_generator(draw), dtype=torch.float64)
    return values.mul(6).exp().sub(1) + 1e-3


def information_by_hand(table: list[list[float]]) -> float:
    """The double sum of the definition, in plain Python."""
    total = sum(map(sum, table))
    rows = [sum(row) / total for row in table]
    columns = [sum(column) / total for column in zip(*table, strict=True)]
    return sum(
        value / total * math.log2(value / total / (row * column))
        for row, values in zip(rows, table, strict=True)
        for column, value in zip(columns, values, strict=True)
        if value > 0
    )


@given(weights())
def test_shares_of_a_token_sum_to_one_unless_it_has_no_weight(values: Tensor) -> None:
    shares = token_shares(values)
    served = (values != 0).any(dim=-1).double()
    torch.testing.assert_close(shares.sum(dim=-1), served)
    assert (shares >= 0).all()


@given(weights())
def test_a_load_sums_to_one(values: Tensor) -> None:
    load = load_of(token_shares(values).sum(dim=0))
    expected = 1.0 if bool(values.any()) else 0.0
    assert load.sum().item() == pytest.approx(expected)


@given(weights(), st.randoms(use_true_random=False))
def test_renaming_experts_permutes_the_columns(values: Tensor, random: object) -> None:
    order = list(range(values.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(token_shares(values)[:, order], token_shares(values[:, order]))
    torch.testing.assert_close(
        coactivation_sums(values)[order][:, order], coactivation_sums(values[:, order])
    )


@given(weights())
def test_entropy_lies_between_zero_and_that_of_even_shares(values: Tensor) -> None:
    bits = entropy(token_shares(values))
    assert (bits >= 0).all()
    assert (bits <= math.log2(values.shape[1]) + 1e-9).all()


@pytest.mark.parametrize(
    ("shares", "bits"),
    [([1.0, 0.0], 0.0), ([0.5, 0.5], 1.0), ([0.25] * 4, 2.0), ([0.5, 0.25, 0.25], 1.5)],
)
def test_entropy_of_small_cases(shares: list[float], bits: float) -> None:
    assert entropy(torch.tensor(shares, dtype=torch.float64)).item() == pytest.approx(bits)


@given(weights())
def test_the_diagonal_of_coactivation_counts_the_tokens_an_expert_serves(values: Tensor) -> None:
    together = coactivation_sums(values)
    torch.testing.assert_close(together.diagonal(), (values != 0).double().sum(dim=0))
    torch.testing.assert_close(together, together.T)
    assert (together <= together.diagonal().unsqueeze(0)).all()


@given(sums())
def test_information_is_the_sum_of_its_definition(values: Tensor) -> None:
    bits = mutual_information(values).item()
    assert bits == pytest.approx(information_by_hand(values.tolist()), abs=1e-9)


@given(sums())
def test_information_lies_between_zero_and_both_entropies(values: Tensor) -> None:
    bits = mutual_information(values).item()
    domains = entropy(load_of(values.sum(dim=1))).item()
    load = entropy(load_of(values.sum(dim=0))).item()
    assert 0 <= bits <= min(domains, load) + 1e-9


@given(sums(), st.integers(1, 5))
def test_domains_that_are_alike_say_nothing(values: Tensor, copies: int) -> None:
    row = values[:1]
    scales = torch.arange(1, copies + 1, dtype=torch.float64).unsqueeze(1)
    assert mutual_information(row * scales).item() == pytest.approx(0.0, abs=1e-9)


@given(weights(), st.integers(1, 4))
def test_a_domain_never_says_more_than_the_tokens_do(values: Tensor, domains: int) -> None:
    shares = token_shares(values)
    shares = shares[shares.sum(dim=-1) > 0]
    if len(shares) == 0:
        return
    of = torch.arange(len(shares)) % domains
    by_domain = torch.stack([shares[of == domain].sum(dim=0) for domain in range(domains)])
    gap = entropy(load_of(shares.sum(dim=0))) - entropy(shares).mean()
    assert mutual_information(by_domain).item() <= gap.item() + 1e-9


def test_domains_with_experts_of_their_own_say_all() -> None:
    assert mutual_information(torch.eye(4, dtype=torch.float64)).item() == pytest.approx(2.0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 5), st.integers(0, 99))
def test_shuffling_keeps_the_labels_and_how_many_there_are(
    labels: list[int], permutations: int, seed: int
) -> None:
    true = torch.tensor(labels)
    rows = shuffled_labels(true, permutations=permutations, seed=seed)
    assert rows.shape == (permutations + 1, len(labels))
    assert torch.equal(rows[0], true)
    assert all(sorted(row) == sorted(labels) for row in rows.tolist())
    assert torch.equal(rows, shuffled_labels(true, permutations=permutations, seed=seed))


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.data())
def test_products_in_rank_space_are_those_of_the_whole_updates(
    experts: int, width: int, height: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    ranks = [data.draw(st.integers(1, 4)) for _ in range(experts)]
    pairs = [(normal(r, width), normal(height, r), 1.5 - index) for index, r in enumerate(ranks)]
    whole = torch.stack([(scaling * b @ a).flatten() for a, b, scaling in pairs])
    torch.testing.assert_close(pair_products(pairs), whole @ whole.T, rtol=1e-7, atol=1e-9)


def test_cosines_of_small_cases() -> None:
    vectors = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    values = cosines(vectors @ vectors.T)
    half = 1 / math.sqrt(2)
    expected = torch.tensor([[1.0, -1.0, half], [-1.0, 1.0, -half], [half, -half, 1.0]]).double()
    torch.testing.assert_close(values[:3, :3], expected)
    assert values[3].isnan().all()
    assert values[:, 3].isnan().all()


def test_experts_of_different_widths_are_not_compared() -> None:
    pairs = [(torch.ones(1, width), torch.ones(2, 1), 1.0) for width in (2, 3)]
    with pytest.raises(ReportError, match="different widths"):
        pair_products(pairs)


def test_all_orders_of_three_labels_come_up() -> None:
    rows = shuffled_labels(torch.tensor([0, 1, 2]), permutations=200, seed=0)
    assert {tuple(row) for row in rows.tolist()} == set(itertools.permutations(range(3)))
