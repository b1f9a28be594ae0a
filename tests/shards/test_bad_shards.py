"""What becomes of shards that are damaged, cannot be fetched, or meet a bug."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import Stream, StreamingDataset

from slap_stream.errors import DamagedShardError, ShardError
from slap_stream.shards import cache as shard_cache
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.shards.library import LOCAL, REMOTE, shard_states
from slap_stream.shards.view import ShardView
from tests.helpers.shard_corpora import (
    FlakyStream,
    flip_byte,
    same,
    sample,
    shard_files,
    write_corpus,
)

SIZES = [7, 3, 5, 1, 9]
EVERY = np.arange(len(SIZES))
FIRST_ID = np.cumsum(SIZES) - SIZES
OUTAGES = [
    ConnectionError("the network went away"),
    PermissionError("the token has expired"),
    OSError(errno.ENOSPC, "no space left on device"),
    FileNotFoundError("no such key"),
    RuntimeError("503, slow down"),
    TimeoutError("no answer"),
]
BUGS = [TypeError("a bug"), AttributeError("a bug"), KeyError("a bug"), ImportError("no boto3")]


def _name(error: Any) -> str:
    return type(error).__name__


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.001)


@pytest.fixture(name="remote")
def _remote(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "remote", SIZES)


def _dataset(remote: Path, stream: type[Stream] = Stream, **options: Any) -> StreamingDataset:
    local = str(remote.parent / "local")
    streams = [stream(remote=str(remote), local=local, download_retry=1, **options)]
    return StreamingDataset(streams=streams, batch_size=4)


def _flaky(remote: Path, failures: int, error: Exception) -> tuple[FlakyStream, StreamingDataset]:
    stream = FlakyStream(
        failures=failures, error=error, remote=str(remote), local=str(remote.parent / "local")
    )
    return stream, StreamingDataset(streams=[stream], batch_size=4)


def _lenient(dataset: StreamingDataset, **options: Any) -> Any:
    options = {"max_withdrawn": 1.0} | options
    return closing(ShardFetcher(dataset, on_bad_shard="skip", **options))


def _reads(dataset: StreamingDataset, shard_ids: Any) -> bool:
    ids = [i for s in shard_ids for i in range(FIRST_ID[s], FIRST_ID[s] + SIZES[s])]
    found = ShardView(dataset).__getitems__(ids)
    return all(same(value, sample(i)) for i, value in zip(ids, found, strict=True))


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
@pytest.mark.parametrize("error", OUTAGES, ids=_name)
def test_an_outage_that_ends_costs_retries_only(
    remote: Path, error: Exception, on_bad_shard: Any
) -> None:
    stream, dataset = _flaky(remote, 2, error)
    with closing(ShardFetcher(dataset, on_bad_shard=on_bad_shard, num_threads=1)) as fetcher:
        assert fetcher.require(EVERY).tolist() == []
        metrics = fetcher.metrics()
    assert stream.left == [0]
    assert (metrics["shard_retries"], metrics["shards_withdrawn"]) == (2, 0)
    assert _reads(dataset, EVERY)


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
@pytest.mark.parametrize("error", OUTAGES, ids=_name)
def test_an_outage_that_lasts_raises_and_withdraws_nothing(
    remote: Path, error: Exception, on_bad_shard: Any
) -> None:
    stream, dataset = _flaky(remote, 10**6, error)
    with closing(ShardFetcher(dataset, on_bad_shard=on_bad_shard, max_withdrawn=1.0)) as fetcher:
        with pytest.raises(ShardError, match="check remote, credentials and disk") as raised:
            fetcher.require(EVERY[:1])
        assert raised.type is ShardError
        assert raised.value.__cause__ is error
        assert fetcher.metrics()["shards_withdrawn"] == 0
        assert fetcher.metrics()["shard_retries"] == shard_cache.ATTEMPTS - 1
        assert shard_states(dataset).tolist() == [REMOTE] * 5, "nobody is left waiting"
        stream.left[0] = 0
        dataset.prepare_shard(1)
        assert fetcher.require(EVERY).tolist() == []


def test_retries_end_at_the_deadline(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 100.0)
    _, dataset = _flaky(remote, 10**6, ConnectionError("the network went away"))
    started = time.monotonic()
    with pytest.raises(ShardError, match="attempt 2 said: ConnectionError: the network went away"):
        shard_cache.ShardCache(dataset, deadline_seconds=0.1).ensure(0)
    assert time.monotonic() - started < 50


@pytest.mark.parametrize("error", BUGS, ids=_name)
def test_a_bug_is_raised_at_once_with_its_traceback(remote: Path, error: Exception) -> None:
    stream, dataset = _flaky(remote, 10**6, error)
    with _lenient(dataset) as fetcher:
        with pytest.raises(type(error)) as raised:
            fetcher.require(EVERY[:1])
        assert raised.value is error
        assert "_download_file" in [f.name for f in traceback.extract_tb(raised.tb)]
        assert stream.left == [10**6 - 1]
        assert shard_states(dataset)[0] == REMOTE
        stream.left[0] = 0
        assert fetcher.require(EVERY).tolist() == []


def test_a_hinted_shard_that_could_not_be_fetched_is_tried_again_when_required(
    remote: Path,
) -> None:
    stream, dataset = _flaky(remote, shard_cache.ATTEMPTS, ConnectionError("gone for a while"))
    with closing(ShardFetcher(dataset)) as fetcher:
        fetcher.hint(EVERY[:1])
        [job] = fetcher._jobs.values()
        assert isinstance(job.future.exception(timeout=60), ShardError)
        assert stream.left == [0]
        assert fetcher.require(EVERY[:1]).tolist() == []


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("validate_hash", [None, "xxh64"])
def test_a_flipped_byte_raises_or_is_withdrawn_and_the_rest_is_read(
    tmp_path: Path,
    compression: str | None,
    validate_hash: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remote = write_corpus(tmp_path / "remote", SIZES, compression=compression)
    flip_byte(sorted(shard_files(remote))[2], 30)
    dataset = _dataset(remote, validate_hash=validate_hash)
    with (
        closing(ShardFetcher(dataset)) as strict,
        pytest.raises(DamagedShardError, match=r"shard 2 must be what its index.*attempt 3 said"),
    ):
        strict.require(EVERY)
    assert shard_states(dataset)[2] == REMOTE
    assert not (tmp_path / "local" / "shard.00002.mds").exists()
    with (
        _lenient(dataset) as fetcher,
        caplog.at_level(logging.WARNING, logger="slap_stream"),
    ):
        assert fetcher.require(EVERY).tolist() == [2]
        fetcher.hint(EVERY)
        assert fetcher.require(EVERY[:2]).tolist() == []
        assert fetcher.require(EVERY[1:3]).tolist() == [2]
        metrics = fetcher.metrics()
    assert caplog.text.count("shard 2 is damaged, its 5 candidates are withdrawn: shard.0000") == 1
    assert (metrics["shards_withdrawn"], metrics["withdrawn_fraction"]) == (1, 5 / sum(SIZES))
    assert _reads(dataset, [0, 1, 3, 4])


def test_a_download_that_was_cut_short_is_fetched_again(remote: Path) -> None:
    class CutOnce(Stream):
        cut: ClassVar[list[str]] = []

        def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
            path = super()._download_file(from_basename, to_basename)
            if from_basename not in ("index.json", *self.cut):
                self.cut.append(from_basename)
                Path(path).write_bytes(Path(path).read_bytes()[:-3])
            return path

    dataset = _dataset(remote, CutOnce)
    with _lenient(dataset) as fetcher:
        assert fetcher.require(EVERY).tolist() == []
        assert fetcher.metrics()["shard_retries"] == len(CutOnce.cut) == 5
    assert _reads(dataset, EVERY)


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_a_shard_that_its_remote_lacks_is_never_withdrawn(remote: Path, on_bad_shard: Any) -> None:
    dataset = _dataset(remote)
    (remote / "shard.00003.mds").unlink()
    fetcher = ShardFetcher(dataset, on_bad_shard=on_bad_shard, max_withdrawn=1.0)
    with closing(fetcher), pytest.raises(ShardError, match="FileNotFoundError") as raised:
        fetcher.require(EVERY)
    assert raised.type is ShardError


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_a_shard_that_a_local_corpus_lacks_is_never_withdrawn(
    remote: Path, on_bad_shard: Any
) -> None:
    dataset = StreamingDataset(local=str(remote), batch_size=4)
    (remote / "shard.00003.mds").unlink()
    fetcher = ShardFetcher(dataset, on_bad_shard=on_bad_shard, max_withdrawn=1.0)
    with closing(fetcher), pytest.raises(ShardError, match="no remote to fetch it from") as raised:
        fetcher.require(EVERY)
    assert raised.type is ShardError
    assert fetcher.metrics()["shard_retries"] == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _recount(path: Path) -> None:
    flip_byte(path, 0)


def _shift_end(path: Path) -> None:
    flip_byte(path, 4 + 4 * SIZES[1])


def _shift_second(path: Path) -> None:
    flip_byte(path, 11)


@pytest.mark.parametrize(
    ("harm", "hashes", "message"),
    [
        (_cut, (), "bytes, its index says"),
        (_recount, (), "holds 252 samples, its index says 3"),
        (_shift_end, (), "should end after|where its 3 samples begin"),
        (_shift_second, (), "must say where its 3 samples begin and end"),
        (flip_byte, ("md5", "sha1"), "has sha1 .*, its index says"),
    ],
)
def test_a_damaged_local_corpus_is_reported_and_not_touched(
    tmp_path: Path, harm: Callable[[Path], None], hashes: tuple[str, ...], message: str
) -> None:
    path = write_corpus(tmp_path / "corpus", SIZES, hashes=hashes)
    dataset = StreamingDataset(local=str(path), batch_size=4)
    bad = path / "shard.00001.mds"
    harm(bad)
    left = bad.read_bytes()
    with (
        closing(ShardFetcher(dataset)) as strict,
        pytest.raises(DamagedShardError, match=message),
    ):
        strict.require(EVERY)
    with _lenient(dataset) as lenient:
        assert lenient.require(EVERY).tolist() == [1]
    assert bad.read_bytes() == left


@pytest.fixture(name="damaged")
def _damaged(remote: Path) -> StreamingDataset:
    """Shards 1 and 3 are damaged: 4 of 25 samples."""
    for shard_id in (1, 3):
        flip_byte(remote / f"shard.{shard_id:05}.mds")
    return _dataset(remote)


def test_a_run_that_loses_too_many_candidates_stops(damaged: StreamingDataset) -> None:
    with _lenient(damaged, max_withdrawn=3 / 25) as fetcher:
        assert fetcher.require(EVERY[:3]).tolist() == [1]
        for _ in range(2):
            with pytest.raises(ShardError, match=r"got 4 of 25 in 2 damaged .* first \[1, 3\]"):
                fetcher.require(EVERY)
    assert shard_states(damaged).tolist() == [LOCAL, REMOTE, LOCAL, REMOTE, LOCAL]


def test_candidates_are_counted_as_an_epoch_offers_them(damaged: StreamingDataset) -> None:
    counts = np.array([700, 1, 500, 0, 900])
    with _lenient(damaged, counts=counts, max_withdrawn=0.001) as fetcher:
        assert fetcher.require(EVERY).tolist() == [1, 3]
        assert fetcher.metrics()["withdrawn_fraction"] == 1 / 2101


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(5)), limit=st.floats(0, 1))
def test_the_limit_does_not_depend_on_the_order(
    damaged: StreamingDataset, order: list[int], limit: float
) -> None:
    stopped = False
    with _lenient(damaged, max_withdrawn=limit) as fetcher:
        try:
            for shard_id in order:
                fetcher.require(np.array([shard_id]))
        except ShardError:
            stopped = True
    assert stopped == (limit < 4 / 25)


def test_closing_ends_the_waiting_to_try_again(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 100.0)
    stream, dataset = _flaky(remote, 10**6, OUTAGES[0])
    fetcher = ShardFetcher(dataset, num_threads=1)
    fetcher.hint(EVERY[:1])
    deadline = time.monotonic() + 30
    while stream.left[0] == 10**6:
        assert time.monotonic() < deadline, "nothing was fetched"
        time.sleep(0.01)
    threads = fetcher._threads
    fetcher.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(ShardError, match="fetcher must be open, got a closed one"):
        fetcher.require(EVERY[:1])
