"""What is known of pooled candidates stays true between refreshes, without being found anew."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.appraisal import Appraiser
from slap_stream.config import SlapConfig
from slap_stream.evidence import NO_COPY
from slap_stream.judge import Judge
from slap_stream.kernels import unit_rows
from slap_stream.learnability import LearnabilityModel
from slap_stream.moments import Moments
from slap_stream.policies import make_policy
from slap_stream.reservoir import RecentlyTrained, Reservoirs
from tests.strategies import Array, seeds

DIM, COLUMNS, STRATA = 4, 6, 2


class Lane:
    """A pool, what was trained on lately, and a judge; the rest of a lane left out."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = LearnabilityModel(
            columns=COLUMNS, dim=DIM, metric_dim=3, sketch_dim=16, warmup_losses=16
        )
        shape = {"columns": COLUMNS, "dim": DIM, "metric_dim": 3}
        self.pool = Reservoirs(capacity=200, **shape)
        self.recent = RecentlyTrained(num_strata=STRATA, per_stratum=200, **shape)
        self.appraiser = Appraiser(self.model, (), columns=COLUMNS, dim=DIM)
        self.judge = Judge(
            make_policy(SlapConfig(), has_reference=False),
            self.model,
            self.pool,
            self.recent,
            self.appraiser,
            measured_for_good=False,
        )
        self.offered = 0

    def offer(self, count: int, spread: float) -> None:
        """Candidates around one direction; the closer, the less apart they are."""
        x = np.ones((count, COLUMNS), np.float32)
        x[:, 2:] = unit_rows(x[:, 2:] + spread * self.rng.normal(size=(count, DIM)))
        ids = np.arange(self.offered, self.offered + count)
        self.offered += count
        self.judge.watch(ids, x, ids % STRATA)
        self.judge.appraise(self.pool.offer(x, sample_id=ids, stratum=ids % STRATA), x)

    def train(self, count: int) -> None:
        """Some of the pool are trained on."""
        slots = self.rng.permutation(self.pool.slots())[:count]
        ids, stratum = self.pool.ints("sample_id")[slots], self.pool.ints("stratum")[slots]
        x = self.pool.x[slots]
        self.recent.add(ids, stratum, x, self.pool.z[slots])
        self.pool.remove(slots)
        self.judge.bring_near(ids, stratum, x)

    def learn(self) -> None:
        """A refresh."""
        moments = Moments.zeros(columns=COLUMNS, sketch_dim=16)
        x = self.rng.normal(size=(40, COLUMNS)).astype(np.float32)
        x[:, 0] = 1.0
        sketches = self.rng.normal(size=(40, 16)).astype(np.float32)
        moments.add_sketched(x, self.rng.normal(size=40), sketches)
        self.model.refresh([moments], forgetting=0.9)
        assert self.judge.refresh()

    def distances(self) -> tuple[Array, Array]:
        """Distances that the pool holds, and found anew, as far as they can tell a copy."""
        pool, slots = self.pool, self.pool.slots()
        found = self.recent.nearest_embedding(
            pool.x, slots, pool.ints("stratum")[slots], pool.ints("sample_id")[slots]
        )
        most = NO_COPY * self.appraiser.apart
        return np.minimum(pool.floats("distance")[slots], most), np.minimum(found, most)


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    steps=st.lists(st.sampled_from(["near", "far", "train", "learn"]), min_size=4, max_size=14),
)
def test_distances_are_those_to_all_that_was_trained_on(seed: int, steps: list[str]) -> None:
    lane = Lane(seed)
    for step in ["near", "train", *steps, "learn"]:
        if step in ("near", "far"):
            lane.offer(10, 0.1 if step == "near" else 1.0)
        elif step == "train":
            lane.train(3)
        else:
            lane.learn()
        held, found = lane.distances()
        np.testing.assert_allclose(held, found, atol=1e-3)


def test_candidates_lie_where_the_metric_puts_them_whether_it_has_moved_or_not() -> None:
    lane = Lane(0)
    lane.offer(20, 1.0)
    lane.train(5)
    moved = []
    for _ in range(12):
        before = lane.model.metric
        lane.learn()
        moved.append(lane.model.metric is not before)
        lane.offer(3, 1.0)
        slots, used = lane.pool.slots(), lane.recent.sample_id >= 0
        for rows, z in (
            (lane.pool.x[slots], lane.pool.z[slots]),
            (lane.recent.x[used], lane.recent.z[used]),
        ):
            np.testing.assert_array_equal(z, lane.appraiser.project(rows))
    assert 3 < sum(moved) < 12


def test_a_yardstick_that_outgrows_what_is_known_has_the_pool_compared_anew() -> None:
    lane = Lane(1)
    lane.offer(60, 0.05)
    lane.learn()
    lane.train(10)
    near = lane.judge.reach
    lane.offer(120, 2.0)
    lane.learn()
    assert lane.judge.reach > 2.0 * near
    held, found = lane.distances()
    np.testing.assert_allclose(held, found, atol=1e-3)
    assert np.count_nonzero(held > near) > 0
