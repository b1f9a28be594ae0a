"""Pools and what was trained lately: who is in, who leaves, and coming back from a checkpoint."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.kernels import unit_rows
from slap_stream.core.saved import Saved
from slap_stream.selection.pool import Pool, RecentlyTrained
from slap_stream.selection.state import Lookup
from tests.laws import as_json
from tests.strategies import Array, repeated, seeds, unit_vectors

COLUMNS, METRIC_DIM = 3, 4


def rows_of(ids: Array) -> Array:
    """(n, COLUMNS) design rows that are a function of the id, as the store's are."""
    # Sample 0 has no embedding: a zero one.
    angle, length = ids.astype(float), (ids != 0).astype(float)
    return np.stack(
        [angle, length * np.cos(angle), length * np.sin(angle)], axis=1, dtype=np.float32
    )


LOOKUP = Lookup(num_samples=2**20, num_strata=8, rows_of=rows_of)


def pool_of(capacity: int) -> Pool:
    """An empty pool."""
    return Pool(capacity=capacity, columns=COLUMNS, dim=2, metric_dim=METRIC_DIM)


def offer(pool: Pool, ids: Array, **columns: Array) -> Array:
    """Offer ids with their rows."""
    return pool.offer(rows_of(ids), sample_id=ids, **columns)


def test_a_pool_takes_gives_back_and_reuses_slots() -> None:
    pool = pool_of(5)
    first = offer(pool, np.array([10, 11, 12]), stratum=np.array([0, 1, 0]))
    pool.columns.own_loss[first] = 1.0
    pool.columns.utility[first] = 9.0
    pool.remove(first[1:2])
    assert len(pool) == 2
    second = offer(pool, np.array([20, 21, 22]))
    assert len(pool) == 5
    assert set(first.tolist()) & set(second.tolist()) == {int(first[1])}
    # Nothing of a slot's former candidate is left.
    assert np.all(np.isnan(pool.columns.own_loss[second]))
    assert pool.columns.utility[second].tolist() == [0.0, 0.0, 0.0]
    assert pool.columns.stratum[second].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(pool.x[second], rows_of(np.array([20, 21, 22])))
    pool.clear()
    assert len(pool) == 0
    assert len(pool.slots()) == 0


def test_a_full_pool_refuses_more() -> None:
    pool = pool_of(2)
    offer(pool, np.array([1]))
    with pytest.raises(ValueError, match="must fit into 1 free slots, got 2; prune first"):
        offer(pool, np.array([2, 3]))


@settings(max_examples=80)
@given(candidates=repeated(), seed=seeds, data=st.data())
def test_the_lowest_scores_leave_but_those_due_go_first(
    candidates: tuple[Array, Array], seed: int, data: st.DataObject
) -> None:
    ids, occurrence = candidates
    rng = np.random.default_rng(seed)
    stratum = rng.integers(0, 3, len(ids))
    score = rng.integers(0, 3, len(ids)).astype(float)
    due = rng.random(len(ids)) < 0.3
    have = np.bincount(stratum, minlength=4)
    quota = np.array([data.draw(st.integers(0, int(n))) for n in have])

    def leaving(order: Array, quota: Array | int) -> set[tuple[int, int]]:
        pool = pool_of(len(ids) + 2)
        slots = offer(pool, ids[order], occurrence=occurrence[order], stratum=stratum[order])
        gone = pool.lowest(score[order], quota, due[order], slots)
        return set(zip(pool.columns.sample_id[gone], pool.columns.occurrence[gone], strict=True))

    def first(members: Array, count: int) -> set[tuple[int, int]]:
        ordered = sorted(members, key=lambda i: (not due[i], score[i], occurrence[i], ids[i]))
        return {(ids[i], occurrence[i]) for i in ordered[:count]}

    everyone = np.arange(len(ids))
    by_stratum = [first(np.flatnonzero(stratum == k), int(quota[k])) for k in range(4)]
    assert leaving(everyone, quota) == set().union(*by_stratum)
    total = int(quota.sum())
    assert leaving(everyone, total) == first(everyone, total)
    # Ties are broken by identity: the slots that candidates lie in do not matter.
    assert leaving(rng.permutation(everyone), total) == leaving(everyone, total)


def test_what_was_measured_is_noted_on_every_copy() -> None:
    pool = Pool(
        capacity=6,
        columns=COLUMNS,
        dim=2,
        metric_dim=METRIC_DIM,
        sketch_dim=2,
        measurements=["norm"],
    )
    slots = offer(pool, np.array([5, 6, 5, 7]), occurrence=np.array([0, 0, 1, 0]))
    ids, sketches = np.array([7, 5, 99, 5]), np.arange(8, dtype=np.float32).reshape(4, 2)
    sketches[0, 1] = np.inf
    pool.measure(
        ids, np.array([0.7, 0.5, 9.9, 8.8]), sketches, {"norm": np.arange(4.0) + 1}, since=3
    )
    np.testing.assert_array_equal(pool.columns.own_loss[slots], [0.5, np.nan, 0.5, 0.7])
    assert pool.columns.own_since[slots].tolist() == [3, 0, 3, 3]
    assert pool.sketch[slots].tolist() == [[2.0, 3.0], [0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    assert pool.measured["norm"][slots].tolist() == [2.0, 0.0, 2.0, 1.0]
    # A loss alone leaves the rest as it was.
    pool.measure(np.array([5]), np.array([0.4]), since=4)
    assert pool.sketch[slots[0]].tolist() == [2.0, 3.0]
    pool.measure(np.zeros(0, np.int64), np.zeros(0), since=5)
    np.testing.assert_array_equal(pool.columns.own_loss[slots], [0.4, np.nan, 0.4, 0.7])


def test_a_pool_survives_a_checkpoint() -> None:
    pool = pool_of(6)
    slots = offer(
        pool,
        np.array([5, 6, 7, 8]),
        occurrence=np.array([0, 1, 0, 2]),
        stratum=np.array([1, 0, 1, 3]),
        gumbel=np.array([0.1, -0.2, 1e-17, 3.0]),
    )
    pool.columns.own_loss[slots[0]] = 1.25
    pool.remove(slots[1:2])
    state = as_json(pool.state_dict())
    other = pool_of(6)
    offer(other, np.array([99, 98, 97, 96, 95]))
    other.load_state_dict(Saved(state), LOOKUP)
    np.testing.assert_array_equal(other.slots(), pool.slots())
    for name, column in pool.columns.by_name().items():
        restored = getattr(other.columns, name)
        np.testing.assert_array_equal(restored[other.slots()], column[pool.slots()])
    np.testing.assert_array_equal(other.x[other.slots()], pool.x[pool.slots()])
    np.testing.assert_array_equal(other.unit[other.slots()], pool.x[pool.slots()][:, -2:])


@settings(max_examples=60)
@given(
    batches=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6),
    per_stratum=st.integers(1, 5),
    seed=seeds,
)
def test_the_last_samples_of_each_stratum_are_remembered(
    batches: list[list[int]], per_stratum: int, seed: int
) -> None:
    recent = RecentlyTrained(
        num_strata=4, per_stratum=per_stratum, columns=COLUMNS, dim=2, metric_dim=METRIC_DIM
    )
    expected: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=per_stratum))
    z_of = unit_vectors(seed, 36, METRIC_DIM)
    count = 0
    for batch in batches:
        ids, stratum = np.arange(count, count + len(batch)), np.array(batch, np.int64)
        count += len(batch)
        recent.add(ids, stratum, rows_of(ids), z_of[ids])
        for sample_id, name in zip(ids.tolist(), batch, strict=True):
            expected[name].append(sample_id)
    for name in range(4):
        known = recent.sample_id[name]
        assert set(known[known != -1].tolist()) == set(expected[name])

    query, strata = unit_vectors(seed + 1, 8, METRIC_DIM), np.arange(8) % 4
    strangers = np.arange(8) + 1000
    distance = recent.nearest(query, strata, strangers)
    for z, name, found in zip(query, strata.tolist(), distance.tolist(), strict=True):
        apart = [float(np.linalg.norm(z - z_of[i])) for i in expected[name]]
        assert found == pytest.approx(min(apart, default=np.inf), abs=1e-3)

    again = RecentlyTrained(
        num_strata=4, per_stratum=per_stratum, columns=COLUMNS, dim=2, metric_dim=METRIC_DIM
    )
    again.load_state_dict(Saved(as_json(recent.state_dict())), LOOKUP)
    again.project(lambda x: z_of[np.round(x[:, 0]).astype(int)])
    np.testing.assert_array_equal(again.nearest(query, strata, strangers), distance)

    rows = rows_of(np.arange(8) + 40)
    rows[:, 1:] = unit_rows(rows[:, 1:] + np.float32([0.1, 0.03]) * np.arange(8)[:, None])
    apart = recent.nearest_embedding(rows, np.arange(8), strata, strangers)
    for row, name, found in zip(rows, strata.tolist(), apart.tolist(), strict=True):
        others = [rows_of(np.array([i]))[0, 1:] for i in expected[name]]
        # Sample 0's embedding is zero: it is at distance sqrt(2) from any other.
        cosines = [float(row[1:] @ other) for other in others]
        nearest = np.sqrt(max(0.0, 2 - 2 * max(cosines))) if cosines else np.inf
        assert found == pytest.approx(nearest, abs=1e-3)
    np.testing.assert_array_equal(
        again.nearest_embedding(rows[::-1], np.arange(8)[::-1], strata, strangers), apart
    )
    np.testing.assert_array_equal(again.x, recent.x)
    assert as_json(again.state_dict()) == as_json(recent.state_dict())


def test_a_sample_is_no_copy_of_its_own_earlier_visit() -> None:
    recent = RecentlyTrained(
        num_strata=1, per_stratum=4, columns=COLUMNS, dim=2, metric_dim=METRIC_DIM
    )
    z, stratum = unit_vectors(0, 2, METRIC_DIM), np.zeros(2, np.int64)
    rows = rows_of(np.array([7, 7]))
    recent.add(np.array([7]), stratum[:1], rows[:1], z[:1])
    again = np.tile(z[:1], (2, 1))
    distance = recent.nearest(again, stratum, np.array([7, 8]))
    assert distance[0] == np.inf
    assert distance[1] < 1e-3
    apart = recent.nearest_embedding(rows, np.arange(2), stratum, np.array([7, 8]))
    assert apart[0] == np.inf
    assert apart[1] < 1e-3
