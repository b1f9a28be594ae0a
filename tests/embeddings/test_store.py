"""`embeddings.zarr` reads back as written; its writer survives being killed."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from slap_stream.core.files import file_digest
from slap_stream.corpus.tally import Tally
from slap_stream.embeddings.layout import StoreLayout
from slap_stream.embeddings.rows import StackedStore
from slap_stream.embeddings.store import EmbeddingStore, EmbeddingWriter, open_embeddings
from slap_stream.errors import AlignmentError, CorpusError
from slap_stream.types import MAX_SOURCES, Rows
from tests.helpers.embed_rows import (
    array_store,
    assert_rows_are,
    make_layout,
    make_rows,
    write_store,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_store(tmp_path_factory.mktemp("store") / "embeddings.zarr", make_layout())


def test_a_written_store_reads_back_and_describes_itself(store: EmbeddingStore) -> None:
    assert store.shape == (20, 4)
    assert store.dtype == np.float16
    assert store.feature_names == ("up", "down")
    assert store.source_names == ("a", "b", "c")
    assert store.length_unit == "tokens"
    assert store.index_digest == "d" * 64
    assert store.encoder == {"name": "hashing", "version": "1", "dim": 4}
    assert_rows_are(store.read(3, 17), np.arange(3, 17))
    np.testing.assert_array_equal(store[5:9][:, 0], np.arange(5, 9))


def test_the_group_is_plain_zarr_v3_as_the_format_says(store: EmbeddingStore) -> None:
    group = zarr.open_group(store.path, mode="r", zarr_format=3)
    kinds = {name: (str(array.dtype), array.shape) for name, array in group.arrays()}
    assert kinds == {
        "embedding": ("float16", (20, 4)),
        "length": ("int32", (20,)),
        "feature": ("float16", (20, 2)),
        "source": ("int16", (20,)),
    }
    np.testing.assert_array_equal(group["length"][:], np.arange(1, 21))
    assert group.attrs["command"] == "slap-embed corpus"
    assert sorted(p.name for p in store.path.parent.iterdir()) == ["embeddings.zarr"]


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 19), max_size=30))
def test_read_ids_gives_rows_in_the_order_asked(store: EmbeddingStore, ids: list[int]) -> None:
    for each in (store, array_store()):
        assert_rows_are(each.read_ids(np.array(ids, dtype=np.int64)), np.array(ids, dtype=int))


@pytest.mark.parametrize("bounds", [(-1, 3), (5, 4), (0, 21)])
def test_ranges_outside_the_store_are_refused(
    store: EmbeddingStore, bounds: tuple[int, int]
) -> None:
    for each in (store, array_store(), StackedStore([array_store()])):
        with pytest.raises(IndexError, match=r"range must lie inside \[0, 20\)"):
            each.read(*bounds)


def test_open_embeddings_takes_paths_stores_arrays_and_lists(store: EmbeddingStore) -> None:
    assert open_embeddings(str(store.path)).shape == (20, 4)
    assert open_embeddings(store) is store
    assert open_embeddings([store]) is store
    stacked = open_embeddings([store.path, array_store(5)])
    assert isinstance(stacked, StackedStore)
    assert stacked.shape == (25, 4)


@pytest.mark.parametrize("nothing", [None, [], 3, [1.0, 2.0]])
def test_open_embeddings_refuses_what_is_no_store(nothing: Any) -> None:
    with pytest.raises(TypeError, match="embeddings must be a path, a store, an array"):
        open_embeddings(nothing)


def test_a_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match=r"does not exist; run slap-embed"):
        open_embeddings(tmp_path / "embeddings.zarr")
    (tmp_path / "embeddings.zarr.partial").mkdir()
    with pytest.raises(AlignmentError, match=r"embeddings.zarr.partial is half-written"):
        open_embeddings(tmp_path / "embeddings.zarr")


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    zarr.create_group(tmp_path / "group", zarr_format=3)
    for name in ("empty", "group"):
        with pytest.raises(AlignmentError, match="must be a Zarr group that slap-embed made"):
            EmbeddingStore(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "embedding" / "zarr.json").write_text("{"), r"JSONDecodeError|JSON"),
        (lambda path: shutil.rmtree(path / "feature"), "no array feature"),
        (lambda path: shutil.rmtree(path / "source"), "no array source"),
        (lambda path: edit(path / "length" / "zarr.json", "[20]", "[19]"), "lengths must have sh"),
    ],
)
def test_a_store_whose_description_is_damaged_is_refused_with_its_path(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    path = write_store(tmp_path / "embeddings.zarr", make_layout()).path
    damage(path)
    with pytest.raises(AlignmentError, match=message) as refused:
        EmbeddingStore(path)
    assert str(path) in str(refused.value)
    assert "run slap-embed" in str(refused.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text().replace("\n", "").replace(" ", "")
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", ["embedding", "length", "feature", "source"])
def test_a_file_of_a_store_that_is_gone_is_told(tmp_path: Path, name: str) -> None:
    store = write_store(tmp_path / "embeddings.zarr", make_layout())
    [file] = [path for path in (store.path / name / "c").rglob("*") if path.is_file()][:1]
    file.unlink()
    with pytest.raises(
        AlignmentError, match=f"got No such file .*{name}/c/.*; run slap-embed again"
    ):
        store.read(0, 20)


@pytest.mark.parametrize(
    "options",
    [{"shards": (8, 4)}, {"compressors": ZstdCodec(level=1)}, {"chunks": (4, 2)}],
    ids=["shards", "packed", "columns"],
)
def test_arrays_that_are_no_plain_rows_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_store(tmp_path / "embeddings.zarr", make_layout()).path
    shutil.rmtree(path / "embedding")
    plain: dict[str, Any] = {"chunks": (4, 4), "compressors": None}
    zarr.create_array(path / "embedding", shape=(20, 4), dtype="float16", **(plain | options))
    with pytest.raises(
        AlignmentError, match=r"embedding not in files of plain rows\); run slap-em"
    ):
        EmbeddingStore(path)


def test_a_store_of_another_version_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    path = write_store(tmp_path / "embeddings.zarr", make_layout()).path
    edit(path / "zarr.json", '"format_version":2', '"format_version":1')
    with pytest.raises(AlignmentError, match=r"\(format_version 1, not 2\); run slap-embed"):
        EmbeddingStore(path)
    writer = EmbeddingWriter(path, make_layout())
    with pytest.raises(CorpusError, match="with another format_version; pass overwrite"):
        writer.is_finished()
    with pytest.raises(CorpusError, match="got 3 missing"), writer.open(overwrite=True):
        pass


def test_embeddings_of_another_dataset_are_refused(store: EmbeddingStore) -> None:
    store.verify("d" * 64, 20)
    with pytest.raises(AlignmentError, match="one row per sample, 21, got 20"):
        store.verify("d" * 64, 21)
    with pytest.raises(AlignmentError, match=r"SHA-256 eeeeeeeeeeee\.\.\., got .* dddddddddddd"):
        store.verify("e" * 64, 20)


def test_a_store_pickles_as_its_path(store: EmbeddingStore) -> None:
    payload = pickle.dumps(store)
    assert len(payload) < 1_000
    assert_rows_are(pickle.loads(payload).read(0, 20), np.arange(20))


def test_the_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"{}")
    assert file_digest(tmp_path / "index.json").startswith("44136fa355b3678a")


@settings(max_examples=15, deadline=None)
@given(num_samples=st.integers(1, 40), stops=st.lists(st.integers(0, 5), max_size=3))
def test_a_writer_stopped_anywhere_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, num_samples: int, stops: list[int]
) -> None:
    path = tmp_path_factory.mktemp("writer") / "embeddings.zarr"
    layout = make_layout(num_samples)
    written: list[int] = []
    for budget in [*stops, 10]:
        if path.exists():
            break
        writer = EmbeddingWriter(path, layout)
        with suppress(CorpusError), writer.open() as blocks:
            assert blocks == sorted(set(range(layout.num_blocks)) - set(written))
            for block in blocks[:budget]:
                start, stop = layout.block(block)
                writer.write(block, make_rows(stop - start, first=start))
                written.append(block)
    assert sorted(written) == list(range(layout.num_blocks))
    assert_rows_are(EmbeddingStore(path).read(0, num_samples), np.arange(num_samples))


def test_a_finished_store_is_replaced_only_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    write_store(path, make_layout())
    with (
        pytest.raises(CorpusError, match="embeddings must not exist yet"),
        EmbeddingWriter(path, make_layout()).open(),
    ):
        pass
    writer = EmbeddingWriter(path, make_layout(6))
    with writer.open(overwrite=True) as blocks:
        # Until the new one is whole, the old one is there.
        assert EmbeddingStore(path).shape == (20, 4)
        writer.write(blocks[0], make_rows(6))
    assert EmbeddingStore(path).shape == (6, 4)


def test_a_finished_store_is_recognised_and_one_of_other_settings_refused(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    assert not EmbeddingWriter(path, make_layout()).is_finished()
    write_store(path, make_layout())
    assert EmbeddingWriter(path, make_layout(command="another")).is_finished()
    with pytest.raises(CorpusError, match="with another index_digest; pass overwrite"):
        EmbeddingWriter(path, make_layout(index_digest="e" * 64)).is_finished()


def stop_half_way(path: Path, layout: StoreLayout) -> None:
    writer = EmbeddingWriter(path, layout)
    with suppress(CorpusError), writer.open():
        writer.write(0, make_rows(8))


def test_a_half_written_store_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    stop_half_way(path, make_layout())
    other = EmbeddingWriter(path, make_layout(index_digest="e" * 64, feature_names=("up",)))
    with (
        pytest.raises(
            CorpusError, match="left by one with other index_digest, feature_names; make the"
        ),
        other.open(),
    ):
        pass
    with (
        pytest.raises(CorpusError, match="got 3 missing; run again"),
        other.open(overwrite=True) as blocks,
    ):
        assert blocks == [0, 1, 2]


def test_the_command_may_differ_when_a_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    stop_half_way(path, make_layout())
    with (
        pytest.raises(CorpusError, match="got 2 missing"),
        EmbeddingWriter(path, make_layout(command="other")).open() as blocks,
    ):
        assert blocks == [1, 2]


def test_arrays_that_were_not_all_made_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    stop_half_way(path, make_layout())
    partial = tmp_path / "embeddings.zarr.partial"
    (partial / "store").rename(partial / "store.new")
    shutil.rmtree(partial / "store.new" / "length")
    assert_rows_are(write_store(path, make_layout()).read(0, 20), np.arange(20))
    assert [found.name for found in tmp_path.iterdir()] == ["embeddings.zarr"]


def test_a_kill_at_the_very_end_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embeddings.zarr"

    def killed(work_dir: Path) -> None:
        (work_dir / "plan.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("slap_stream.embeddings.store.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, make_layout())
    writer = EmbeddingWriter(path, make_layout())
    assert writer.is_finished()
    with pytest.raises(CorpusError, match="got 3 missing"), writer.open(overwrite=True):
        pass


def test_two_processes_cannot_write_one_store(tmp_path: Path) -> None:
    first, second = (EmbeddingWriter(tmp_path / "e.zarr", make_layout()) for _ in range(2))
    with (
        pytest.raises(CorpusError, match=r"embeddings must not be in use, got .*e\.zarr', which"),
        first.open(),
        second.open(overwrite=True),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": np.zeros((7, 4))}, r"embedding of block 0 must have shape \(8, 4\)"),
        ({"length": np.zeros(9, np.int32)}, r"length of block 0 must have shape \(8,\)"),
        (
            {"embedding": np.full((8, 4), np.nan)},
            r"embedding must be finite .* for samples \[0, 1, 2, 3, 4\] \(8 in this block\)",
        ),
        ({"feature": np.full((8, 2), 1e6)}, "feature must be finite and below 65504"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    rows = make_rows(8)
    columns = {name: getattr(rows, name) for name in ("embedding", "length", "feature", "source")}
    writer = EmbeddingWriter(tmp_path / "embeddings.zarr", make_layout())
    with pytest.raises(CorpusError, match=message), writer.open():
        writer.write(0, Rows(**(columns | change)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"rows_per_chunk": 0}, "rows_per_chunk must be at least 1"),
        ({"source_names": ("x",) * 32_769}, "source_names must be at most 32768, got 32769"),
    ],
)
def test_a_layout_that_cannot_be_written_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        make_layout(**changes)


def test_as_many_sources_as_a_corpus_may_have_are_embedded(tmp_path: Path) -> None:
    tally = Tally()
    for number in range(MAX_SOURCES):
        tally.keep(f"page {number}")
    with pytest.raises(CorpusError, match="at most 32768 groups of records"):
        tally.keep("one more")
    layout = make_layout(8, source_names=tuple(f"page {n}" for n in range(MAX_SOURCES)))
    last = np.full(8, MAX_SOURCES - 1)
    writer = EmbeddingWriter(tmp_path / "embeddings.zarr", layout)
    with writer.open():
        writer.write(0, dataclasses.replace(make_rows(8), source=last))
    store = EmbeddingStore(tmp_path / "embeddings.zarr")
    np.testing.assert_array_equal(store.read(0, 8).source, last)
    assert len(store.source_names) == MAX_SOURCES


def test_a_killed_writer_leaves_no_store_and_every_block_done(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.zarr"
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from tests.helpers.embed_rows import make_layout, make_rows
        from slap_stream.embeddings.store import EmbeddingWriter

        layout = make_layout(400)
        writer = EmbeddingWriter(Path(sys.argv[1]), layout)
        with writer.open() as blocks:
            for block in blocks:
                start, stop = layout.block(block)
                writer.write(block, make_rows(stop - start, first=start))
                time.sleep(0.02)
        """
    )
    root = Path(__file__).parents[2]
    partial = tmp_path / "embeddings.zarr.partial"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=root)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("block-*.json"))) < 5:
        assert time.monotonic() < deadline, "the writer did not start"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    before = {int(mark.stem.split("-")[1]) for mark in partial.glob("block-*.json")}
    layout = make_layout(400)
    writer = EmbeddingWriter(path, layout)
    with writer.open() as blocks:
        assert blocks == sorted(set(range(layout.num_blocks)) - before)
        for block in blocks:
            start, stop = layout.block(block)
            writer.write(block, make_rows(stop - start, first=start))
    assert_rows_are(EmbeddingStore(path).read(0, 400), np.arange(400))
