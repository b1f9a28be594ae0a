"""Inputs elsewhere: the version that was found, the files that are meant, each byte once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from slap_stream.corpus import inputs
from slap_stream.corpus.inputs import cut, find_inputs
from slap_stream.corpus.readers import read
from slap_stream.errors import CorpusError, RemoteError
from slap_stream.remote import reading
from tests.helpers.object_store import BUCKET, ObjectStore


def lines(word: str, count: int) -> bytes:
    return b"".join(
        json.dumps({"text": f"{word} {i:04} {'y' * 90}"}).encode() + b"\n" for i in range(count)
    )


def rows_of(url: str) -> list[Any]:
    [entry] = find_inputs([url])
    return [row for piece in cut(entry) for row in read(piece, entry.columns)]


@pytest.mark.parametrize("url", ["a.jsonl", "*.jsonl", ""])
def test_pieces_are_of_the_version_that_was_cut(
    url: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "PIECE_BYTES", 10_000)
    store.put("in/a.jsonl", lines("old", 200))
    [entry] = find_inputs([f"s3://{BUCKET}/in/{url}"])
    first, second, *_ = cut(entry)
    assert sum(1 for _ in read(first, entry.columns))
    store.put("in/a.jsonl", lines("new", 300))
    with pytest.raises(RemoteError, match=r"got 's3://bucket/in/a\.jsonl', which has changed mean"):
        list(read(second, entry.columns))
    # Of the same size, between finding and cutting.
    [entry] = find_inputs([f"s3://{BUCKET}/in/{url}"])
    store.put("in/a.jsonl", lines("two", 300))
    with pytest.raises(RemoteError, match="which has changed meanwhile; run the same again"):
        cut(entry)


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_is_fetched_once(
    make: Any, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(reading, "BUFFER_BYTES", 1 << 12)
    table = pa.table({"text": [f"{i:03} {'x' * 1000}" for i in range(200)]})
    buffer = io.BytesIO()
    with make(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    store.put("a.arrow", buffer.getvalue())
    fetched = []
    read_range = reading.read_range

    def counted(url: Any, start: int, stop: int, **options: Any) -> bytes:
        fetched.append(stop - start)
        return read_range(url, start, stop, **options)

    monkeypatch.setattr(reading, "read_range", counted)
    [entry] = find_inputs([f"s3://{BUCKET}/a.arrow"])
    [piece] = cut(entry)
    assert not fetched
    seen: list[int] = []
    rows = list(read(piece, entry.columns, seen.append))
    assert rows == table.to_pylist()
    assert sum(fetched) < 1.5 * len(buffer.getvalue())
    assert seen == sorted(seen)
    assert seen[0] < piece.num_bytes / 5 < piece.num_bytes * 0.9 < seen[-1] <= piece.num_bytes


def test_a_folder_is_read_as_one_here(store: ObjectStore, tmp_path: Path) -> None:
    about = {"dataset_infos.json": b'{"a": {"b": 1}}', "._a.jsonl": b"\x00\x05"}
    for name, data in {"a.jsonl": lines("a", 3), **about}.items():
        store.put(f"in/{name}", data)
        (tmp_path / name).write_bytes(data)
    for place in (f"s3://{BUCKET}/in", f"s3://{BUCKET}/in/*.json*", tmp_path):
        assert [entry.stem for entry in find_inputs([place])] == ["a"]
    # What was named itself is meant.
    [entry] = find_inputs([f"s3://{BUCKET}/in/dataset_infos.json"])
    assert entry.stem == "dataset_infos"
    with pytest.raises(CorpusError, match=r"got 's3://bucket/in/\*infos\.json', with \['data"):
        find_inputs([f"s3://{BUCKET}/in/*infos.json"])
