"""Several calls at one place, or of one corpus: none destroys what another does."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from slap_stream import convert, embed
from slap_stream.embeddings import embed as embedding
from slap_stream.errors import CorpusError, RemoteError, SlapStreamError
from slap_stream.remote import bucket
from slap_stream.remote.cache import FileCache, scratch
from slap_stream.remote.output import CLAIM_NAME, Output
from tests.helpers.object_store import BUCKET, ObjectStore

CORPUS, STORE = f"s3://{BUCKET}/corpus", f"s3://{BUCKET}/corpus/embeddings.zarr"
FEW = {"rows_per_chunk": 20, "num_workers": 1, "dim": 8, "progress": False}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    records = [{"prompt": f"What is {i}?", "completion": f"A number {i}."} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def local(lines: Path) -> Path:
    convert(lines, lines.parent / "corpus", num_workers=1)
    return lines.parent / "corpus"


def left_in_scratch(pattern: str) -> list[Path]:
    return sorted(Path(tempfile.gettempdir()).glob(f"slap_stream_*/{pattern}"))


def test_what_is_finished_here_waits_for_a_place_that_another_has_claimed(
    store: ObjectStore, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(Output, "publish", lambda self, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(lines, CORPUS, num_workers=1)
    store.put(f"corpus/{CLAIM_NAME}", b"of another call")
    store.put("corpus/part-00000/theirs.mds", b"theirs")
    with pytest.raises(CorpusError, match="with half-uploaded results of another call"):
        convert(lines, CORPUS, num_workers=1)
    assert store.get("corpus/part-00000/theirs.mds") == b"theirs"
    # Where all was deleted, it is put.
    store.clear()
    report = convert(lines, CORPUS, num_workers=1)
    assert (report.num_samples, report.resumed > 0) == (60, True)
    assert "corpus/index.json" in store.names()


def test_a_place_that_another_call_takes_meanwhile_is_left_to_it(
    store: ObjectStore, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = embedding._fit

    def taken(*args: Any) -> None:
        store.put(f"taken.zarr/{CLAIM_NAME}", b"of another call")
        fit(*args)

    monkeypatch.setattr(embedding, "_fit", taken)
    with pytest.raises(CorpusError, match=r"must be claimed by this call .* with that of another"):
        embed(local, out=f"s3://{BUCKET}/taken.zarr", **FEW)
    assert store.names() == [f"taken.zarr/{CLAIM_NAME}"]


def test_two_embed_one_corpus_at_once(
    uploaded: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, other = embedding._fit, []

    def meanwhile(*args: Any) -> None:
        if not other:
            other.append("begun")
            other.append(embed(CORPUS, out=f"s3://{BUCKET}/b.zarr", **FEW).num_samples)
        fit(*args)

    monkeypatch.setattr(embedding, "_fit", meanwhile)
    assert embed(CORPUS, **FEW).num_samples == other[1] == 60
    assert not left_in_scratch("slap-corpus-*")


def test_what_is_being_replaced_is_not_tidied_up(uploaded: ObjectStore) -> None:
    embed(CORPUS, **FEW)
    work = scratch("work", STORE)
    work.mkdir()
    (work / "half").touch()
    uploaded.put(f"corpus/embeddings.zarr/{CLAIM_NAME}", b"of one that replaces it")
    with FileLock(work / "lock"):
        assert embed(CORPUS, **FEW).embedded == 0
    assert (work / "half").exists()
    assert f"corpus/embeddings.zarr/{CLAIM_NAME}" in uploaded.names()


def test_replacing_goes_on_after_an_upload_that_broke_off(
    uploaded: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(CORPUS, **FEW)
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    uploaded.fault = lambda method, path: (
        "500" if method == "PUT" and "/embedding/c/1" in path else None
    )
    with pytest.raises(RemoteError):
        embed(CORPUS, **FEW | {"dim": 16}, overwrite=True)
    assert "corpus/embeddings.zarr/zarr.json" not in uploaded.names()
    uploaded.fault = lambda method, path: None
    report = embed(CORPUS, **FEW | {"dim": 16}, overwrite=True)
    assert (report.embedded, report.dim) == (0, 16)
    # Asked for again, it is made again.
    assert embed(CORPUS, **FEW | {"dim": 16}, overwrite=True).embedded == 60


def test_a_folder_that_a_console_has_made_is_empty(store: ObjectStore, lines: Path) -> None:
    store.put("made/", b"")
    assert convert(lines, f"s3://{BUCKET}/made", num_workers=1).num_samples == 60
    assert "made/" in store.names()
    store.put("in/", b"")
    store.put("in/a.jsonl", lines.read_bytes())
    assert convert(f"s3://{BUCKET}/in", f"s3://{BUCKET}/out", num_workers=1).num_samples == 60


@pytest.mark.parametrize("described", [b"[]", b"{", b'{"attributes": null}', b"[" * 100_000])
def test_what_describes_no_store_is_refused(described: bytes, uploaded: ObjectStore) -> None:
    uploaded.put("corpus/embeddings.zarr/zarr.json", described)
    for overwrite in (False, True):
        with pytest.raises(CorpusError, match="must not replace anything but embeddings"):
            embed(CORPUS, **FEW, overwrite=overwrite)


@pytest.mark.parametrize("algorithm", ["nope", "VERSION", "shake_128", "xxh64_hexdigest"])
def test_a_hash_that_nobody_knows_is_refused(
    algorithm: str, uploaded: ObjectStore, tmp_path: Path
) -> None:
    size = len(uploaded.get("corpus/index.json"))
    with pytest.raises(SlapStreamError, match="must be of hashlib or xxhash, got"):
        FileCache(CORPUS, tmp_path / "files").open("index.json", size, (algorithm, "0"))


def test_a_link_is_no_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"slap_stream_{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match="must be a folder of this user's, got a link"):
        scratch("work", "any")
