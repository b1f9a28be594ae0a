"""Slots follow shares on streams of any length, without rounding that accumulates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.quota import apportion, claims_of
from tests.strategies import Array, seeds

PLENTY = 10**6


@settings(max_examples=60)
@given(
    seed=seeds,
    shares=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(sum),
    slots=st.integers(1, 40),
    fixed=st.booleans(),
)
def test_strata_stay_within_one_sample_of_their_shares(
    seed: int, shares: list[int], slots: int, fixed: bool
) -> None:
    rng = np.random.default_rng(seed)
    chance = np.array(shares) / sum(shares)
    offered = np.zeros(len(shares), np.int64)
    trained = np.zeros(len(shares), np.int64)
    stock = np.full(len(shares), PLENTY)
    for _ in range(60):
        offered += np.array(shares) if fixed else rng.multinomial(2 * slots, chance)
        before = trained.copy()
        quota = apportion(offered, trained, stock, slots)
        trained += quota
        assert quota.sum() == slots
        share = offered / offered.sum() * trained.sum()
        # What a stratum got beyond its share at most fills its last slot; where shares moved under
        # it, it may still hold what was fair before.
        assert np.all(trained < np.maximum(share + 1, before + 1e-9) + 1e-9)
        if fixed:
            assert np.abs(trained - share).max() < 1 + 1e-9


def test_long_streams_end_within_one_sample() -> None:
    rng = np.random.default_rng(0)
    chance = np.array([0.61, 0.2, 0.15, 0.03, 0.01])
    offered, trained = np.zeros((2, 5), np.int64)
    for _ in range(3000):
        offered += rng.multinomial(13, chance)
        trained += apportion(offered, trained, np.full(5, PLENTY), 9)
    assert np.abs(trained - offered / offered.sum() * trained.sum()).max() <= 1.0


@settings(max_examples=60)
@given(
    columns=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_quotas_never_ask_for_more_than_there_is(
    columns: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    offered, trained, stock = np.array(columns).T
    slots = data.draw(st.integers(0, int(stock.sum())))
    quotas: list[Array] = [
        apportion(offered, trained, stock, slots),
        apportion(offered * 0.4, trained, stock, slots),
    ]
    for quota in quotas:
        assert quota.sum() == slots
        assert np.all((quota >= 0) & (quota <= stock))


def test_a_stratum_without_stock_is_repaid_later() -> None:
    offered, trained = np.array([50, 50]), np.array([0, 0])
    first = apportion(offered, trained, np.array([10, 0]), 4)
    assert first.tolist() == [4, 0]
    assert apportion(offered, trained + first, np.array([10, 10]), 4).tolist() == [0, 4]


@settings(max_examples=200)
@given(
    columns=st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), min_size=1, max_size=6).filter(
        lambda columns: sum(offered for offered, _ in columns) > 0
    ),
    keep=st.floats(0.01, 1.0),
)
def test_what_is_dispensable_has_no_claim_as_far_as_that_is_to_be_pruned(
    columns: list[tuple[int, float]], keep: float
) -> None:
    offered = np.array([count for count, _ in columns])
    worth = offered * np.array([part for _, part in columns])
    claims = claims_of(offered, worth, keep)
    assert np.all((claims >= worth - 1e-9) & (claims <= offered + 1e-9))
    # What is worth keeping, or what is kept if that is more.
    assert claims.sum() == pytest.approx(max(worth.sum(), keep * offered.sum()))
    # So no stratum's share of what is kept is more than it has.
    share = claims / max(claims.sum(), 1e-12) * keep * offered.sum()
    assert np.all(share <= offered + 1e-6)


def test_without_evidence_claims_are_what_was_offered() -> None:
    offered = np.array([7, 0, 3])
    assert claims_of(offered, offered.astype(float), 0.5).tolist() == [7, 0, 3]


def test_a_stratum_of_copies_yields_its_slots() -> None:
    offered, worth = np.array([50, 50]), np.array([50.0, 10.0])
    claims = claims_of(offered, worth, 0.6)
    assert claims.tolist() == [50, 10]
    quota = apportion(claims, np.zeros(2, np.int64), offered, 60)
    assert quota.tolist() == [50, 10]
    # More is kept than is worth it: the copies get what is left.
    claims = claims_of(offered, worth, 0.8)
    assert apportion(claims, np.zeros(2, np.int64), offered, 80).tolist() == [50, 30]


def test_more_slots_than_stock_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slots must be in \[0, 3\], the stock, got 4"):
        apportion(np.array([5, 5]), np.zeros(2, np.int64), np.array([1, 2]), 4)
