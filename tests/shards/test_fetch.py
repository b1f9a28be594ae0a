"""Shards fetched ahead: verified, shared by the ranks of a node, never waited on for ever."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import JSONWriter, Stream, StreamingDataset
from streaming.base.hashing import get_hash, get_hashes

from slap_stream.errors import DamagedShardError, ShardError
from slap_stream.shards import cache as shard_cache
from slap_stream.shards.cache import hash_of
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.shards.library import LOCAL, PREPARING, REMOTE
from slap_stream.shards.view import ShardView
from tests.helpers.shard_corpora import (
    flip_byte,
    same,
    sample,
    shard_files,
    write_corpus,
)

SIZES = [7, 3, 5, 1, 9]
EVERY = np.arange(len(SIZES))


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.001)


@pytest.fixture(name="remote")
def _remote(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "remote", SIZES)


def _stream(tmp_path: Path, **kwargs: Any) -> Stream:
    return Stream(
        remote=str(tmp_path / "remote"), local=str(tmp_path / "local"), download_retry=1, **kwargs
    )


def _dataset(stream: Stream, **kwargs: Any) -> StreamingDataset:
    return StreamingDataset(streams=[stream], batch_size=4, **kwargs)


def _local_dataset(path: Path) -> StreamingDataset:
    return StreamingDataset(local=str(path), batch_size=4)


def _states(dataset: StreamingDataset) -> list[int]:
    return [int(dataset._shard_states[i]) for i in range(len(SIZES))]


def _reads(dataset: StreamingDataset) -> None:
    assert _holds(ShardView(dataset), range(sum(SIZES)))


def _holds(view: ShardView, ids: Sequence[int]) -> bool:
    return all(same(v, sample(i)) for i, v in zip(ids, view.__getitems__(ids), strict=True))


def test_every_hash_of_streaming_is_known(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    for name in get_hashes():
        assert hash_of(tmp_path / "file", name) == get_hash(name, b"abc" * 1000)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("keep_zip", [False, True])
def test_required_shards_are_on_disk(
    tmp_path: Path, compression: str | None, keep_zip: bool
) -> None:
    write_corpus(tmp_path / "remote", SIZES, compression=compression)
    dataset = _dataset(_stream(tmp_path, keep_zip=keep_zip, validate_hash="xxh64"))
    before = dataset.cache_usage
    fetcher = ShardFetcher(dataset, num_threads=2)
    fetcher.hint(EVERY)
    assert fetcher.require(EVERY[[4, 0]]).tolist() == []
    assert (tmp_path / "local" / "shard.00004.mds").is_file()
    assert fetcher.require(EVERY).tolist() == []
    assert _states(dataset) == [LOCAL] * 5
    kept = 2 if compression and keep_zip else 1
    assert len(list(shard_files(tmp_path / "local"))) == 5 * kept
    metrics = fetcher.metrics()
    assert (metrics["shards_verified"], metrics["shards_fetched"]) == (5, 5)
    assert metrics["shard_bytes_fetched"] == dataset.cache_usage - before
    on_disk = sum(path.stat().st_size for path in shard_files(tmp_path / "local"))
    assert metrics["shard_bytes_fetched"] == on_disk
    assert fetcher.require(EVERY).tolist() == []
    assert fetcher.metrics()["shards_fetched"] == 5
    fetcher.close()
    _reads(dataset)


def test_a_local_corpus_is_verified_only(remote: Path) -> None:
    fetcher = ShardFetcher(_local_dataset(remote))
    assert fetcher.require(EVERY).tolist() == []
    assert fetcher.metrics()["shards_verified"] == 5
    assert fetcher.metrics()["shards_fetched"] == 0
    fetcher.close()


def test_a_cached_shard_that_rotted_is_fetched_again(tmp_path: Path, remote: Path) -> None:
    _reads(_dataset(_stream(tmp_path)))
    cut, flipped = sorted(shard_files(tmp_path / "local"))[1:3]
    cut.write_bytes(cut.read_bytes()[:-3])
    flip_byte(flipped)
    gc.collect()
    dataset = _dataset(_stream(tmp_path))
    usage = dataset.cache_usage
    fetcher = ShardFetcher(dataset)
    assert fetcher.require(EVERY).tolist() == []
    assert fetcher.metrics()["shards_fetched"] == 2
    assert dataset.cache_usage == usage
    for path in (cut, flipped):
        assert path.read_bytes() == (remote / path.name).read_bytes()
    fetcher.close()


def test_a_raw_file_that_rotted_is_unpacked_again(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus", SIZES, compression="zstd")
    dataset = _local_dataset(path)
    _reads(dataset)
    flip_byte(path / "shard.00001.mds")
    fetcher = ShardFetcher(dataset)
    assert fetcher.require(EVERY).tolist() == []
    fetcher.close()
    _reads(dataset)
    assert len(list(shard_files(path))) == 10


def test_split_shards_are_verified_file_by_file(tmp_path: Path) -> None:
    with JSONWriter(columns={"a": "int"}, out=str(tmp_path / "c"), hashes=["sha1"]) as writer:
        writer.write({"a": 1})
    dataset = _local_dataset(tmp_path / "c")
    fetcher = ShardFetcher(dataset)
    assert fetcher.require(np.array([0])).tolist() == []
    fetcher.close()
    flip_byte(tmp_path / "c" / "shard.00000.json.meta")
    other = ShardFetcher(dataset)
    with pytest.raises(DamagedShardError, match=r"shard\.00000\.json\.meta has sha1"):
        other.require(np.array([0]))
    other.close()


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_a_download_that_hangs_ends_at_the_deadline(
    tmp_path: Path, remote: Path, on_bad_shard: Any
) -> None:
    gate = threading.Event()

    class Hanging(Stream):
        def prepare_shard(self, shard: Any) -> int:
            gate.wait()
            return super().prepare_shard(shard)

    dataset = _dataset(Hanging(remote=str(remote), local=str(tmp_path / "local")))
    fetcher = ShardFetcher(dataset, deadline_seconds=0.1, on_bad_shard=on_bad_shard)
    with pytest.raises(ShardError, match=r"shard 3 must arrive within 0\.1 seconds"):
        fetcher.require(EVERY[3:4])
    gate.set()
    # What hung goes on in the background: a later call finds it done.
    deadline = time.monotonic() + 10
    while int(dataset._shard_states[3]) != LOCAL and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetcher.require(EVERY[3:4]).tolist() == []
    fetcher.close()


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_a_shard_that_stock_code_of_a_killed_process_was_fetching_raises(
    tmp_path: Path, remote: Path, on_bad_shard: Any
) -> None:
    dataset = _dataset(_stream(tmp_path))
    dataset._shard_states[3] = PREPARING
    fetcher = ShardFetcher(dataset, deadline_seconds=0.3, on_bad_shard=on_bad_shard)
    fetcher.hint(EVERY)
    time.sleep(0.1)
    with pytest.raises(ShardError, match=r"must arrive within 0\.3 seconds"):
        fetcher.require(EVERY)
    dataset._shard_states[3] = REMOTE
    fetcher.close()


# From Python 3.12 on, forking beside threads warns; DataLoader's workers are made the same way.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("limited", [False, True])
def test_a_shard_that_a_killed_process_was_fetching_is_fetched_by_another(
    tmp_path: Path, remote: Path, limited: bool
) -> None:
    context = multiprocessing.get_context("fork")
    begun, parent = context.Event(), os.getpid()

    class HangingInChildren(Stream):
        def prepare_shard(self, shard: Any) -> int:
            if os.getpid() != parent:
                Path(self.local, shard.raw_data.basename).write_bytes(b"half a shard")
                begun.set()
                time.sleep(60)
            return super().prepare_shard(shard)

    stream = HangingInChildren(remote=str(remote), local=str(tmp_path / "local"))
    dataset = _dataset(stream, cache_limit=10**6 if limited else None)
    usage = dataset.cache_usage
    child = context.Process(target=shard_cache.ShardCache(dataset).ensure, args=(3,))
    child.start()
    assert begun.wait(30)
    with (
        closing(ShardFetcher(dataset, deadline_seconds=0.3)) as patient,
        pytest.raises(ShardError, match="must arrive within"),
    ):
        patient.require(EVERY[3:4])
    child.kill()
    child.join()
    with closing(ShardFetcher(dataset, deadline_seconds=30)) as fetcher:
        assert fetcher.require(EVERY).tolist() == []
        assert fetcher.metrics()["shard_retries"] == 0
    on_disk = sum(path.stat().st_size for path in shard_files(tmp_path / "local"))
    assert dataset.cache_usage == usage + on_disk
    assert not list(
        Path(dataset._cache_filelock_path).parent.glob(
            f"{Path(dataset._cache_filelock_path).name}.*"
        )
    )
    _reads(dataset)


def test_a_fetch_in_another_process_is_waited_for(tmp_path: Path, remote: Path) -> None:
    dataset = _dataset(_stream(tmp_path))
    dataset._shard_states[3] = PREPARING
    fetcher = ShardFetcher(dataset)
    fetcher.hint(EVERY[3:4])
    time.sleep(0.05)
    (tmp_path / "local" / "shard.00003.mds").write_bytes((remote / "shard.00003.mds").read_bytes())
    dataset._shard_states[3] = LOCAL
    assert fetcher.require(EVERY[3:4]).tolist() == []
    assert fetcher.metrics()["shards_fetched"] == 0
    fetcher.close()


def test_a_required_shard_overtakes_the_hinted_ones(tmp_path: Path, remote: Path) -> None:
    order: list[str] = []

    class Noting(Stream):
        def prepare_shard(self, shard: Any) -> int:
            order.append(shard.raw_data.basename)
            time.sleep(0.05)
            return super().prepare_shard(shard)

    dataset = _dataset(Noting(remote=str(remote), local=str(tmp_path / "local")))
    fetcher = ShardFetcher(dataset, num_threads=1)
    fetcher.hint(EVERY)
    fetcher.require(EVERY[4:])
    assert order.index("shard.00004.mds") <= 1
    fetcher.require(EVERY)
    assert len(order) == 5
    fetcher.close()


def test_under_a_cache_limit_evicted_shards_come_back(tmp_path: Path) -> None:
    write_corpus(tmp_path / "remote", [20] * 12)
    size = (tmp_path / "remote" / "shard.00011.mds").stat().st_size
    index = (tmp_path / "remote" / "index.json").stat().st_size
    dataset = _dataset(_stream(tmp_path), cache_limit=index + 6 * size)
    fetcher = ShardFetcher(dataset, num_threads=2)
    view = ShardView(dataset)
    for first in (0, 4, 8, 0):
        shards = np.arange(first, first + 4)
        fetcher.hint(shards)
        assert fetcher.require(shards).tolist() == []
        ids = range(first * 20, (first + 4) * 20)
        assert _holds(view, ids)
        on_disk = sum(p.stat().st_size for p in shard_files(tmp_path / "local"))
        assert index + on_disk == dataset.cache_usage <= dataset.cache_limit
    assert fetcher.metrics()["shards_fetched"] == 16
    fetcher.close()


def _read_as_a_rank(dataset: StreamingDataset, seed: int, done: Any) -> None:
    fetcher, view = ShardFetcher(dataset, num_threads=3), ShardView(dataset)
    for block in np.random.default_rng(seed).permutation(12).reshape(-1, 3):
        fetcher.hint(block)
        fetcher.require(block)
        ids = [int(shard_id) * 10 + row for shard_id in block for row in range(10)]
        assert _holds(view, ids)
    done.put(fetcher.metrics()["shards_fetched"])
    fetcher.close()


# From Python 3.12 on, forking beside threads warns; DataLoader's workers are made the same way.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("limited", [False, True])
def test_ranks_of_a_node_share_downloads(tmp_path: Path, limited: bool) -> None:
    write_corpus(tmp_path / "remote", [10] * 12, compression="zstd")
    room = 14 * max(path.stat().st_size for path in shard_files(tmp_path / "remote")) * 3
    dataset = _dataset(_stream(tmp_path), cache_limit=room if limited else None)
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    ranks = [context.Process(target=_read_as_a_rank, args=(dataset, i, done)) for i in range(3)]
    for rank in ranks:
        rank.start()
    fetched = sum(done.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    if limited:
        assert dataset.cache_usage <= room
    else:
        assert fetched == 12


def test_closing_or_forgetting_a_fetcher_ends_its_threads(remote: Path) -> None:
    def count() -> int:
        return sum(thread.name.startswith("slap-fetch") for thread in threading.enumerate())

    before = count()
    closed = ShardFetcher(_local_dataset(remote))
    forgotten = ShardFetcher(_local_dataset(remote))
    assert count() == before + 8
    closed.close()
    closed.close()
    assert count() == before + 4
    with pytest.raises(ShardError, match="fetcher must be open"):
        closed.require(EVERY)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 10
    while count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count() == before
