"""The candidate order: each candidate once, over lanes that differ by at most one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slap_stream.selection.order import LaneOrder, ShardTable, lane_bounds
from tests.strategies import seeds, shard_tables

Candidate = tuple[int, int]


def lanes_of(
    table: ShardTable,
    num_lanes: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shards_per_block: int = 2,
    min_block: int = 1,
    max_block: int = 1 << 30,
    passes: int = 1,
) -> list[LaneOrder]:
    """Every lane's order."""
    return [
        LaneOrder(
            table,
            seed=seed,
            epoch=epoch,
            lane=lane,
            num_lanes=num_lanes,
            shards_per_block=shards_per_block,
            min_block=min_block,
            max_block=max_block,
            passes=passes,
        )
        for lane in range(num_lanes)
    ]


def candidates_of(order: LaneOrder) -> list[Candidate]:
    """A lane's candidates as (sample id, occurrence), in the order offered."""
    found: list[Candidate] = []
    for index in range(order.num_blocks):
        block = order.block(index)
        found += zip(block.sample_id.tolist(), block.occurrence.tolist(), strict=True)
    return found


def table_of(sizes: Sequence[int], counts: Sequence[int] | None = None) -> ShardTable:
    """A table from plain lists."""
    return ShardTable.of(np.array(sizes), None if counts is None else np.array(counts))


@settings(max_examples=150)
@given(
    shards=shard_tables(),
    num_lanes=st.integers(1, 9),
    seed=seeds,
    epoch=st.integers(0, 3),
    max_block=st.integers(1, 30) | st.just(1 << 30),
)
@example(shards=([1], [9]), num_lanes=4, seed=0, epoch=0, max_block=1 << 30)
@example(shards=([0, 3, 0], [0, 1, 0]), num_lanes=3, seed=0, epoch=0, max_block=1 << 30)
def test_lanes_offer_each_candidate_once(
    shards: tuple[list[int], list[int]], num_lanes: int, seed: int, epoch: int, max_block: int
) -> None:
    table = table_of(*shards)
    orders = lanes_of(table, num_lanes, seed=seed, epoch=epoch, max_block=max_block)
    per_lane = [candidates_of(order) for order in orders]

    lengths = [len(candidates) for candidates in per_lane]
    assert lengths == [order.num_candidates for order in orders]
    assert max(lengths) - min(lengths) <= 1

    offered = [candidate for candidates in per_lane for candidate in candidates]
    assert len(set(offered)) == len(offered) == table.num_candidates
    copies: dict[int, list[int]] = defaultdict(list)
    for sample_id, occurrence in offered:
        copies[sample_id].append(occurrence)
    assert all(sorted(own) == list(range(len(own))) for own in copies.values())
    assert max(map(len, copies.values())) == table.max_occurrences
    for first, size, count in zip(table.first_id, table.sizes, table.counts, strict=True):
        times = [len(copies.get(int(first) + i, [])) for i in range(size)]
        assert sum(times) == count
        # Samples of a shard are repeated equally often, but for one.
        assert not times or max(times) - min(times) <= 1


@settings(max_examples=80)
@given(
    shards=shard_tables(),
    num_lanes=st.integers(1, 5),
    passes=st.integers(2, 4),
    shards_per_block=st.integers(1, 4),
    min_block=st.integers(1, 40),
    max_block=st.integers(1, 30) | st.just(1 << 30),
)
def test_nothing_is_offered_again_before_all_have_been(
    shards: tuple[list[int], list[int]],
    num_lanes: int,
    passes: int,
    shards_per_block: int,
    min_block: int,
    max_block: int,
) -> None:
    options = {
        "shards_per_block": shards_per_block, "min_block": min_block, "max_block": max_block
    }  # fmt: skip
    table = table_of(*shards)
    for single, order in zip(
        lanes_of(table, num_lanes, **options),
        lanes_of(table, num_lanes, **options, passes=passes),
        strict=True,
    ):
        once, offered = candidates_of(single), candidates_of(order)
        assert len(offered) == order.num_candidates == passes * len(once)
        assert len(set(offered)) == len(offered)
        assert order.turns == single.turns
        ids = np.array([sample_id for sample_id, _ in offered]).reshape(passes, -1)
        everyone = sorted(sample_id for sample_id, _ in once)
        assert [sorted(part.tolist()) for part in ids] == [everyone] * passes
        # A small block between others would leave little to choose from.
        small = np.diff(order.block_start)[:-1] < min_block
        assert not small.any() or len(once) < min_block


def test_what_comes_again_comes_about_a_pass_later() -> None:
    [order] = lanes_of(table_of([20] * 30), 1, passes=3, seed=1)
    ids = np.array([sample_id for sample_id, _ in candidates_of(order)])
    at = np.argsort(ids, kind="stable").reshape(600, 3)
    # A block is of two shards, and shuffled anew.
    assert np.abs(np.diff(at, axis=1) - 600).max() < 40
    assert [order.block_start[15 * done] for done in range(4)] == [0, 600, 1200, 1800]
    assert np.any(np.diff(at, axis=1) != 600)


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    weight=st.integers(2, 7),
    extra=st.integers(0, 4),
    num_lanes=st.integers(2, 9),
    seed=seeds,
)
def test_turns_name_every_lane_that_shares_a_sample(
    sizes: list[int], weight: int, extra: int, num_lanes: int, seed: int
) -> None:
    table = table_of(sizes, [weight * size + min(extra, size) for size in sizes])
    orders = lanes_of(table, num_lanes, seed=seed)
    holders: dict[int, set[int]] = defaultdict(set)
    for lane, order in enumerate(orders):
        for sample_id, _ in candidates_of(order):
            holders[sample_id].add(lane)
    for sample_id, lanes in holders.items():
        if len(lanes) > 1:
            # Each holder knows, all agree, and at each step exactly one lane may train on it.
            said = {orders[lane].turns.get(sample_id) for lane in lanes}
            assert said == {(min(lanes), max(lanes) - min(lanes) + 1)}
    for lane, order in enumerate(orders):
        for sample_id in order.turns:
            assert len(holders[sample_id]) > 1
            assert lane in holders[sample_id]


@settings(max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    num_lanes=st.integers(1, 3),
    shards_per_block=st.integers(1, 4),
    min_block=st.integers(1, 20),
    max_block=st.integers(1, 80),
)
def test_a_block_of_many_rows_is_dealt_into_several_of_the_same_shards(
    sizes: list[int], num_lanes: int, shards_per_block: int, min_block: int, max_block: int
) -> None:
    # Its rows are in memory together: eight shards of short records were 2.7 GB.
    table = table_of(sizes)
    options = {"shards_per_block": shards_per_block, "min_block": min_block}
    for whole, order in zip(
        lanes_of(table, num_lanes, **options),
        lanes_of(table, num_lanes, **options, max_block=max_block),
        strict=True,
    ):
        limit = max(max_block, 2 * (min_block + order.visits_per_block))
        announced = np.diff(order.block_start)
        # Of each shard a block may have one row more than its share.
        assert np.all(announced <= limit + order.visits_per_block)
        assert np.all(announced[:-1] >= min_block)
        assert order.visits_per_block == whole.visits_per_block
        made = [order.block(index) for index in range(order.num_blocks)]
        assert [len(block.sample_id) for block in made] == announced.tolist()
        at = 0
        for index in range(whole.num_blocks):
            undivided = whole.block(index)
            count, parts = len(undivided.sample_id), []
            while sum(map(len, parts)) < count:
                assert np.array_equal(order.shards_of_block(at), whole.shards_of_block(index))
                parts.append(made[at].sample_id)
                at += 1
            assert sorted(np.concatenate(parts)) == sorted(undivided.sample_id)
            assert len(parts) >= -(-count // limit)
            if len(parts) == 1 and whole.num_blocks == order.num_blocks:
                assert np.array_equal(parts[0], undivided.sample_id)


def test_a_block_of_several_sees_a_part_of_each_shard() -> None:
    [order] = lanes_of(table_of([40, 40]), 1, max_block=20)
    for index in range(order.num_blocks):
        ids = order.block(index).sample_id
        assert [np.count_nonzero(ids < 40), np.count_nonzero(ids >= 40)] == [10, 10]


@settings(max_examples=80)
@given(
    shards=shard_tables(),
    num_lanes=st.integers(1, 4),
    shards_per_block=st.integers(1, 4),
    min_block=st.integers(1, 40),
)
def test_blocks_are_as_they_are_announced(
    shards: tuple[list[int], list[int]], num_lanes: int, shards_per_block: int, min_block: int
) -> None:
    table = table_of(*shards)
    for order in lanes_of(table, num_lanes, shards_per_block=shards_per_block, min_block=min_block):
        sizes = np.diff(order.block_start)
        assert order.block_start[0] == 0
        assert order.block_start[-1] == order.num_candidates
        # At least this large, but for the last, and no larger than that needs.
        assert np.all(sizes[:-1] >= min_block)
        assert order.visits_per_block <= max(shards_per_block, min_block)
        for index in range(order.num_blocks):
            block = order.block(index)
            assert len(block.sample_id) == len(block.occurrence) == sizes[index] > 0
            shard = np.searchsorted(table.first_id, block.sample_id, side="right") - 1
            # Empty shards share their first id with the next one: the last of these has samples.
            np.testing.assert_array_equal(np.unique(shard), order.shards_of_block(index))


def test_blocks_can_be_made_in_any_order_and_again() -> None:
    table = table_of([9, 4, 12, 7, 7], [9, 12, 5, 7, 7])
    order, again = (lanes_of(table, 2, seed=4, epoch=2)[1] for _ in range(2))
    forward = [order.block(i) for i in range(order.num_blocks)]
    for index in reversed(range(order.num_blocks)):
        block = again.block(index)
        np.testing.assert_array_equal(block.sample_id, forward[index].sample_id)
        np.testing.assert_array_equal(block.occurrence, forward[index].occurrence)


def test_epochs_and_seeds_differ_but_a_lane_keeps_its_shards() -> None:
    table = table_of([20] * 12)
    first, second = (lanes_of(table, 3, epoch=epoch) for epoch in (0, 1))
    for left, right in zip(first, second, strict=True):
        assert candidates_of(left) != candidates_of(right)
        assert set(candidates_of(left)) == set(candidates_of(right))
    assert candidates_of(first[0]) != candidates_of(lanes_of(table, 3, seed=1)[0])


def test_a_thinned_shard_offers_another_subset_each_epoch() -> None:
    table = table_of([100, 100], [30, 100])
    subsets = []
    for epoch in range(3):
        ids = {name for name, _ in candidates_of(lanes_of(table, 1, epoch=epoch)[0])}
        subsets.append({name for name in ids if name < 100})
        assert len(subsets[-1]) == 30
    assert subsets[0] != subsets[1] != subsets[2] != subsets[0]


def test_visits_of_a_repeated_shard_are_spread_over_the_epoch() -> None:
    table = table_of([10] * 200, [40] + [10] * 199)
    for seed in range(5):
        (order,) = lanes_of(table, 1, seed=seed, shards_per_block=1)
        blocks = [i for i in range(order.num_blocks) if 0 in order.shards_of_block(i)]
        quarter = order.num_blocks / 4
        assert len(blocks) == 4
        # One visit in each quarter of the epoch, but for what chance does to the other shards:
        # half a quarter is over three standard deviations of that.
        for visit, block in enumerate(blocks):
            assert (visit - 0.5) * quarter < block < (visit + 1.5) * quarter


def test_lanes_interleave_their_blocks_each_in_its_own_way() -> None:
    orders = lanes_of(table_of([50, 50]), 2)
    first, second = (order.block(0).sample_id % 50 for order in orders)
    assert not np.array_equal(first, second)


def test_a_block_interleaves_its_shards() -> None:
    (order,) = lanes_of(table_of([50] * 4), 1, shards_per_block=4)
    shard = order.block(0).sample_id // 50
    # 200 random neighbours share a shard in a quarter of the cases; sorted ones in all but 3.
    assert np.mean(shard[1:] == shard[:-1]) < 0.5


def test_lanes_are_cut_evenly() -> None:
    for candidates in range(30):
        for num_lanes in range(1, 8):
            sizes = np.diff(lane_bounds(candidates, num_lanes))
            assert sizes.sum() == candidates
            assert sizes.max() - sizes.min() <= 1


def test_a_table_knows_its_totals() -> None:
    table = table_of([3, 0, 5], [7, 0, 2])
    assert (table.num_samples, table.num_candidates, table.max_occurrences) == (8, 9, 3)
    assert table.first_id.tolist() == [0, 3, 3]
    assert table_of([3, 5]).counts.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("sizes", "counts", "words"),
    [
        ([3, 4], [3], r"must have the same \(num_shards,\) shape, got \(2,\) and \(1,\)"),
        ([[3]], None, r"must have the same \(num_shards,\) shape, got \(1, 1\)"),
        ([3, -1], None, "must not be negative"),
        ([3], [-1], "must not be negative"),
        ([3, 0, 0], [3, 1, 2], r"must be 0 for empty shards, got more for 2 of them, first \[1, 2"),
        ([3, 0], [0, 0], "must offer at least one candidate, got none"),
        ([], None, "must offer at least one candidate, got none"),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    sizes: list[int], counts: list[int] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        table_of(sizes, counts)
