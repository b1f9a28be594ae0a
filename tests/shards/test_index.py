"""Writing shards, merging their indexes, and reading them back in sample-id order."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import (
    CSVWriter,
    JSONWriter,
    MDSWriter,
    StreamingDataset,
    TSVWriter,
    XSVWriter,
)
from streaming.base.sampling import get_sampling

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.cache import ShardCache
from slap_stream.shards.index import (
    apportion_counts,
    corpus_columns,
    corpus_size,
    digest_of,
    merge_indexes,
    read_index,
)
from slap_stream.shards.reader import iter_corpus
from slap_stream.shards.settings import dataset_shards
from slap_stream.shards.writer import open_writer
from tests.helpers.shard_corpora import COLUMNS, same, sample, shard_files, write_corpus

# Streaming leaves the compressed files that it unpacks to the garbage collector.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file.*shard\.:ResourceWarning")


def _part(path: Path, start: int, stop: int, **kwargs: object) -> Path:
    with open_writer(path, COLUMNS, shard_bytes=500, **kwargs) as writer:  # type: ignore[arg-type]
        for number in range(start, stop):
            writer.write(sample(number))
    return path


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_was_written_comes_back_in_order(tmp_path: Path, compression: str | None) -> None:
    _part(tmp_path / "corpus", 0, 60, compression=compression)
    before = sorted(p.name for p in (tmp_path / "corpus").iterdir())
    found = list(iter_corpus(tmp_path / "corpus"))
    assert len(found) == corpus_size(tmp_path / "corpus") == 60
    assert all(same(found[i], sample(i)) for i in range(60))
    assert len(list(shard_files(tmp_path / "corpus"))) > 3
    assert corpus_columns(tmp_path / "corpus") == dict(sorted(COLUMNS.items()))
    assert sorted(p.name for p in (tmp_path / "corpus").iterdir()) == before


def test_any_range_is_the_same_slice(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [3, 1, 4, 2])
    for start in range(11):
        for stop in range(start, 11):
            ids = [s["id"] for s in iter_corpus(tmp_path / "corpus", start, stop)]
            assert ids == [f"r-{i}" for i in range(start, stop)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 11)])
def test_a_range_outside_the_corpus_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    write_corpus(tmp_path / "corpus", [10])
    with pytest.raises(CorpusError, match=r"range must lie inside \[0, 10\)"):
        list(iter_corpus(tmp_path / "corpus", start, stop))


def test_an_exception_leaves_no_index(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_writer(tmp_path / "corpus", COLUMNS, shard_bytes=300) as writer:
            for number in range(30):
                writer.write(sample(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(shard_files(tmp_path / "corpus"))
    with pytest.raises(CorpusError, match=r"which is a shard directory without index\.json"):
        corpus_size(tmp_path / "corpus")


def test_a_sample_larger_than_a_shard_makes_no_empty_shard(tmp_path: Path) -> None:
    with open_writer(tmp_path / "corpus", {"text": "str"}, shard_bytes=200) as writer:
        writer.write({"text": "a" * 1000})
        writer.write({"text": "b"})
    assert len(list(shard_files(tmp_path / "corpus"))) == 2
    assert [len(s["text"]) for s in iter_corpus(tmp_path / "corpus")] == [1000, 1]


def test_the_writer_travels_to_worker_processes() -> None:
    assert pickle.loads(pickle.dumps(open_writer)) is open_writer


@pytest.mark.parametrize(
    ("columns", "shard_bytes", "message"),
    [
        ({"a": "str"}, 0, r"shard_bytes must be in \[1, 4294967295\], got 0"),
        ({"a": "str"}, 1 << 32, "MDS stores offsets in 32 bits"),
        ({}, 100, "columns must name at least one column"),
        ({"a": "string"}, 100, "known MDS encodings, got 'string' for 'a'; one of"),
        ({"a": "pkl"}, 100, "unpickling runs code"),
    ],
)
def test_bad_writer_settings_are_refused(
    tmp_path: Path, columns: dict[str, str], shard_bytes: int, message: str
) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        open_writer(tmp_path / "corpus", columns, shard_bytes=shard_bytes),
    ):
        pass
    assert not (tmp_path / "corpus").exists()


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="out_dir must be empty"), open_writer(tmp_path, COLUMNS):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_sample_without_a_column_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CorpusError, match=r"\['messages'\] cannot be left out"),
        open_writer(tmp_path / "corpus", COLUMNS) as writer,
    ):
        writer.write({"id": "1", "input_ids": np.ones(1, np.int32)})


def test_merged_parts_are_one_corpus_for_streaming_too(tmp_path: Path) -> None:
    parts = [
        _part(tmp_path / "parts" / "b", 0, 25),
        _part(tmp_path / "parts" / "a", 25, 30, compression="zstd"),
        _part(tmp_path / "parts" / "empty", 0, 0),
    ]
    assert merge_indexes(tmp_path, parts) == 30
    index = (tmp_path / "index.json").read_bytes()
    assert merge_indexes(tmp_path, parts) == 30
    assert (tmp_path / "index.json").read_bytes() == index
    assert [s["id"] for s in iter_corpus(tmp_path)] == [f"r-{i}" for i in range(30)]
    dataset = StreamingDataset(local=str(tmp_path), batch_size=2)
    assert [dataset[i]["id"] for i in range(30)] == [f"r-{i}" for i in range(30)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_merge_that_cannot_be_read_back_is_refused(tmp_path: Path) -> None:
    one = _part(tmp_path / "one", 0, 20)
    with pytest.raises(CorpusError, match="part_dirs must lie below"):
        merge_indexes(one, [one])
    with pytest.raises(CorpusError, match="at least one sample, got none in 1 parts"):
        merge_indexes(tmp_path, [_part(tmp_path / "none", 0, 0)])
    other = tmp_path / "other"
    with open_writer(other, {"text": "str"}) as writer:
        writer.write({"text": "a"})
    with pytest.raises(CorpusError, match="shards must have the same columns"):
        merge_indexes(tmp_path, [one, other])
    shard = next(shard_files(one))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorpusError, match=r"shard 'one/shard\.00000\.mds' must be on disk"):
        merge_indexes(tmp_path, [one])
    shard.unlink()
    with pytest.raises(CorpusError, match="write that part again"):
        merge_indexes(tmp_path, [one])
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must be of version 2, got None"),
        ('{"version": 1}', "must be of version 2, got 1"),
        ('{"version": 2}', "must list shards"),
        ('{"version": 2, "shards": [{}]}', "must list shards"),
    ],
)
def test_an_unusable_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CorpusError, match=message):
        list(iter_corpus(tmp_path))


def test_a_missing_directory_or_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="which is no directory"):
        corpus_size(tmp_path / "nowhere")
    write_corpus(tmp_path / "corpus", [3, 3])
    (tmp_path / "corpus" / "shard.00001.mds").unlink()
    assert len(list(iter_corpus(tmp_path / "corpus", 0, 3))) == 3
    with pytest.raises(CorpusError, match=r"got no 'shard\.00001\.mds'; download the corpus first"):
        list(iter_corpus(tmp_path / "corpus"))


def test_pickled_columns_are_not_read(tmp_path: Path) -> None:
    with MDSWriter(columns={"a": "pkl"}, out=str(tmp_path / "corpus")) as writer:
        writer.write({"a": 1})
    with pytest.raises(CorpusError, match="readable without unpickling"):
        list(iter_corpus(tmp_path / "corpus"))


def test_an_entry_that_streaming_cannot_read_is_refused(tmp_path: Path) -> None:
    shards = [{"version": 2, "format": "mds", "samples": 3}]
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    with pytest.raises(CorpusError, match=r"entry in index\.json that is not: 'raw_data'"):
        list(iter_corpus(tmp_path))


@pytest.mark.parametrize("compression", [None, "gz"])
@pytest.mark.parametrize(
    "writer_of", [JSONWriter, CSVWriter, TSVWriter, partial(XSVWriter, separator="|")]
)
def test_other_formats_are_read_too(
    tmp_path: Path, writer_of: Callable[..., Any], compression: str | None
) -> None:
    columns = {"a": "str", "b": "int"}
    with writer_of(columns=columns, out=str(tmp_path / "c"), compression=compression) as writer:
        for number in range(5):
            writer.write({"a": str(number), "b": number})
    assert list(iter_corpus(tmp_path / "c", 1)) == [{"a": str(i), "b": i} for i in range(1, 5)]
    assert corpus_columns(tmp_path / "c") == columns


@pytest.mark.parametrize("hashes", [["a"], {"sha1": 5}, "sha1"])
def test_hashes_that_are_none_are_refused(tmp_path: Path, hashes: Any) -> None:
    _rehashed(tmp_path, hashes)
    with pytest.raises(CorpusError, match=r"shard 0, in its raw_data must have hashes by their "):
        read_index(tmp_path)
    dataset = StreamingDataset(local=str(tmp_path), batch_size=1)
    with pytest.raises(CorpusError, match=r"file 'shard.00000.mds', must have hashes by their "):
        dataset_shards(dataset)


@pytest.mark.parametrize("name", ["of later", "VERSION", "xxhVERSION", "shake_128"])
def test_hashes_that_are_not_known_here_are_not_compared(tmp_path: Path, name: str) -> None:
    _rehashed(tmp_path, {name: "0"})
    (file,) = [shard["raw_data"] for shard in read_index(tmp_path)]
    assert digest_of(file) is None
    assert digest_of({"hashes": {name: "0", "sha1": "1"}}) == ("sha1", "1")
    ShardCache(StreamingDataset(local=str(tmp_path), batch_size=1)).ensure(0)


def _rehashed(corpus: Path, hashes: Any) -> None:
    write_corpus(corpus, [3])
    index = json.loads((corpus / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = hashes
    (corpus / "index.json").write_text(json.dumps(index))


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(0, 400), st.integers(1, 50), st.integers(0, 5))
def test_counts_sum_to_choose_in_whole_picks(
    sizes: list[int], choose: int, granularity: int, seed: int
) -> None:
    size = np.array(sizes, np.int64)
    counts = apportion_counts(size, choose, granularity=granularity, seed=seed)
    assert counts.sum() == choose
    part = counts - size * (choose // size.sum())
    assert np.all(part >= 0)
    assert np.all(part <= size)
    # At most one shard's part is cut short; the others are whole picks.
    assert np.sum((part % granularity != 0) & (part != size)) <= 1
    if granularity == 1:
        assert np.all(np.abs(counts - choose * size / size.sum()) < 1)


@settings(max_examples=50, deadline=None)
@given(SIZES.filter(all), st.integers(0, 5))
def test_whole_repeats_are_what_streaming_counts(sizes: list[int], repeats: int) -> None:
    size = np.array(sizes, np.int64)
    choose = int(size.sum()) * repeats
    assert np.array_equal(
        apportion_counts(size, choose), get_sampling(size, choose, 1, 9176, 0, False)
    )


def test_choosing_from_a_stream_without_samples_is_refused() -> None:
    assert apportion_counts(np.zeros(2, np.int64), 0).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="choose must be 0 for a stream without samples, got 3"):
        apportion_counts(np.zeros(2, np.int64), 3)


def test_reading_a_corpus_with_a_shard_cut_short_says_which(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [4, 4])
    with (corpus / "shard.00001.mds").open("r+b") as file:
        file.truncate(50)
    with pytest.raises(CorpusError, match=r"shard.00001.mds' must have the \d+ bytes .* got 50"):
        list(iter_corpus(corpus))
