"""A disk that is full, or will be, is named with what it takes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slap_stream import convert, embed
from slap_stream.core.room import require_room, told_when_full
from slap_stream.errors import CorpusError


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n} " * 9}) + "\n" for n in range(50)))
    return path


def leave(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_room_is_refused_where_that_is_known_and_else_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave(monkeypatch, 1_000)
    require_room("out", tmp_path / "new" / "new", 1_000, exact=True)
    with pytest.raises(CorpusError, match=r"out must lie where 1,001 bytes are free, got .* 1,000"):
        require_room("out", tmp_path / "new" / "new", 1_001, exact=True)
    assert not caplog.messages
    require_room("out", tmp_path, 1_001, exact=False)
    assert caplog.messages == [f"{tmp_path}: about 1,001 bytes will be needed, and 1,000 are free."]


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), told_when_full("out", tmp_path, 1):
        raise PermissionError(errno.EACCES, "no")


def test_a_conversion_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("slap_stream.shards.writer.write_index", full)
        with pytest.raises(
            CorpusError, match=r"^out must lie where about [\d,]{5,} bytes are free, got"
        ):
            convert(records, out)
    # What is left to write is known by now.
    with monkeypatch.context() as patch:
        leave(patch, 99)
        with pytest.raises(
            CorpusError, match=r"[\d,]{5,} bytes are free, got .*/out' with 99; free"
        ):
            convert(records, out)
    report = convert(records, out)
    assert (report.num_samples, report.resumed) == (50, 1)


def test_embedding_asks_for_its_room_to_the_byte(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(records, tmp_path / "out")
    embed(tmp_path / "out")
    store = tmp_path / "out" / "embeddings.zarr"
    written = sum(file.stat().st_size for file in store.glob("*/c/**/*") if file.is_file())
    store.rename(tmp_path / "old")
    with monkeypatch.context() as patch:
        leave(patch, written - 1)
        with pytest.raises(
            CorpusError, match=rf"embeddings must lie where {written:,} bytes are free"
        ):
            embed(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("slap_stream.embeddings.store.sync_new", full)
        leave(patch, written)
        with pytest.raises(CorpusError, match="which has become full"):
            embed(tmp_path / "out")
    assert embed(tmp_path / "out").embedded == 50


def test_no_chunk_is_marked_before_it_is_on_disk(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mark outlived its chunk when the power failed.
    convert(records, tmp_path / "out")
    synced: set[tuple[int, int]] = set()
    fsync = os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        synced.add((os.fstat(handle).st_dev, os.fstat(handle).st_ino))

    monkeypatch.setattr(os, "fsync", watched)
    marked: list[int] = []

    def mark(path: Path, value: Any) -> None:
        if path.name.startswith("block"):
            found = path.parent.rglob("*")
            chunks = [file for file in found if "c" in file.parts[-3:-1] and file.is_file()]
            for file in chunks:
                assert (file.stat().st_dev, file.stat().st_ino) in synced, file
            marked.append(len(chunks))
        path.write_text(json.dumps(value))

    monkeypatch.setattr("slap_stream.embeddings.store.write_json", mark)
    embed(tmp_path / "out", rows_per_chunk=20)
    # Three columns, as there is one source.
    assert marked == [4, 8, 12]
