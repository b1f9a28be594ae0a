"""How an epoch is cut into steps, and how the pool fills, stays level and drains."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slap_stream.config import SlapConfig
from slap_stream.encoding.stores import ArrayStore
from slap_stream.order import ShardTable, lane_bounds
from slap_stream.plan import LanePlan, Progress, steps_of_epoch


def plan_of(
    num_candidates: int, *, num_lanes: int, batch_size: int, keep: float, pool_batches: int = 4
) -> LanePlan:
    """A plan over one shard."""
    return LanePlan(
        table=ShardTable.of(np.array([num_candidates])),
        store=ArrayStore(np.zeros((num_candidates, 3), np.float16)),
        config=SlapConfig(keep=keep, pool_batches=pool_batches),
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
            before, offered = offered, plan.offered_before(step, candidates)
            assert offered >= before
            pooled += offered - before
            # A full batch can be made, and a batch's worth of room was never exceeded.
            assert batch_size <= pooled <= plan.pool_size
            after = plan.pooled_after(step, plan.after(step, keep), candidates)
            assert 0 <= after <= pooled - batch_size
            pooled = after
        assert offered == candidates
        assert pooled == 0


def test_a_small_keep_widens_the_pool() -> None:
    assert plan_of(10_000, num_lanes=1, batch_size=10, keep=0.5).pool_size == 40
    assert plan_of(10_000, num_lanes=1, batch_size=10, keep=0.1).pool_size == 200
    assert plan_of(30, num_lanes=1, batch_size=10, keep=1.0).pool_size == 30


def test_feedback_is_awaited_beyond_lookahead_and_probes() -> None:
    plan = plan_of(1000, num_lanes=1, batch_size=10, keep=0.5)
    assert plan.patience >= plan.config.lookahead + 2 * plan.config.probe_every
    assert plan.columns == 2 + 0 + 3


def test_progress_counts_by_stratum_and_begins_anew() -> None:
    progress = Progress(num_strata=4)
    progress.offered += progress.by_stratum(np.array([0, 2, 2]))
    assert progress.offered.tolist() == [1, 0, 2, 0]
    assert progress.trained.tolist() == [0, 0, 0, 0]
    progress.step = 7
    progress.begin(3)
    assert (progress.epoch, progress.step) == (3, 0)
    assert progress.offered.tolist() == progress.pruned.tolist() == [0, 0, 0, 0]
