"""From and to an object store: the same bytes as here, whole or not at all, whatever befalls."""

from __future__ import annotations

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from streaming import StreamingDataset

from slap_stream import EmbeddingStore, SlapConfig, SlapDataLoader, convert, embed
from slap_stream.cli.convert import main as convert_main
from slap_stream.cli.embed import main as embed_main
from slap_stream.errors import AlignmentError, CorpusError, RemoteError
from slap_stream.remote import bucket
from slap_stream.remote.cache import FileCache
from slap_stream.remote.output import CLAIM_NAME
from tests.helpers.object_store import BUCKET, ObjectStore, fails_first

CORPUS, STORE = f"s3://{BUCKET}/corpus", f"s3://{BUCKET}/corpus/embeddings.zarr"
SMALL = {"shard_bytes": 1 << 14, "num_workers": 1}
FEW = {"rows_per_chunk": 50, "num_workers": 1, "dim": 8}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws = random.Random(0)
    words = ["".join(draws.choices("abcdefgh", k=5)) for _ in range(200)]
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    with path.open("w") as file:
        for _ in range(200):
            prompt, target = (" ".join(draws.choices(words, k=n)) for n in (10, 30))
            record = {"prompt": prompt, "completion": target, "source": draws.choice("ab")}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def local(lines: Path) -> Path:
    """The corpus with its embeddings, made without any store."""
    corpus = lines.parent / "corpus"
    convert(lines, corpus, **SMALL)
    embed(corpus, **FEW)
    return corpus


def of_corpus(data: bytes) -> dict[str, Any]:
    """A corpus.json without what tells how long the work took."""
    told: dict[str, Any] = json.loads(data)
    return {k: v for k, v in told.items() if k not in ("seconds", "resumed")}


def assert_same(store: ObjectStore, local: Path) -> None:
    here = {p.relative_to(local).as_posix(): p for p in local.rglob("*") if p.is_file()}
    assert [key.removeprefix("corpus/") for key in store.names("corpus/")] == sorted(here)
    for name, path in here.items():
        data, wanted = store.get(f"corpus/{name}"), path.read_bytes()
        if name == "corpus.json":
            assert of_corpus(data) == of_corpus(wanted)
        else:
            assert data == wanted, name


def scratch_is_empty(tmp_path: Path) -> bool:
    return not any(path.is_file() for path in (tmp_path / "scratch").rglob("*"))


def test_tools_leave_in_a_store_what_they_leave_here(
    store: ObjectStore, lines: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("in/in.jsonl", lines.read_bytes())
    inputs = f"s3://{BUCKET}/in/*.jsonl"
    scratch = ["--scratch-dir", str(tmp_path / "scratch"), "--json", "--num-workers", "1"]
    assert convert_main([inputs, CORPUS, "--shard-bytes", str(1 << 14), *scratch]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["out"], told["num_samples"]) == (CORPUS, 200)
    # What makes it whole came last.
    changes = [path.split("?")[0] for method, path in store.requests if method == "PUT"]
    assert changes[0] == f"/{BUCKET}/corpus/{CLAIM_NAME}"
    assert changes[-1] == f"/{BUCKET}/corpus/index.json"
    assert f"corpus/{CLAIM_NAME}" not in store.names()
    assert embed_main([CORPUS, "--rows-per-chunk", "50", "--dim", "8", *scratch]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["path"], told["embedded"]) == (STORE, 200)
    changes = [path.split("?")[0] for method, path in store.requests if method == "PUT"]
    assert changes[-1] == f"/{BUCKET}/corpus/embeddings.zarr/zarr.json"
    assert store.get("corpus/index.json") == (local / "index.json").read_bytes()
    assert scratch_is_empty(tmp_path)
    # Made again, nothing is written.
    store.requests.clear()
    assert convert(inputs, CORPUS, **SMALL).num_samples == 200
    assert embed(CORPUS, **FEW, command="").embedded == 0
    assert not [method for method, _ in store.requests if method in ("PUT", "POST")]


def test_inputs_of_every_kind_are_read_from_a_store_as_from_here(
    store: ObjectStore, lines: Path, tmp_path: Path
) -> None:
    data = lines.read_bytes()
    here = tmp_path / "in"
    here.mkdir()
    (here / "a.jsonl.gz").write_bytes(gzip.compress(data[: data.index(b"\n", 20_000) + 1]))
    (here / "b.jsonl.zst").write_bytes(zstandard.compress(data[data.index(b"\n", 20_000) + 1 :]))
    records = [json.loads(line) for line in data.splitlines()[:50]]
    pq.write_table(pa.Table.from_pylist(records), here / "c.parquet", row_group_size=20)
    for path in here.iterdir():
        store.put(f"in/{path.name}", path.read_bytes())
    store.fault = fails_first("short", 3)
    theirs = convert(f"s3://{BUCKET}/in", tmp_path / "theirs", **SMALL)
    ours = convert(here, tmp_path / "ours", **SMALL)
    assert theirs.counts == ours.counts
    # Names of inputs are ids of records, and so in the shards, too.
    index = [tmp_path / which / "index.json" for which in ("theirs", "ours")]
    assert index[0].read_bytes() == index[1].read_bytes()
    store.put("notes/readme.md", b"x")
    with pytest.raises(CorpusError, match=r"must be files that end in one of .*'readme.md'"):
        convert(f"s3://{BUCKET}/notes", tmp_path / "none", **SMALL)


def test_an_upload_that_breaks_off_is_no_corpus_and_goes_on(
    store: ObjectStore,
    lines: Path,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    monkeypatch.setattr(bucket, "_THREADS", 1)

    def breaks(at: int) -> None:
        left = iter(range(at))
        store.fault = lambda method, path: (
            "reset" if method == "PUT" and next(left, None) is None else None
        )

    for at in (2, 3):
        breaks(at)
        with pytest.raises(RemoteError, match="must be within reach"):
            convert(lines, CORPUS, **SMALL)
        assert "corpus/index.json" not in store.names()
    with pytest.raises(CorpusError, match="has none; check the address, or wait"):
        embed(CORPUS, **FEW)
    first = {path for method, path in store.requests if method == "PUT"}
    with pytest.raises(CorpusError, match="with half-uploaded results of another call"):
        convert(lines, CORPUS, **SMALL, seed=1)
    store.requests.clear()
    store.fault = lambda method, path: None
    assert convert(lines, CORPUS, **SMALL).num_samples == 200
    again = [path for method, path in store.requests if method == "PUT"]
    # The claim, and a file that had arrived, are not sent again.
    assert len(first.difference(again)) >= 2
    breaks(3)
    with pytest.raises(RemoteError):
        embed(CORPUS, **FEW)
    with pytest.raises(AlignmentError, match=r"which has no zarr\.json; run slap-embed"):
        EmbeddingStore(STORE)
    store.fault = lambda method, path: None
    assert embed(CORPUS, **FEW).embedded == 0
    assert_same(store, local)
    assert scratch_is_empty(tmp_path)


def test_work_that_is_lost_with_its_machine_is_done_again(
    store: ObjectStore, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    store.fault = lambda method, path: "500" if path.endswith("/index.json") else None
    with pytest.raises(RemoteError):
        convert(lines, CORPUS, **SMALL, scratch_dir=tmp_path / "one")
    store.fault = lambda method, path: None
    convert(lines, CORPUS, **SMALL, scratch_dir=tmp_path / "other")
    assert "corpus/index.json" in store.names()
    assert f"corpus/{CLAIM_NAME}" not in store.names()


def test_nothing_else_is_written_over(uploaded: ObjectStore, lines: Path, local: Path) -> None:
    uploaded.put("other/notes.txt", b"mine")
    for place, options in ((CORPUS, {"seed": 3}), (f"s3://{BUCKET}/other", {})):
        with pytest.raises(CorpusError, match=r"must be new, empty or left by the same call, got"):
            convert(lines, place, **SMALL, **options)
    with pytest.raises(CorpusError, match="with another encoder, rows_per_chunk; pass overwrite"):
        embed(CORPUS, num_workers=1)
    with pytest.raises(CorpusError, match=r"must be new, empty or left by the same call, got"):
        embed(local, out=f"s3://{BUCKET}/other", **FEW, overwrite=True)
    uploaded.put("other/zarr.json", b'{"attributes": {"format": "mine"}}')
    with pytest.raises(CorpusError, match="must not replace anything but embeddings"):
        embed(local, out=f"s3://{BUCKET}/other", **FEW, overwrite=True)
    assert uploaded.get("other/notes.txt") == b"mine"
    assert_same(uploaded, local)


def test_embeddings_are_replaced_when_asked_for(uploaded: ObjectStore) -> None:
    before = len(uploaded.names("corpus/embeddings.zarr/"))
    report = embed(CORPUS, **FEW | {"rows_per_chunk": 150}, overwrite=True)
    assert (report.embedded, report.path) == (200, STORE)
    assert len(uploaded.names("corpus/embeddings.zarr/")) < before
    assert EmbeddingStore(STORE).attributes["rows_per_chunk"] == 150


def test_compressed_shards_without_hashes_are_embedded_alike(
    store: ObjectStore, tmp_path: Path
) -> None:
    from tests.helpers.shard_corpora import write_corpus

    for compression in (None, "zstd"):
        name = str(compression)
        corpus = write_corpus(tmp_path / name, [9, 7], compression=compression, hashes=())
        for path in corpus.iterdir():
            store.put(f"{name}/{path.name}", path.read_bytes())
        embed(f"s3://{BUCKET}/{name}", out=tmp_path / f"{name}.zarr", num_workers=1, dim=8)
        embed(corpus, num_workers=1, dim=8)
        theirs, ours = (
            EmbeddingStore(tmp_path / f"{name}.zarr"),
            EmbeddingStore(corpus / "embeddings.zarr"),
        )
        assert theirs.attributes == ours.attributes
        assert theirs.shard_hashes == ours.shard_hashes


def epoch(dataset: Any, **options: Any) -> tuple[list[list[int]], dict[str, float]]:
    loader = SlapDataLoader(
        dataset,
        config=SlapConfig(keep=0.7, seed=3, on_bad_shard="skip"),
        collate_fn=lambda samples: {"count": len(samples)},
        **options,
    )
    ids = []
    for batch in loader:
        ids.append(batch["sample_id"].tolist())
        loader.observe(batch["sample_id"], batch["sample_id"] % 7 + 1.0)
    return ids, loader.metrics()


@pytest.fixture(scope="module")
def ids(local: Path) -> list[list[int]]:
    return epoch(StreamingDataset(local=str(local), batch_size=8))[0]


def cold(tmp_path: Path) -> Any:
    return StreamingDataset(remote=CORPUS, local=str(tmp_path / "cold"), batch_size=8)


def test_a_cold_cache_gives_the_ids_of_a_local_run(
    uploaded: ObjectStore, ids: list[list[int]], tmp_path: Path
) -> None:
    found, metrics = epoch(cold(tmp_path))
    assert found == ids
    assert metrics["embedding_files_fetched"] == 4 * 4
    assert metrics["withdrawn_fraction"] == metrics["embedding_retries"] == 0
    # Warm, and of a copy that has rotted.
    [folder] = (tmp_path / "cold").glob("slap-embeddings-*[!s]")
    rotten = folder / "embedding" / "c" / "2" / "0"
    rotten.write_bytes(bytes(rotten.stat().st_size))
    (folder / "length" / "c" / "1").write_bytes(b"short")
    uploaded.fault = lambda method, path: "reset" if "?" not in path and path in lost else None
    lost = {f"/{BUCKET}/corpus/embeddings.zarr/embedding/c/2/0"}
    with pytest.raises(RemoteError, match=r"embedding/c/2/0', of which attempt 6 said"):
        epoch(cold(tmp_path), embeddings=STORE)
    lost.clear()
    found, metrics = epoch(cold(tmp_path), embeddings=STORE)
    assert found == ids
    # The other one may have been fetched again before the error.
    assert 1 <= metrics["embedding_files_fetched"] <= 2


@pytest.fixture
def small_cache(uploaded: ObjectStore, tmp_path: Path) -> EmbeddingStore:
    # Room for one file of embeddings and little else.
    return EmbeddingStore(STORE, cache_dir=tmp_path / "cache", cache_bytes=1500)


def test_a_bound_changes_nothing_but_what_is_kept(
    small_cache: EmbeddingStore, local: Path, tmp_path: Path
) -> None:
    whole = EmbeddingStore(local / "embeddings.zarr")
    for start, stop in ((0, 200), (140, 160), (199, 200), (7, 7)):
        found, wanted = small_cache.read(start, stop), whole.read(start, stop)
        for name in ("embedding", "length", "feature", "source"):
            assert (getattr(found, name) == getattr(wanted, name)).all()
    folder = tmp_path / "cache"
    kept = [path for path in folder.rglob("c/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 1500


def test_of_those_that_want_a_file_one_fetches_it(uploaded: ObjectStore, tmp_path: Path) -> None:
    # Each with a cache of its own, as ranks have.
    caches = [FileCache(CORPUS, tmp_path / "files") for _ in range(4)]
    size = len(uploaded.get("corpus/index.json"))
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda cache: cache.file("index.json", size), caches))
    assert len({path.read_bytes() for path in paths}) == 1
    assert sum(cache.fetched for cache in caches) == 1


def test_what_is_other_than_it_was_written_is_refused(
    uploaded: ObjectStore, tmp_path: Path
) -> None:
    key = "corpus/embeddings.zarr/embedding/c/1/0"
    uploaded.put(key, bytes(len(uploaded.get(key))))
    with pytest.raises(RemoteError, match=r"must be as it was written, got .* 3 times; write it"):
        EmbeddingStore(STORE).read(0, 200)
    cache = FileCache(CORPUS, tmp_path / "files")
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(CorpusError, match="files must lie below 's3://bucket/corpus', got the"):
            cache.open(name, 1)
    attributes = json.loads(uploaded.get("corpus/embeddings.zarr/zarr.json"))
    attributes["attributes"]["file_hashes"]["length"].pop()
    uploaded.put("corpus/embeddings.zarr/zarr.json", json.dumps(attributes).encode())
    with pytest.raises(AlignmentError, match="must have a hash for each file, got 3 for 4 files"):
        EmbeddingStore(STORE)


def test_embeddings_elsewhere_pickle(uploaded: ObjectStore, tmp_path: Path) -> None:
    import pickle

    store = EmbeddingStore(STORE, cache_dir=tmp_path / "cache", cache_bytes=9999)
    again = pickle.loads(pickle.dumps(store))
    assert again.path == STORE
    assert (store.read(3, 90).length == again.read(3, 90).length).all()
    assert again.metrics()["embedding_files_fetched"] == 0
