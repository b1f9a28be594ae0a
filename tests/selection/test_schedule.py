"""Slots follow shares on streams of any length, without rounding that accumulates."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slap_stream.config import Advanced, SlapConfig
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.selection.order import ShardTable, lane_bounds
from slap_stream.selection.quota import Keep, apportion, claims_of, raised
from slap_stream.selection.schedule import LanePlan, LaneProgress, plan_run, steps_of_epoch
from tests.strategies import Array, seeds


def plan_of(
    num_candidates: int, *, num_lanes: int, batch_size: int, keep: float, pool_batches: int = 4
) -> LanePlan:
    """A plan over one shard."""
    return LanePlan(
        table=ShardTable.of(np.array([num_candidates])),
        store=ArrayStore(np.zeros((num_candidates, 3), np.float16)),
        config=SlapConfig(keep=keep, advanced=Advanced(pool_batches=pool_batches)),
        num_lanes=num_lanes,
        batch_size=batch_size,
        parts=steps_of_epoch(num_candidates, num_lanes * batch_size, keep),
    )


@pytest.mark.parametrize(
    ("keep", "candidates", "batch", "steps"),
    [
        # 0.7 * 10 is 6.999... in binary; the user wrote 0.7 and expects 7.
        (0.7, 10, 1, 7),
        (0.1, 30, 3, 1),
        (0.29, 100, 1, 29),
        (1.0, 7, 2, 3),
        (1, 7, 7, 1),
        (1e-5, 10**6, 10, 1),
        (0.5, 3, 2, 0),
    ],
)
def test_steps_take_keep_as_it_was_written(
    keep: float, candidates: int, batch: int, steps: int
) -> None:
    assert steps_of_epoch(candidates, batch, keep) == steps


@given(
    thousandths=st.integers(1, 1000), candidates=st.integers(0, 10**12), batch=st.integers(1, 999)
)
def test_steps_are_exact(thousandths: int, candidates: int, batch: int) -> None:
    exact = Fraction(thousandths, 1000) * candidates // batch
    assert steps_of_epoch(candidates, batch, thousandths / 1000) == exact


@settings(max_examples=150)
@given(
    num_candidates=st.integers(1, 3000),
    num_lanes=st.integers(1, 8),
    batch_size=st.integers(1, 20),
    keep=st.sampled_from([1.0, 0.7, 0.31, 0.02]),
    pool_batches=st.integers(2, 6),
)
def test_the_pool_fills_stays_level_and_drains(
    num_candidates: int, num_lanes: int, batch_size: int, keep: float, pool_batches: int
) -> None:
    assume(steps_of_epoch(num_candidates, num_lanes * batch_size, keep))
    plan = plan_of(
        num_candidates,
        num_lanes=num_lanes,
        batch_size=batch_size,
        keep=keep,
        pool_batches=pool_batches,
    )
    for candidates in set(np.diff(lane_bounds(num_candidates, num_lanes)).tolist()):
        pooled, offered = 0, 0
        for step in range(plan.max_steps):
            before, offered = offered, plan.offered_before(step, step, keep, candidates)
            assert offered >= before
            pooled += offered - before
            # A full batch can be made, and a batch's worth of room was never exceeded.
            assert batch_size <= pooled <= plan.pool_size
            after = plan.pooled_after(step, step, plan.after(step, keep), keep, candidates)
            assert 0 <= after <= pooled - batch_size
            pooled = after
        assert offered == candidates
        assert pooled == 0


@settings(max_examples=100)
@given(
    num_candidates=st.integers(1, 3000),
    num_lanes=st.integers(1, 8),
    batch_size=st.integers(1, 20),
    keep_min=st.sampled_from([1.0, 0.7, 0.5, 0.25]),
    pool_batches=st.integers(2, 6),
    moves=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20),
)
def test_whatever_is_kept_an_epoch_of_full_steps_ends_with_an_empty_pool(
    num_candidates: int,
    num_lanes: int,
    batch_size: int,
    keep_min: float,
    pool_batches: int,
    moves: list[float],
) -> None:
    steps = num_candidates // (num_lanes * batch_size)
    assume(steps)
    plan = plan_run(
        ShardTable.of(np.array([num_candidates])),
        ArrayStore(np.zeros((num_candidates, 3), np.float16)),
        SlapConfig(
            keep="auto",
            keep_min=keep_min,
            steps="full",
            advanced=Advanced(pool_batches=pool_batches),
        ),
        num_lanes=num_lanes,
        batch_size=num_lanes * batch_size,
        world_size=1,
    )
    assert plan.max_steps == steps
    assert plan.passes == math.ceil(1 / Fraction(str(keep_min)))
    for once in set(np.diff(lane_bounds(num_candidates, num_lanes)).tolist()):
        candidates, offered, left, part = plan.passes * once, 0, 0, 0
        for step in range(steps):
            assert not plan.is_over(step, part)
            # What is kept moves at refreshes.
            keep = keep_min + (1.0 - keep_min) * moves[step * len(moves) // steps]
            offered = max(offered, plan.offered_before(step, part, keep, candidates))
            assert batch_size <= offered - left <= plan.pool_size
            end = plan.after(part, keep)
            pooled = plan.pooled_after(step, part, end, keep, candidates)
            assert pooled >= 0
            left, part = max(left + batch_size, offered - pooled), end
            assert plan.steps_left(step + 1, part, keep) == steps - step - 1
        assert plan.is_over(steps, part)
        assert plan.done(steps, part) == 1.0
        assert left == offered <= candidates


def test_a_small_keep_widens_the_pool() -> None:
    assert plan_of(10_000, num_lanes=1, batch_size=10, keep=0.5).pool_size == 40
    assert plan_of(10_000, num_lanes=1, batch_size=10, keep=0.1).pool_size == 200
    assert plan_of(30, num_lanes=1, batch_size=10, keep=1.0).pool_size == 30


def test_feedback_is_awaited_beyond_lookahead_and_probes() -> None:
    plan = plan_of(1000, num_lanes=1, batch_size=10, keep=0.5)
    assert plan.patience >= plan.config.lookahead + 2 * plan.config.probe_every
    assert plan.columns == 2 + 0 + 3


def test_progress_counts_by_stratum_and_begins_anew() -> None:
    progress = LaneProgress(num_strata=4)
    progress.offered += progress.by_stratum(np.array([0, 2, 2]))
    assert progress.offered.tolist() == [1, 0, 2, 0]
    assert progress.trained.tolist() == [0, 0, 0, 0]
    progress.step = 7
    progress.begin(3)
    assert (progress.epoch, progress.step) == (3, 0)
    assert progress.offered.tolist() == progress.pruned.tolist() == [0, 0, 0, 0]


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


probabilities = hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(0.0, 1.0))


@given(probability=probabilities, factor=st.floats(1.0, 1e5))
def test_raised_odds_keep_their_order_and_what_is_certain(
    probability: Array, factor: float
) -> None:
    higher = raised(probability, factor)
    assert np.all((higher >= probability - 1e-12) & (higher <= 1.0))
    assert np.all(np.diff(higher[np.argsort(probability)]) >= 0.0)
    certain = (probability == 0.0) | (probability == 1.0)
    np.testing.assert_array_equal(higher[certain], probability[certain])


@given(relevance=probabilities, keep=st.floats(0.05, 1.0), fit=st.floats(0.1, 1.0))
def test_odds_are_raised_until_as_much_is_worth_keeping_as_is_kept(
    relevance: Array, keep: float, fit: float
) -> None:
    fraction = Keep(SlapConfig(keep=keep))
    fraction.aim(relevance, np.full(len(relevance), fit))
    assert fraction.leniency >= 1.0
    found = float(np.mean(raised(relevance, fraction.leniency) * fit))
    # Not beyond, unless as much is of the kind without; nor less, unless the odds have no more.
    plain = float(np.mean(relevance * fit))
    assert found <= max(plain, keep) + 1e-6
    assert found >= keep - 1e-6 or fraction.leniency > 1e5
    assert fraction.value == keep


@given(relevance=probabilities)
def test_auto_keeps_what_is_of_the_kind_and_no_less_than_it_may(relevance: Array) -> None:
    fraction = Keep(SlapConfig(keep="auto", keep_min=0.2))
    fraction.aim(relevance, np.ones(len(relevance)))
    share = float(relevance.mean())
    assert fraction.value == pytest.approx(max(0.2, share))
    if share >= 0.2:
        assert fraction.leniency == 1.0
        return
    # Then it keeps what is next likeliest, as a fixed fraction does.
    fixed = Keep(SlapConfig(keep=0.2))
    fixed.aim(relevance, np.ones(len(relevance)))
    assert fraction.leniency == fixed.leniency >= 1.0


@given(relevance=probabilities, fit=st.floats(0.1, 1.0))
def test_what_auto_goes_by_is_not_what_the_raised_odds_say(relevance: Array, fit: float) -> None:
    fraction = Keep(SlapConfig(keep="auto", keep_min=0.9))
    fraction.aim(relevance, np.full(len(relevance), fit))
    higher = raised(relevance, fraction.leniency)
    plain = fraction.plain(higher * fit, 1.0 - higher)
    np.testing.assert_allclose(plain, relevance * fit, rtol=1e-6, atol=1e-9)
    fraction.refresh(plain.sum(), len(plain))
    assert fraction.dispensable == pytest.approx(1.0 - float(np.mean(relevance * fit)), abs=1e-6)
