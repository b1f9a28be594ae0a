"""Files that somebody made to do harm: used as they are or refused by name, and nothing else.

Nothing outside of the folder is opened, nothing much is allocated, no code of theirs runs. The
properties are short here; SLAP_FUZZ_EXAMPLES=20000 makes them long (docs/reliability.md).
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from streaming import MDSWriter, StreamingDataset

from slap_stream import EmbeddingStore, convert
from slap_stream.core.files import path_inside
from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.core.work_dir import claimed
from slap_stream.corpus import convert as corpus
from slap_stream.corpus.inputs import find_inputs
from slap_stream.embeddings.layout import StoreLayout
from slap_stream.embeddings.store import EmbeddingWriter
from slap_stream.errors import CorpusError, SlapStreamError, StateError
from slap_stream.shards.index import corpus_columns, unhashed_contents
from slap_stream.shards.reader import iter_corpus
from slap_stream.shards.settings import dataset_shards
from slap_stream.shards.writer import open_writer
from slap_stream.types import Rows
from tests.helpers.plain_corpora import shards_of, write_pairs

EXAMPLES = int(os.environ.get("SLAP_FUZZ_EXAMPLES", "25"))
MOST_BYTES = 64 << 20

# What stands in files, and what may stand there instead.
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [
            *(-1, 0, 1, 2, 2**31, 2**32, 2**40, 2**63, 10**30, 1e300, 0.5),
            *("", "..", "/", "a\0b", "../outside/secret", "link", "x" * 300, "pkl", "pkl:1"),
            *("ndarray:int32:99999999999", "ndarray:float64", "int", "zstd", "mds", "csv", "O"),
            *("|O", "object", "<f2", "float16", "bytes", "sharding_indexed", "string"),
        ]
    ),
    st.sampled_from([[], {}, [[]], ["str"], {"a": 1}, [2**62, 2**62], [1, 2], [[[[[]]]]]]),
)
PLACES = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=4)


def changed(value: Any, places: list[int], wrong: Any) -> Any:
    """A copy of a JSON value in which something else stands somewhere."""
    value = copy.deepcopy(value)
    spots: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        for key in keys:
            spots.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    for place in places[:-1] or places:
        inner, key = spots[place % len(spots)]
        inner[key] = copy.deepcopy(wrong)
    return value


_opened: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")
    if _watching and event.startswith(("subprocess", "os.system", "os.exec", "pickle.find_class")):
        _opened.append(f"/outside/{event}")


# There is no way to take it back; it looks at nothing unless a test wants it to.
sys.addaudithook(_watch)


@contextmanager
def harmless(root: Path) -> Iterator[None]:
    """Nothing in `root/outside` is touched, little is allocated, and errors are ours."""
    global _watching
    before = {path: path.read_bytes() for path in (root / "outside").rglob("*") if path.is_file()}
    _opened.clear()
    tracemalloc.start()
    _watching, lines = True, 1
    try:
        yield
    except SlapStreamError as refused:
        lines = str(refused).count("\n") + 1
    finally:
        _watching = False
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_BYTES
    assert lines == 1
    assert [path for path in _opened if "outside" in path] == []
    after = {path: path.read_bytes() for path in (root / "outside").rglob("*") if path.is_file()}
    assert before == after


COLUMNS = {"id": "str", "n": "int", "messages": "json", "ids": "ndarray:int32"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its embeddings, and beside them what they may be made to name."""
    root = tmp_path_factory.mktemp("hostile")
    with open_writer(root / "corpus", COLUMNS, shard_bytes=400) as writer:
        for n in range(12):
            sample = {"id": f"r{n}", "n": n, "messages": [{"role": "text", "content": "a" * n}]}
            writer.write({**sample, "ids": np.arange(n + 1, dtype=np.int32)})
    outside = root / "outside"
    shutil.copytree(root / "corpus", outside)
    first = sorted(outside.glob("*.mds"))[0]
    shutil.copy(first, outside / "secret")
    (root / "corpus" / "link").symlink_to(outside / "secret")
    layout = StoreLayout(
        num_samples=12,
        dim=3,
        index_digest="0" * 64,
        encoder={"name": "hashing"},
        length_unit="tokens",
        feature_names=("a",),
        source_names=("web",),
        rows_per_chunk=5,
    )
    writer_of_rows = EmbeddingWriter(root / "e.zarr", layout)
    with writer_of_rows.open() as blocks:
        for block in blocks:
            start, stop = layout.block(block)
            size = stop - start
            writer_of_rows.write(
                block,
                Rows(
                    embedding=np.ones((size, 3), np.float16),
                    length=np.ones(size, np.int32),
                    feature=np.ones((size, 1), np.float16),
                    source=np.zeros(size, np.int16),
                ),
            )
    # Whatever is loaded when it is first needed.
    assert len(list(iter_corpus(root / "corpus"))) == 12
    return root


def copied(root: Path, name: str) -> Path:
    shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(root / "corpus", root / name, symlinks=True)
    return root / name


@given(places=PLACES, wrong=WRONG)
@settings(max_examples=EXAMPLES)
def test_any_index_is_used_or_refused(root: Path, places: list[int], wrong: Any) -> None:
    index = json.loads((root / "corpus" / "index.json").read_text())
    hostile = copied(root, "index")
    (hostile / "index.json").write_text(json.dumps(changed(index, places, wrong)))
    with harmless(root):
        corpus_columns(hostile)
        unhashed_contents(hostile)
        for _ in iter_corpus(hostile):
            pass


@given(
    at=st.integers(0, 399),
    with_=st.sampled_from([b"\0", b"\xff", b"\xff" * 4, b"\0" * 4, b"\0\0\0\x7f", b"", b"[" * 200]),
    cut=st.none() | st.integers(0, 400),
)
@settings(max_examples=EXAMPLES)
def test_any_shard_is_read_or_refused(root: Path, at: int, with_: bytes, cut: int | None) -> None:
    hostile = copied(root, "shards")
    shard = sorted(hostile.glob("*.mds"))[0]
    data = shard.read_bytes()
    data = (data[:at] + with_ + data[at + len(with_) :])[: len(data) if cut is None else cut]
    shard.write_bytes(data)
    index = json.loads((hostile / "index.json").read_text())
    index["shards"][0]["raw_data"]["bytes"] = len(data)
    (hostile / "index.json").write_text(json.dumps(index))
    with harmless(root):
        for _ in iter_corpus(hostile):
            pass


@given(
    name=st.sampled_from(["zarr.json", "embedding/zarr.json", "length/zarr.json"]),
    places=PLACES,
    wrong=WRONG,
)
@settings(max_examples=EXAMPLES)
def test_any_description_of_embeddings_is_used_or_refused(
    root: Path, name: str, places: list[int], wrong: Any
) -> None:
    hostile = root / "hostile.zarr"
    shutil.rmtree(hostile, ignore_errors=True)
    shutil.copytree(root / "e.zarr", hostile)
    described = json.loads((hostile / name).read_text())
    (hostile / name).write_text(json.dumps(changed(described, places, wrong)))
    with harmless(root):
        store = EmbeddingStore(hostile)
        store.verify("0" * 64, 12)
        store.read(0, 12)


@given(places=PLACES, wrong=WRONG, more=st.binary(max_size=9))
@settings(max_examples=2 * EXAMPLES)
def test_any_bytes_of_a_state_are_a_state_or_refused(
    root: Path, places: list[int], wrong: Any, more: bytes
) -> None:
    whole = to_bytes({"a": {"b": np.arange(4.0)}, "c": [1, "x", np.ones((2, 2), np.int8)]})
    length = int.from_bytes(whole[:8], "little")
    told = changed(json.loads(whole[12 : 12 + length]), places, wrong)
    skeleton = json.dumps(told).encode()
    head, body = len(skeleton).to_bytes(8, "little"), skeleton + whole[12 + length :] + more
    total = zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little")
    with harmless(root):
        assert isinstance(from_bytes(head + total + body), dict)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("echo taken > outside/taken",)


def test_no_state_and_no_shard_is_unpickled(root: Path, tmp_path: Path) -> None:
    attack = pickle.dumps(_Attack())
    for data in (attack, to_bytes({"a": 1})[:12] + attack):
        with harmless(root), pytest.raises(StateError):
            from_bytes(data)
    with MDSWriter(columns={"a": "pkl"}, out=str(tmp_path / "c")) as writer:
        writer.write({"a": _Attack()})
    with pytest.raises(
        CorpusError, match=r"without unpickling, got .* columns encoded as \['pkl'\]"
    ):
        list(iter_corpus(tmp_path / "c"))
    with pytest.raises(ValueError, match="unsafe"):
        StreamingDataset(local=str(tmp_path / "c"), batch_size=1)


@pytest.mark.parametrize(
    "name", ["../outside/secret", "/etc/passwd", "a/../../b", "..\\b", "C:/b", "", ".//a", "a\0", 3]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: Any) -> None:
    message = r"index\.json must name files by relative paths that stay inside .* do not use it"
    with pytest.raises(CorpusError, match=message):
        path_inside("index.json", tmp_path, name)


def test_links_that_lead_elsewhere_are_refused_but_for_those_of_a_hubs_cache(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=r"inside of .*, got 'link', a link to '.*secret'; copy"):
        path_inside("index.json", root / "corpus", "link")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5f2c").touch()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.mds").symlink_to(tmp_path / "blobs" / "5f2c")
    assert path_inside("index.json", snapshot, "a.mds") == snapshot / "a.mds"
    (tmp_path / "way").symlink_to(snapshot)
    assert path_inside("index.json", tmp_path / "way", "a.mds").exists()


def test_embeddings_that_are_links_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "e.zarr", tmp_path / "e.zarr")
    chunk = tmp_path / "e.zarr" / "embedding" / "c" / "1"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    store = EmbeddingStore(tmp_path / "e.zarr")
    store.read(0, 5)
    with pytest.raises(SlapStreamError, match=r"must lie in '.*e\.zarr', got '.*/1/0', a link to"):
        store.read(4, 6)


def test_a_dataset_whose_index_names_files_elsewhere_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "corpus", tmp_path / "c" / "corpus", symlinks=True)
    index = json.loads((root / "corpus" / "index.json").read_text())
    (tmp_path / "c" / "index.json").write_text("{}")
    first = index["shards"][0]["raw_data"]
    shutil.copy(root / "corpus" / first["basename"], tmp_path / "c" / "up.mds")
    first["basename"] = "../up.mds"
    (tmp_path / "c" / "corpus" / "index.json").write_text(json.dumps(index))
    dataset = StreamingDataset(local=str(tmp_path / "c" / "corpus"), batch_size=1)
    with pytest.raises(CorpusError, match=r"index\.json must name files .*, got '\.\./up\.mds'"):
        dataset_shards(dataset)


def test_a_work_directory_with_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for link in ("work", "work/lock", "work/store/a"):
        place = tmp_path / link.replace("/", "-") / link
        place.parent.mkdir(parents=True)
        place.symlink_to(tmp_path / "mine" if "/" in link else tmp_path)
        work_dir = tmp_path / link.replace("/", "-") / "work"
        with (
            pytest.raises(
                CorpusError, match=r"got '.*', where '.*' is a link \(1 in all\); delete"
            ),
            claimed(work_dir, {}, result=work_dir, name="out", overwrite=None),
        ):
            pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that has read all and written the first part."""
    half = tmp_path_factory.mktemp("half")
    write_pairs(half / "a.jsonl", range(60))
    (half / "outside").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_SMALL_PART_BYTES", 2048)
        convert(half / "a.jsonl", half / "whole", num_workers=0)
        patch.setattr(corpus, "merge_indexes", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            convert(half / "a.jsonl", half / "out", num_workers=0)
    shutil.rmtree(half / "out" / "part-00001")
    return half


def _cut_off(*_: Any) -> None:
    raise KeyboardInterrupt


@given(
    name=st.sampled_from(
        [
            *("plan.json", "piece-00000.json", "part-00000.json"),
            "piece-00000.npy",
            "piece-00000.ends",
        ]
    ),
    places=PLACES,
    wrong=WRONG,
    byte=st.integers(0, 255),
)
# In the header of the array; in the counts of a tally.
@example(name="part-00000.json", places=[18], wrong=None, byte=0)
@example(name="piece-00000.npy", places=[836162], wrong=None, byte=0)
@settings(max_examples=EXAMPLES)
def test_any_manifest_of_work_is_gone_on_with_or_refused(
    half_done: Path, name: str, places: list[int], wrong: Any, byte: int
) -> None:
    out = half_done / "again"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(half_done / "out", out)
    file = out / ".convert" / name
    if file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), places, wrong)))
    else:
        data = bytearray(file.read_bytes())
        for place in places:
            data[place % len(data)] = byte
        file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, harmless(half_done):
        patch.setattr(corpus, "_SMALL_PART_BYTES", 2048)
        convert(half_done / "a.jsonl", out, num_workers=0)
        assert shards_of(out).keys() == shards_of(half_done / "whole").keys()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("state.json", {"_data_files": [{"filename": "../../outside/secret"}]}),
        ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}),
        ("state.json", {"_data_files": [{}]}),
        ("state.json", {"_data_files": [3]}),
        ("state.json", {"_data_files": 3}),
        ("state.json", []),
        ("dataset_dict.json", {"splits": ["../outside"]}),
        ("dataset_dict.json", {"splits": "train"}),
    ],
)
def test_a_saved_dataset_that_names_files_elsewhere_is_refused(
    tmp_path: Path, file: str, told: Any
) -> None:
    (tmp_path / file).write_text(json.dumps(told))
    with pytest.raises(CorpusError, match=rf"{file} must (name files|be as save_to_disk)"):
        find_inputs([tmp_path])
