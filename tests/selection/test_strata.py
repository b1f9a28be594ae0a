"""Strata: few enough for the pool, one for each source and cluster, moved slowly."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.saved import Saved
from slap_stream.selection.strata import MIN_POOL_OF_STRATUM, Strata, cluster_sums
from tests.laws import as_json
from tests.strategies import Array, seeds


def strata_of(num_sources: int = 1, num_clusters: int = 4, *, dim: int = 6) -> Strata:
    """Strata over a pool that is never too thin."""
    return Strata(num_sources=num_sources, num_clusters=num_clusters, pool_size=10_000, dim=dim)


def blobs(seed: int, clusters: int, per_cluster: int, dim: int = 6) -> tuple[Array, Array]:
    """(n, dim) rows around far-apart directions and scales that mean nothing; (n,) blobs."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:clusters]
    label = np.repeat(np.arange(clusters), per_cluster)
    rows = directions[label] + 0.05 * rng.normal(size=(len(label), dim))
    order = rng.permutation(len(label))
    return (rows * rng.uniform(0.5, 5.0, (len(rows), 1)))[order].astype(np.float32), label[order]


@settings(max_examples=60)
@given(
    num_sources=st.integers(1, 40), num_clusters=st.integers(1, 40), pool_size=st.integers(1, 2000)
)
def test_strata_are_never_too_thin_for_the_pool(
    num_sources: int, num_clusters: int, pool_size: int
) -> None:
    strata = Strata(num_sources=num_sources, num_clusters=num_clusters, pool_size=pool_size, dim=3)
    assert 1 <= strata.num_strata <= max(1, pool_size // MIN_POOL_OF_STRATUM)
    assert len(strata.centroids) <= num_clusters
    # Clusters give way before sources do.
    assert strata.by_source == (1 < num_sources <= max(1, pool_size // MIN_POOL_OF_STRATUM))
    source = np.arange(num_sources)
    assigned = strata.assign(np.ones((num_sources, 3), np.float32), source)
    assert np.all((assigned >= 0) & (assigned < strata.num_strata))
    if strata.by_source:
        assert len(np.unique(assigned)) == num_sources


def test_sources_that_are_too_many_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slap_stream.selection.strata"):
        Strata(num_sources=9, num_clusters=2, pool_size=64, dim=3)
    assert "9 sources are too many for a pool of 64 candidates" in caplog.text
    assert "larger batch or pool_batches" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_found_whatever_the_lengths_of_the_rows(seed: int) -> None:
    rows, label = blobs(seed, 4, 40)
    strata = strata_of()
    strata.seed(rows, seed=seed)
    found = strata.clusters(rows)
    # The same partition, under other names.
    assert len({(int(a), int(b)) for a, b in zip(label, found, strict=True)}) == 4
    np.testing.assert_allclose(np.linalg.norm(strata.centroids, axis=1), 1.0, rtol=1e-5)


def test_seeding_is_a_function_of_rows_and_seed() -> None:
    rows, _ = blobs(0, 5, 30)
    first, second, third = strata_of(), strata_of(), strata_of()
    first.seed(rows, seed=1)
    second.seed(rows, seed=1)
    third.seed(rows, seed=2)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert not np.array_equal(first.centroids, third.centroids)


@settings(max_examples=30)
@given(distinct=st.integers(0, 3), n=st.integers(1, 9), seed=seeds)
def test_fewer_distinct_rows_than_clusters_are_no_trouble(distinct: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # No distinct row at all: every row is zero.
    palette = np.concatenate([np.zeros((1, 6)), rng.normal(size=(distinct, 6))])
    rows = palette[rng.integers(0, len(palette), n)].astype(np.float32)
    strata = strata_of()
    strata.seed(rows, seed=0)
    assert np.isfinite(strata.centroids).all()
    clusters = strata.clusters(rows)
    for left in range(n):
        for right in range(n):
            if np.array_equal(rows[left], rows[right]):
                assert clusters[left] == clusters[right]


def test_a_candidates_stratum_does_not_depend_on_its_neighbours() -> None:
    rows, _ = blobs(1, 4, 50)
    source = np.arange(len(rows)) % 3
    strata = strata_of(num_sources=3)
    strata.seed(rows, seed=0)
    whole = strata.assign(rows, source)
    for part in (slice(0, 1), slice(7, 20), slice(None, None, 9)):
        np.testing.assert_array_equal(strata.assign(rows[part], source[part]), whole[part])
    np.testing.assert_array_equal(whole // len(strata.centroids), source)
    np.testing.assert_array_equal(whole % len(strata.centroids), strata.clusters(rows))


def test_centroids_follow_their_candidates_and_empty_ones_stay() -> None:
    rows, _ = blobs(0, 4, 40)
    strata = strata_of()
    strata.seed(rows, seed=0)
    before = strata.centroids.copy()
    target = np.roll(before[0], 1)
    shifted = np.tile(target, (500, 1)).astype(np.float32)
    for _ in range(20):
        sums, counts = cluster_sums(shifted, np.zeros(500, np.int64), 4)
        strata.move(sums, counts, decay=0.5)
    unit = target / np.linalg.norm(target)
    assert strata.centroids[0] @ unit > 0.999
    np.testing.assert_array_equal(strata.centroids[1:], before[1:])


def test_a_centroid_that_never_had_a_candidate_stays_where_it_was() -> None:
    # One distinct row: three of the four centroids are copies that nothing is assigned to.
    rows = np.tile(blobs(0, 1, 1)[0], (30, 1))
    strata = strata_of()
    strata.seed(rows, seed=0)
    before = strata.centroids.copy()
    strata.move(*cluster_sums(rows, strata.clusters(rows), 4), decay=0.9)
    np.testing.assert_allclose(strata.centroids, before, atol=1e-6)


def test_lengths_of_embeddings_do_not_count() -> None:
    rows, _ = blobs(2, 5, 30)
    # Powers of two, which change no digit of the unit rows.
    scale = 2.0 ** np.random.default_rng(0).integers(-3, 4, (len(rows), 1))
    plain, scaled = strata_of(), strata_of()
    plain.seed(rows, seed=0)
    scaled.seed((rows * scale).astype(np.float32), seed=0)
    np.testing.assert_array_equal(plain.centroids, scaled.centroids)


def test_sums_of_lanes_add_up() -> None:
    rows, label = blobs(3, 4, 25)
    whole = cluster_sums(rows, label, 5)
    half = len(rows) // 2
    parts = [cluster_sums(rows[part], label[part], 5) for part in (slice(half), slice(half, None))]
    for index in range(2):
        np.testing.assert_allclose(parts[0][index] + parts[1][index], whole[index], atol=1e-12)
    assert whole[1].tolist() == [25.0, 25.0, 25.0, 25.0, 0.0]


def test_strata_survive_a_checkpoint() -> None:
    rows, _ = blobs(0, 4, 40)
    strata, again = strata_of(), strata_of()
    strata.seed(rows, seed=0)
    again.load_state_dict(Saved(as_json(strata.state_dict())))
    for one in (strata, again):
        one.move(*cluster_sums(rows, one.clusters(rows), 4), decay=0.9)
    np.testing.assert_array_equal(strata.centroids, again.centroids)
