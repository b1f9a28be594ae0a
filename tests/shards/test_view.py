"""What a dataset's settings mean for the sampler, and samples read by id."""

from __future__ import annotations

import hashlib
import logging
import pickle
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import JSONWriter, Stream, StreamingDataset
from torch.utils.data import DataLoader

from slap_stream.errors import ConfigError, DamagedShardError
from slap_stream.shards import read
from slap_stream.shards.opening import one_at_a_time
from slap_stream.shards.settings import dataset_shards, index_digests, min_cache_bytes
from slap_stream.shards.view import ShardView
from tests.helpers.shard_corpora import Doubling, Numbering, same, sample, shard_files, write_corpus

SIZES = [7, 3, 5, 1, 9]
NUM_SAMPLES = sum(SIZES)


@pytest.fixture(name="dataset")
def _dataset(tmp_path: Path) -> StreamingDataset:
    write_corpus(tmp_path / "corpus", SIZES)
    return StreamingDataset(local=str(tmp_path / "corpus"), batch_size=4)


def _two_streams(tmp_path: Path, one: dict[str, Any], two: dict[str, Any]) -> list[Stream]:
    write_corpus(tmp_path / "one", [6, 4])
    write_corpus(tmp_path / "two", [5, 5, 10], first=100)
    return [
        Stream(local=str(tmp_path / "one"), **one),
        Stream(local=str(tmp_path / "two"), **two),
    ]


def test_a_plain_dataset_offers_every_sample_once(
    dataset: StreamingDataset, tmp_path: Path
) -> None:
    table = dataset_shards(dataset)
    assert table.sizes.tolist() == table.counts.tolist() == SIZES
    assert table.stream_of_shard.tolist() == [0] * len(SIZES)
    digest = hashlib.sha256((tmp_path / "corpus" / "index.json").read_bytes()).hexdigest()
    assert index_digests(dataset) == [digest]


@pytest.mark.parametrize(
    ("one", "two", "epoch_size"),
    [
        ({"repeat": 2.5}, {"choose": 7}, None),
        ({"proportion": 0.25}, {"proportion": 0.75}, None),
        ({"proportion": 1}, {"proportion": 2}, 1000),
        ({}, {"repeat": 0}, None),
        ({}, {}, 11),
        ({}, {}, None),
    ],
)
def test_streams_weights_are_counted_as_streaming_counts_them(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any], epoch_size: int | None
) -> None:
    dataset = StreamingDataset(
        streams=_two_streams(tmp_path, one, two), batch_size=2, epoch_size=epoch_size
    )
    table = dataset_shards(dataset)
    assert table.stream_of_shard.tolist() == [0, 0, 1, 1, 1]
    _, theirs = dataset.resample_streams(0)
    stream_of_sample = np.repeat(table.stream_of_shard, table.sizes)
    for stream_id in range(2):
        ours = table.counts[table.stream_of_shard == stream_id].sum()
        assert ours == np.sum(stream_of_sample[theirs] == stream_id)
    assert table.counts.sum() == dataset.epoch_size
    assert len(set(index_digests(dataset))) == 2


def test_granular_sampling_takes_whole_granules(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [10] * 12)
    streams = [Stream(local=str(tmp_path / "corpus"), choose=30)]
    dataset = StreamingDataset(streams=streams, batch_size=2, sampling_granularity=10)
    assert sorted(dataset_shards(dataset).counts.tolist()) == [0] * 9 + [10] * 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batching_method": "per_stream"}, "batching_method must be 'random', got 'per_stream'"),
        ({"replication": 1}, None),
        ({"sampling_method": "fixed"}, None),
        ({"sampling_method": "fixed", "epoch_size": 10}, "sampling_method must be 'balanced'"),
        ({"cache_limit": "1gb"}, "streaming would delete its only copy"),
        ({"validate_hash": "sha1"}, r"shards were written with \(xxh64\), got 'sha1' for stream 0"),
        ({"validate_hash": "xxh64"}, None),
        ({"shuffle": True}, None),
    ],
)
def test_settings_are_honoured_or_refused_by_name(
    tmp_path: Path, setting: dict[str, Any], message: str | None
) -> None:
    write_corpus(tmp_path / "corpus", SIZES)
    dataset = StreamingDataset(local=str(tmp_path / "corpus"), batch_size=4, **setting)
    if message is None:
        assert dataset_shards(dataset).counts.tolist() == SIZES
    else:
        with pytest.raises(ConfigError, match=message):
            dataset_shards(dataset)


def test_a_dataset_that_offers_nothing_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", SIZES)
    stream = Stream(local=str(tmp_path / "corpus"), choose=0)
    with np.errstate(invalid="ignore"):
        dataset = StreamingDataset(streams=[stream], batch_size=4)
    with pytest.raises(ConfigError, match="streams must offer at least one sample per epoch"):
        dataset_shards(dataset)


def test_a_stock_state_is_refused(dataset: StreamingDataset) -> None:
    dataset.load_state_dict(dataset.state_dict(0, True))
    with pytest.raises(ConfigError, match="load the loader's own state into the loader"):
        dataset_shards(dataset)


def test_only_streaming_datasets_read_by_id_are_planned(tmp_path: Path) -> None:
    class Packing(StreamingDataset):
        def __iter__(self) -> Any:
            yield from super().__iter__()

    with pytest.raises(TypeError, match=r"must be a streaming\.StreamingDataset, got list"):
        dataset_shards([1])
    write_corpus(tmp_path / "corpus", SIZES)
    with pytest.raises(ConfigError, match="must not override __iter__, got Packing"):
        dataset_shards(Packing(local=str(tmp_path / "corpus"), batch_size=4))


def test_superseded_settings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "corpus", SIZES)
    local = str(tmp_path / "corpus")
    with caplog.at_level(logging.WARNING, logger="slap_stream"):
        dataset_shards(StreamingDataset(local=local, batch_size=4, shuffle=True))
        assert not caplog.records
        dataset_shards(StreamingDataset(local=local, batch_size=4, shuffle_seed=5))
    assert "take the place of the dataset's shuffle_seed=5" in caplog.text


def test_min_cache_bytes_counts_the_largest_shards(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", SIZES, compression="zstd")
    dataset = StreamingDataset(local=str(tmp_path / "corpus"), batch_size=4)
    index = (tmp_path / "corpus" / "index.json").stat().st_size
    largest = max(shard.get_max_size() for shard in dataset.shards)
    assert min_cache_bytes(dataset, 1) == index + largest
    assert min_cache_bytes(dataset, 100) > min_cache_bytes(dataset, 4) > min_cache_bytes(dataset, 1)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ids=st.lists(st.integers(0, NUM_SAMPLES - 1), max_size=40), open_shards=st.integers(1, 9))
def test_any_ids_come_back_in_the_order_asked(
    dataset: StreamingDataset, ids: list[int], open_shards: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "MAX_OPEN", open_shards)
        found = ShardView(dataset).__getitems__(ids)
    assert all(same(v, sample(i)) for i, v in zip(ids, found, strict=True))


def test_a_view_is_a_map_style_dataset(dataset: StreamingDataset) -> None:
    view = ShardView(dataset)
    assert len(view) == NUM_SAMPLES
    assert same(view[3], dataset[3])
    with pytest.raises(IndexError, match=f"{NUM_SAMPLES}"):
        view[NUM_SAMPLES]


@pytest.mark.parametrize("kind", [Doubling, Numbering])
def test_what_a_subclass_does_still_happens(tmp_path: Path, kind: type[StreamingDataset]) -> None:
    write_corpus(tmp_path / "corpus", SIZES)
    dataset = kind(local=str(tmp_path / "corpus"), batch_size=4)
    ids = [20, 3, 4, 3]
    for sample_id, value in zip(ids, ShardView(dataset).__getitems__(ids), strict=True):
        assert same(value, dataset[sample_id])


def test_no_shard_file_is_opened_twice(
    dataset: StreamingDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    stock: Callable[..., Any] = open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name)
        return stock(path, *args, **kwargs)

    view = ShardView(dataset)
    monkeypatch.setattr("builtins.open", counting)
    for _ in range(3):
        view.__getitems__(list(range(NUM_SAMPLES)))
    shards = [name for name in opened if name.startswith("shard.")]
    assert sorted(shards) == [f"shard.{i:05}.mds" for i in range(len(SIZES))]


def test_closed_files_are_the_least_recently_used(
    dataset: StreamingDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_OPEN", 2)
    view = ShardView(dataset)
    view.__getitems__([0, 7, 0, 10])
    assert sorted(view._groups._files._maps) == [1, 2]
    assert list(view[0]) == ["id", "input_ids", "messages"]


def test_other_formats_go_through_their_own_reader(tmp_path: Path) -> None:
    with JSONWriter(columns={"a": "int"}, out=str(tmp_path / "c"), size_limit=60) as writer:
        for number in range(20):
            writer.write({"a": number})
    view = ShardView(StreamingDataset(local=str(tmp_path / "c"), batch_size=4))
    assert [value["a"] for value in view.__getitems__([9, 19, 0])] == [9, 19, 0]


def _identity(batch: list[Any]) -> list[Any]:
    return batch


# The dataset's own reads, not ours, leave the files that they unpack to the garbage collector.
@pytest.mark.filterwarnings(r"ignore:unclosed file.*shard\.:ResourceWarning")
def test_workers_read_what_the_main_process_reads(tmp_path: Path) -> None:
    write_corpus(tmp_path / "remote", SIZES, compression="zstd")
    dataset = Doubling(remote=str(tmp_path / "remote"), local=str(tmp_path / "local"), batch_size=4)
    view = ShardView(dataset)
    # Used before the workers start: locks and files must not travel with it.
    dataset.prepare_shard(0)
    view.__getitems__([0, 8])
    next(iter(dataset))
    order = [[24, 0, 7], [8, 23, 16], [1, 2, 3]]
    loader = DataLoader(
        view,  # type: ignore[arg-type]
        batch_sampler=order,
        num_workers=2,
        collate_fn=_identity,
    )
    for ids, batch in zip(order, loader, strict=True):
        assert all(same(v, dataset[i]) for i, v in zip(ids, batch, strict=True))


def test_a_pickled_view_leaves_the_dataset_usable(dataset: StreamingDataset) -> None:
    list(dataset)
    other = pickle.loads(pickle.dumps(ShardView(dataset)))
    assert same(other[5], sample(5))
    del other
    assert len(list(dataset)) == NUM_SAMPLES
    assert bytes(dataset._locals_shm.buf[:4]) != b"\0\0\0\0"


def test_a_missing_shard_is_fetched_and_a_cut_one_again(tmp_path: Path) -> None:
    remote = write_corpus(tmp_path / "remote", SIZES)
    dataset = StreamingDataset(remote=str(remote), local=str(tmp_path / "local"), batch_size=4)
    view = ShardView(dataset)
    assert same(view[0], sample(0))
    cut = tmp_path / "local" / "shard.00001.mds"
    cut.write_bytes((remote / cut.name).read_bytes()[:-10])
    assert same(view[8], sample(8))
    assert [p.name for p in shard_files(tmp_path / "local")] == ["shard.00000.mds", cut.name]


def test_a_cut_shard_without_a_remote_raises_and_stays(dataset: StreamingDataset) -> None:
    path = Path(dataset.streams[0].local) / "shard.00001.mds"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    view = ShardView(dataset)
    with pytest.raises(DamagedShardError, match=f"has {len(whole) - 10} bytes, its index says"):
        view[8]
    assert path.exists()
    assert same(view[0], sample(0))
    path.write_bytes(whole)
    assert same(view[8], sample(8))


def test_a_shard_cut_while_open_without_a_remote_raises(dataset: StreamingDataset) -> None:
    view = ShardView(dataset)
    path = Path(dataset.streams[0].local) / "shard.00001.mds"
    whole = path.read_bytes()
    for size in (len(whole) - 10, 5):
        view[7]
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedShardError, match=rf"has {size} bytes, its index says"):
            view[9]
        path.write_bytes(whole)
    assert same(view[9], sample(9))


def test_jobs_on_one_machine_make_their_datasets_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order = []

    def another_job() -> None:
        with one_at_a_time():
            order.append("another job")

    thread = threading.Thread(target=another_job)
    with one_at_a_time():
        thread.start()
        thread.join(0.2)
        order.append("this job")
        # The other processes of this job do not wait for its first one.
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "1")
            with one_at_a_time():
                order.append("this job's second process")
    thread.join(10)
    assert order == ["this job", "this job's second process", "another job"]
    # Who has the turn may ask again.
    with one_at_a_time(), one_at_a_time(wait_seconds=0.1):
        assert not caplog.text
    with FileLock(tmp_path / "slap_stream_opening.lock"), one_at_a_time(wait_seconds=0.1):
        assert "going ahead without a turn" in caplog.text
