"""Input files are found by name, cut into pieces and read row by row, whatever their format."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.corpus import inputs, readers, tables
from slap_stream.corpus.convert import convert
from slap_stream.corpus.inputs import cut, find_inputs
from slap_stream.corpus.messages import DropReason
from slap_stream.corpus.peeking import peek
from slap_stream.corpus.readers import Piece, read
from slap_stream.corpus.records import COLUMNS
from slap_stream.errors import CorpusError
from tests.helpers.forked import run_forked

RECORDS = [
    {
        "id": f"r{n}",
        "messages": [
            {"role": "user", "content": f"question {n} Ω"},
            {"role": "assistant", "content": "answer " * (n % 7 + 1)},
        ],
    }
    for n in range(500)
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIECE_BYTES", 4096)


def rows_of(path: Path) -> list[Any]:
    (entry,) = find_inputs([path])
    return [row for piece in cut(entry) for row in read(piece, COLUMNS)]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("known", [True, False])
def test_values_that_datasets_keeps_as_json_arrive_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, known: bool
) -> None:
    parts = [{"type": "text", "text": "r"}]
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]},
        {"messages": None},
    ]
    mixed = Dataset.from_list(records, on_mixed_types="use_json")
    if kind == "parquet":
        path = tmp_path / "mixed.parquet"
        mixed.to_parquet(path)
    else:
        path = tmp_path / "mixed"
        mixed.save_to_disk(path)
    if not known:
        # As to a pyarrow that has not the extension: a text, and its name beside it.
        monkeypatch.setattr(tables, "_rows", partial(_without_extensions, tables._rows))
    assert rows_of(path) == list(mixed) == records


def _without_extensions(read: Any, batch: Any) -> Any:
    message = pa.struct(
        [
            pa.field("role", pa.string()),
            pa.field("content", pa.string(), metadata={"ARROW:extension:name": "arrow.json"}),
        ]
    )
    schema = pa.schema([pa.field("messages", pa.list_(message))])
    yield from read(pa.RecordBatch.from_pylist(batch.to_pylist(), schema=schema))


def write(path: Path, kind: str) -> Path:
    if kind == "jsonl":
        path = path / "records.jsonl"
        path.write_bytes(LINES)
    elif kind == "gz":
        # Two members, as `cat a.gz b.gz` makes them.
        path = path / "records.jsonl.gz"
        path.write_bytes(gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]))
    elif kind == "zst":
        path = path / "records.jsonl.zst"
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(LINES[:999]) + compress(LINES[999:]))
    elif kind == "parquet":
        path = path / "records.parquet"
        columns = {name: [r[name] for r in RECORDS] for name in ("id", "messages")}
        pq.write_table(pa.table({**columns, "unused": [b"x"] * 500}), path, row_group_size=64)
    else:
        path = path / "records"
        pairs = Dataset.from_list([*RECORDS, *RECORDS]).select(range(500))
        pairs.save_to_disk(path, num_shards=3)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "dataset"])
def test_every_format_gives_the_records_in_order(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert rows_of(path) == RECORDS
    (entry,) = find_inputs([path])
    assert entry.stem == "records"
    assert list(peek(entry, cut(entry))) == RECORDS[:16]
    assert len(cut(entry)) > 1 or kind in ("gz", "zst")


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "dataset"])
def test_progress_ends_at_the_size_of_the_piece(tmp_path: Path, kind: str) -> None:
    (entry,) = find_inputs([write(tmp_path, kind)])
    for piece in cut(entry):
        seen: list[int] = []
        for _ in read(piece, COLUMNS, seen.append):
            pass
        assert seen == sorted(seen)
        assert all(0 <= done <= piece.num_bytes for done in seen)


@given(
    lines=st.lists(
        st.sampled_from(["", "  ", '{"text": "a"}', '{"text": "Ωβ"}', "?"]), max_size=30
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    ends=st.booleans(),
    piece_bytes=st.integers(1, 60),
)
def test_pieces_of_lines_are_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    newline: str,
    ends: bool,
    piece_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes((newline.join(lines) + newline * ends).encode())
    size = path.stat().st_size
    rows: list[Any] = []
    for start in range(0, size, piece_bytes):
        stop = min(start + piece_bytes, size)
        piece = Piece(
            path=str(path), kind="lines", stem="a", start=start, stop=stop, num_bytes=stop - start
        )
        rows += read(piece, COLUMNS)
    expected = path.read_bytes().split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert len(rows) == len(expected)
    for row, line in zip(rows, expected, strict=True):
        if not line.strip():
            assert row is None
        elif line.strip() == b"?":
            assert row is DropReason.UNREADABLE
        else:
            assert row == json.loads(line)


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert rows_of(path) == [{"text": "a"}]


def test_line_beyond_the_limit_is_dropped_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 9000 + b'"}\n{"text": "b"}\n')
    assert rows_of(path) == [{"text": "a"}, DropReason.TOO_LARGE, {"text": "b"}]


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "dataset"])
def test_file_that_is_cut_off_is_an_error(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    file = sorted(path.glob("*.arrow"))[0] if kind == "dataset" else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(CorpusError, match=r"whole and readable, got .*fetch or write the file"):
        rows_of(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(random.Random(0).randbytes(2000))
    with pytest.raises(CorpusError, match="whole and readable"):
        rows_of(tmp_path / name)


def test_directory_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "README.md"):
        (tmp_path / name).write_bytes(b"")
    assert [entry.stem for entry in find_inputs([tmp_path])] == ["a", "b"]


def test_only_data_files_of_a_directory_are_read_whatever_the_case_of_their_names(
    tmp_path: Path,
) -> None:
    for name in ("A.JSONL", "b.Json.GZ", "C.PARQUET"):
        (tmp_path / name).write_bytes(b"")
    # Beside them what macOS, datasets, Spark and we put there.
    for name in ("._A.JSONL", ".DS_Store", "dataset_infos.json", "_SUCCESS", "index.json"):
        (tmp_path / name).write_bytes(b"\0")
    found = find_inputs([tmp_path])
    assert [(entry.stem, entry.kind, entry.packing) for entry in found] == [
        ("A", "lines", ""),
        ("C", "parquet", ""),
        ("b", "lines", "gz"),
    ]


def test_a_directory_of_nothing_but_sub_folders_names_them(tmp_path: Path) -> None:
    for name in ("data", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"name its sub-folders, \['data', 'test'\] \(2 in all\)"):
        find_inputs([tmp_path])


def test_a_file_that_cannot_be_opened_is_an_error() -> None:
    # Root may read everything, and pytest's own folders are closed to others.
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        for name in ("a.jsonl", "b.jsonl"):
            (folder / name).write_bytes(LINES)
        (folder / "locked").mkdir(mode=0o700)
        (folder / "b.jsonl").chmod(0)
        assert run_forked(1, lambda _: _refused_as_a_user(folder)) == 0
    finally:
        shutil.rmtree(folder)


def _refused_as_a_user(folder: Path) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    else:
        (folder / "locked").chmod(0)
    for path in (folder, folder / "b.jsonl", folder / "locked"):
        message = r"got '.*(b\.jsonl|locked)', where .* PermissionError.*; allow it to be read"
        with pytest.raises(CorpusError, match=message):
            [list(peek(entry, cut(entry))) for entry in find_inputs([path])]


@pytest.mark.parametrize("kind", ["array", "CR"])
def test_what_is_no_lines_is_one_piece_and_read_to_its_end(tmp_path: Path, kind: str) -> None:
    texts = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path = tmp_path / "a.json"
    path.write_bytes((f"[{', '.join(texts)}]" if kind == "array" else "\r".join(texts)).encode())
    (entry,) = find_inputs([path])
    (piece,) = cut(entry)
    assert piece.num_bytes > inputs.PIECE_BYTES
    done: list[int] = []
    assert list(read(piece, COLUMNS, done.append)) == RECORDS
    assert 0 < done[-1] <= piece.num_bytes


def test_names_that_are_alike_are_told_apart(tmp_path: Path) -> None:
    names = ["x/train.jsonl", "y/train.jsonl.gz", "y/test.jsonl", "z/a.jsonl", "z/a.jsonl.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    stems = [entry.stem for entry in find_inputs([tmp_path / name for name in names])]
    assert stems == ["x/train", "y/train", "test", "a.jsonl", "a.jsonl.gz"]


def test_dataset_of_one_split_is_that_split(tmp_path: Path) -> None:
    pairs = Dataset.from_list(RECORDS[:3])
    DatasetDict(train=pairs).save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == RECORDS[:3]
    DatasetDict(train=pairs, test=pairs).save_to_disk(tmp_path / "two")
    with pytest.raises(CorpusError, match=r"one split of a dataset each, .*'train', 'test'"):
        find_inputs([tmp_path / "two"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one file, got"),
        (["none.jsonl"], "must exist, got '.*none.jsonl'; check the path"),
        (["a.xlsx"], r"end in one of \.arrow, .*got '.*a.xlsx'; write it as JSON lines first"),
        (
            ["a.tar"],
            r"got '.*a.tar'; load it, datasets.load_dataset\('webdataset', .*fields={'mess",
        ),
        (["a.lance"], r"got '.*a.lance'; load it, datasets.load_dataset\(its folder's path, .*"),
        (["pipe.jsonl"], r"or files that end in one of .*got '.*pipe.jsonl'; write it"),
        (["folder"], "got the directory '.*folder', which is no such dataset"),
        (["a.jsonl", "folder/../a.jsonl"], r"different files, got .* more than once"),
    ],
)
def test_inputs_that_cannot_be_used_are_named(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in ("folder", "a.lance"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("a.xlsx", "a.jsonl", "a.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CorpusError, match=message):
        find_inputs([tmp_path / name for name in names])


def test_unknown_shape_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "hi", "solution": "yo"}\n' * 40)
    (entry,) = find_inputs([path])
    expected = r"fields \['question', 'solution'\] at the start of .*a\.jsonl.*ShareGPT.*Alpaca"
    with pytest.raises(CorpusError, match=expected):
        list(peek(entry, cut(entry)))


def test_a_link_is_a_source_by_its_own_name(tmp_path: Path) -> None:
    # As a hub's cache lays out what it has fetched.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    for name, blob in (("train.jsonl", "5f2c"), ("more.jsonl.gz", "a01b")):
        (tmp_path / "blobs" / blob).write_bytes(b"")
        (tmp_path / "snapshots" / name).symlink_to(tmp_path / "blobs" / blob)
    assert [entry.stem for entry in find_inputs([tmp_path / "snapshots"])] == ["more", "train"]


def test_sub_folders_are_not_passed_over_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    for name in ("test", "old", ".git", "__pycache__"):
        (tmp_path / name).mkdir()
    assert len(find_inputs([tmp_path])) == 1
    assert "its sub-folders ['old', 'test'] are not read (2 in all)" in caplog.text


def test_empty_input_has_no_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    (entry,) = find_inputs([path])
    assert cut(entry) == []
    assert list(peek(entry, [])) == []


def test_an_input_without_a_record_is_named_and_so_is_a_source_field_that_nobody_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "from": "c"}\n' * 3)
    (tmp_path / "b.jsonl").touch()
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    convert(inputs, tmp_path / "typo", source_field="form")
    assert "1 inputs hold no records" in caplog.text
    assert "b.jsonl" in caplog.text
    assert "no record has a field 'form'" in caplog.text
    caplog.clear()
    convert(inputs[:1], tmp_path / "named", source_field="from")
    convert(inputs[:1], tmp_path / "none", source_field=None)
    assert not caplog.records
