"""Candidates as they arrive: each once, with its own row, block by block, from any checkpoint."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.saved import Saved
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import ShardError
from slap_stream.selection import intake as intake_module
from slap_stream.selection.intake import Intake, Offered
from slap_stream.selection.loss_model import design_rows
from slap_stream.selection.order import ShardTable
from slap_stream.selection.state import Lookup
from slap_stream.types import IntArray, Rows
from tests.laws import as_json
from tests.strategies import Array, shard_tables

DIM = 3


class CountingStore(ArrayStore):
    """A store that notes what was read from it."""

    reads: list[Array]

    def read_ids(self, ids: IntArray) -> Rows:
        self.reads.append(ids)
        return super().read_ids(ids)


def store_of(num_samples: int) -> CountingStore:
    """Rows that name their sample."""
    ids = np.arange(num_samples)
    store = CountingStore(
        np.stack([np.ones(num_samples), ids, ids % 7], axis=1).astype(np.float32),
        lengths=(ids + 1).astype(np.int32),
        features=(ids[:, None] * 0.5).astype(np.float32),
        sources=(ids % 3).astype(np.int16),
    )
    store.reads = []
    return store


class Gate:
    """Notes what is asked of it; some shards are bad."""

    def __init__(self, bad: set[int] | None = None, *, raises: bool = False) -> None:
        self.bad, self.raises = bad or set(), raises
        self.calls: list[tuple[str, list[int]]] = []

    def hint(self, shard_ids: IntArray) -> None:
        self.calls.append(("hint", shard_ids.tolist()))

    def require(self, shard_ids: IntArray) -> IntArray:
        self.calls.append(("require", shard_ids.tolist()))
        found = np.array(sorted(self.bad & set(shard_ids.tolist())), np.int64)
        if self.raises and len(found):
            raise ShardError(f"shards {found.tolist()} are bad.")
        return found


def intake_of(
    sizes: list[int],
    counts: list[int] | None = None,
    *,
    store: ArrayStore | None = None,
    gate: Gate | None = None,
    **options: Any,
) -> Intake:
    """The intake of one lane."""
    table = ShardTable.of(np.array(sizes), None if counts is None else np.array(counts))
    defaults = {"seed": 0, "lane": 0, "num_lanes": 1, "shards_per_block": 2, "min_block": 1}
    return Intake(table, store or store_of(max(1, sum(sizes))), gate, {**defaults, **options})


def drain(intake: Intake, most: int = 7) -> list[Offered]:
    """Take all that is left."""
    taken = []
    while intake.remaining:
        taken.append(intake.take(most))
    return taken


def pairs_of(taken: list[Offered]) -> list[tuple[int, int]]:
    """All (sample id, occurrence), in the order taken."""
    return [
        pair
        for part in taken
        for pair in zip(part.sample_id.tolist(), part.occurrence.tolist(), strict=True)
    ]


@settings(max_examples=60)
@given(shards=shard_tables(), num_lanes=st.integers(1, 3), most=st.integers(1, 30))
def test_each_candidate_is_taken_once_with_its_own_row(
    shards: tuple[list[int], list[int]], num_lanes: int, most: int
) -> None:
    taken: list[tuple[int, int]] = []
    for lane in range(num_lanes):
        intake = intake_of(*shards, lane=lane, num_lanes=num_lanes)
        parts = drain(intake, most)
        taken += pairs_of(parts)
        for part in parts:
            ids = part.sample_id
            assert 0 < len(ids) <= most
            np.testing.assert_array_equal(part.source, ids % 3)
            np.testing.assert_array_equal(part.x, intake.rows_of(ids))
            np.testing.assert_array_equal(part.x[:, 2], ids * 0.5)
            block = intake.order.block(part.block).sample_id
            assert set(ids.tolist()) <= set(block.tolist())
        assert [part.block for part in parts] == sorted(part.block for part in parts)
    assert len(taken) == len(set(taken)) == sum(shards[1])


def test_a_block_is_read_once_and_only_its_rows_are() -> None:
    store = store_of(60)
    intake = intake_of([10] * 6, store=store)
    drain(intake, most=3)
    assert len(store.reads) == intake.order.num_blocks == 3
    for index, ids in enumerate(store.reads):
        assert ids.tolist() == sorted(intake.order.block(index).sample_id.tolist())


class ThreadSafe(CountingStore):
    """A store that may be read in the background, and fails there if it is told to."""

    thread_safe = True
    fails = False
    threads: list[str]

    def read_ids(self, ids: IntArray) -> Rows:
        self.threads.append(threading.current_thread().name)
        if self.fails and self.threads[-1] == "slap-read-ahead":
            raise OSError("no such luck")
        return super().read_ids(ids)


def thread_safe_store(num_samples: int) -> ThreadSafe:
    """Rows that name their sample."""
    store = store_of(num_samples)
    store.__class__ = ThreadSafe
    assert isinstance(store, ThreadSafe)
    store.threads = []
    return store


def test_the_next_block_is_read_while_this_one_is_composed_from() -> None:
    store = thread_safe_store(60)
    intake = intake_of([10] * 6, store=store)
    first = intake.take(1)
    end = time.monotonic() + 10
    while len(store.reads) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert len(store.reads) == 2, "ahead of need"
    pairs = pairs_of([first, *drain(intake, most=3)])
    assert pairs == pairs_of(drain(intake_of([10] * 6), most=3))
    assert store.threads == ["MainThread", "slap-read-ahead", "slap-read-ahead"]
    assert [set(ids.tolist()) for ids in store.reads] == [
        set(intake.order.block(index).sample_id.tolist()) for index in range(3)
    ]


def test_what_could_not_be_read_ahead_raises_when_it_is_needed_and_is_read_again() -> None:
    store = thread_safe_store(60)
    store.fails = True
    intake = intake_of([10] * 6, store=store)
    taken = [intake.take(20)]
    with pytest.raises(OSError, match="no such luck"):
        intake.take(20)
    store.fails = False
    pairs = pairs_of([*taken, *drain(intake)])
    assert pairs == pairs_of(drain(intake_of([10] * 6)))
    # In the background, again by who needed it, and the last block in the background.
    assert store.threads == ["MainThread", "slap-read-ahead", "MainThread", "slap-read-ahead"]


def test_two_large_blocks_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    store = thread_safe_store(60)
    # Of 20 rows of three embedding dimensions and a feature.
    monkeypatch.setattr(intake_module, "AHEAD_BYTES", 20 * 4 * 4 - 1)
    drain(intake_of([10] * 6, store=store))
    assert store.threads == ["MainThread"] * 3


class Slices:
    """(num_samples, DIM) half floats that are made when they are read."""

    dtype = np.dtype(np.float16)

    def __init__(self, num_samples: int, dim: int) -> None:
        self.shape = (num_samples, dim)

    def __getitem__(self, rows: slice) -> Array:
        return np.ones((rows.stop - rows.start, self.shape[1]), np.float16)


# A block and what a read takes, of at most as much; with the block that is read ahead one more.
@pytest.mark.parametrize(("thread_safe", "blocks"), [(False, 2.1), (True, 3.2)])
def test_at_most_two_blocks_of_half_floats_are_in_memory(
    thread_safe: bool, blocks: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, dim = 500, 512
    monkeypatch.setattr(ArrayStore, "thread_safe", thread_safe)
    intake = intake_of([shard] * 12, store=ArrayStore(Slices(12 * shard, dim)))
    block_bytes = 2 * shard * dim * np.dtype(np.float16).itemsize
    intake.take(1)
    tracemalloc.start()
    try:
        while intake.remaining:
            intake.take(8)
        # Traced from after the first block, which is let go before the second is read.
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert intake.order.num_blocks == 6
    assert 1.0 * block_bytes < peak < blocks * block_bytes


def test_the_next_block_is_hinted_at_before_this_one_is_waited_for() -> None:
    gate = Gate()
    intake = intake_of([10] * 6, gate=gate)
    assert not gate.calls
    drain(intake)
    blocks = [intake.order.shards_of_block(i).tolist() for i in range(3)]
    assert gate.calls == [
        ("hint", blocks[1]),
        ("require", blocks[0]),
        ("hint", blocks[2]),
        ("require", blocks[1]),
        ("require", blocks[2]),
    ]


def test_candidates_of_bad_shards_are_withdrawn_and_counted() -> None:
    intake = intake_of([10, 0, 8, 6, 5], gate=Gate({2, 4}))
    ids = [sample_id for sample_id, _ in pairs_of(drain(intake))]
    # Shards 0 and 3 are left: ids 0 to 9 and 18 to 23.
    assert sorted(ids) == [*range(10), *range(18, 24)]
    assert intake.withdrawn == 13
    assert intake.position == 29
    intake.start_epoch(1)
    assert (intake.withdrawn, intake.position, intake.remaining) == (0, 0, 29)


def test_a_gate_that_raises_is_not_silenced() -> None:
    with pytest.raises(ShardError, match=r"shards \[1\] are bad"):
        drain(intake_of([5, 5], gate=Gate({1}, raises=True)))


LOOKUP = Lookup(num_samples=25, num_strata=1, rows_of=lambda ids: np.zeros((len(ids), 1)))


@pytest.mark.parametrize("bad", [set(), {1, 3}])
def test_an_intake_goes_on_from_any_checkpoint(bad: set[int]) -> None:
    sizes, counts = [9, 4, 7, 5], [9, 10, 3, 5]

    def fresh() -> Intake:
        intake = intake_of(sizes, counts, gate=Gate(bad), shards_per_block=1)
        intake.start_epoch(2)
        return intake

    unbroken = fresh()
    expected = pairs_of(drain(unbroken, most=2))
    for stops in range(sum(counts)):
        first, again = fresh(), fresh()
        head = [first.take(2) for _ in range(stops) if first.remaining]
        again.start_epoch(0)
        state = as_json(first.state_dict())
        again.load_state_dict(Saved(state), LOOKUP)
        assert as_json(again.state_dict()) == state
        assert pairs_of(head + drain(again, most=2)) == expected
        assert again.withdrawn == unbroken.withdrawn


def test_positions_tell_where_blocks_begin_and_end() -> None:
    intake = intake_of([4, 4, 4], shards_per_block=2)
    assert (intake.block_index, intake.next_block, intake.left_in_block) == (-1, 0, 0)
    intake.take(5)
    assert (intake.block_index, intake.next_block, intake.left_in_block) == (0, 0, 3)
    # Never beyond the block, however many are asked for.
    assert len(intake.take(99).sample_id) == 3
    assert (intake.block_index, intake.next_block, intake.left_in_block) == (0, 1, 0)
    assert not intake.in_last_block
    intake.take(1)
    assert (intake.block_index, intake.in_last_block) == (1, True)


def test_the_first_rows_are_those_of_the_first_block() -> None:
    intake = intake_of([10] * 6, [10, 10, 10, 25, 10, 10])
    ids = np.unique(intake.order.block(0).sample_id)
    first = intake.first_rows()[:, -DIM:]
    np.testing.assert_allclose(first[:, 1] / first[:, 0], ids, rtol=1e-5)


def test_one_bad_row_does_not_spoil_the_first_ones() -> None:
    embeddings = np.ones((20, DIM), np.float16)
    embeddings[3], embeddings[4, 0] = np.nan, np.inf
    intake = intake_of([20], store=ArrayStore(embeddings))
    first = intake.first_rows()[:, -DIM:]
    assert np.isfinite(first).all()
    rows = Rows(
        embedding=embeddings,
        length=np.ones(20, np.int32),
        feature=np.zeros((20, 0)),
        source=np.zeros(20, np.int16),
    )
    np.testing.assert_array_equal(first, design_rows(rows)[:, -DIM:])
