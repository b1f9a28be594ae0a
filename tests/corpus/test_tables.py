"""Tables are read by their column names, whatever their types and whoever wrote them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.corpus import tables
from slap_stream.corpus.inputs import cut, find_inputs
from slap_stream.corpus.messages import DropReason
from slap_stream.corpus.readers import read
from slap_stream.corpus.records import COLUMNS, normalise
from slap_stream.corpus.tables import separated_rows
from slap_stream.errors import CorpusError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
UNLIKE_HEADER, NOT_CSV = DropReason.UNLIKE_HEADER, DropReason.NOT_CSV


def rows_of(path: Path) -> list[Any]:
    (entry,) = find_inputs([path])
    return [row for piece in cut(entry) for row in read(piece, COLUMNS)]


def separated(data: bytes | str, kind: Any = "csv") -> list[Any]:
    raw = io.BytesIO(data if isinstance(data, bytes) else data.encode())
    return list(separated_rows(io.BufferedReader(raw), kind, "a.csv"))


CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r") | st.sampled_from('",;\t\n '), max_size=5
)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), max_size=6),
    kind=st.sampled_from([("csv", ","), ("csv", ";"), ("tsv", "\t")]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_written_as_csv_is_read_so(
    rows: list[tuple[str, str]], kind: tuple[Any, str], newline: str, mark: bool
) -> None:
    text = io.StringIO(newline="")
    written = csv.writer(text, delimiter=kind[1], lineterminator=newline, quoting=csv.QUOTE_ALL)
    written.writerows([("prompt", "answer"), *rows])
    found = separated("\ufeff" * mark + text.getvalue(), kind[0])
    assert found == [{"prompt": a or None, "answer": b or None} for a, b in rows]


def test_rows_that_are_no_rows_of_the_table_are_dropped_for_a_reason() -> None:
    text = 'text,id\n"a",1\nb\nc,2,3\n"d"x,4\n\n"e ""f""\n",5\n\xff,6\n"cut'
    rows = separated(text.encode("latin-1"))
    assert rows[:4] == [{"text": "a", "id": "1"}, UNLIKE_HEADER, UNLIKE_HEADER, NOT_CSV]
    assert rows[4:6] == [None, {"text": 'e "f"\n', "id": "5"}]
    # Half a character, which is told and dropped when the record is packed.
    assert rows[6] == {"text": "\udcff", "id": "6"}
    assert rows[7:] == [NOT_CSV]
    assert separated("") == []


def test_a_csv_file_that_names_no_columns_or_never_ends_a_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorpusError, match=r"a name each, got \['text'\] more than once in the"):
        separated("text,id,text\na,1,b\n")
    with pytest.raises(
        CorpusError, match=r"in the first row, got 'a.csv', whose first row is no CS"
    ):
        separated('"text"x,id\na,1,b\n')
    (tmp_path / "a.csv").write_bytes("text\na\n".encode("utf-16"))
    with pytest.raises(CorpusError, match="it is UTF-16"):
        rows_of(tmp_path / "a.csv")
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(CorpusError, match=r"shorter than 1 MiB, got a longer one in 'a.csv'"):
        separated("text\n" + "a" * (2 << 20))


def test_csv_is_found_by_its_name_and_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.CSV.gz").write_bytes(gzip.compress(b'prompt,answer\nhi,yo\n"a,b",c\n'))
    (tmp_path / "b.tsv").write_bytes(b"prompt\tanswer\nhi\tyo\na,b\tc\n")
    (entry, other) = find_inputs([tmp_path])
    assert (entry.stem, other.stem) == ("a", "b")
    expected = [{"prompt": "hi", "answer": "yo"}, {"prompt": "a,b", "answer": "c"}]
    for found in (entry, other):
        assert [row for piece in cut(found) for row in read(piece, COLUMNS)] == expected


STRUCTS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
TYPES: dict[str, tuple[Any, Any]] = {
    "structs": (HI, STRUCTS),
    "large": (HI, pa.large_list(STRUCTS.value_type)),
    "fixed": (HI, pa.list_(STRUCTS.value_type, 2)),
    "a struct of lists": (
        {"role": ["user", "assistant"], "content": ["hi", "yo"]},
        pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))]),
    ),
    "maps": ([list(turn.items()) for turn in HI], pa.list_(pa.map_(pa.string(), pa.string()))),
    "bytes": (
        [{name: text.encode() for name, text in turn.items()} for turn in HI],
        pa.list_(pa.struct([("role", pa.binary()), ("content", pa.large_binary())])),
    ),
    "JSON": ('[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]', pa.string()),
    "JSON in bytes": (b'[{"role": "user", "content": "hi"}, {"from": "gpt", "value": "yo"}]', None),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("file", ["a.parquet", "a.feather", "a.arrow", "stream.arrow"])
def test_nested_and_other_types_become_messages(tmp_path: Path, name: str, file: str) -> None:
    value, kind = TYPES[name]
    columns = {
        "id": pa.array([b"r1", b"r2", b"r3"]),
        "messages": pa.array([value, None, value], type=kind),
        "source": pa.array(["web", "web", None]).dictionary_encode(),
        "unused": pa.array([1, 2, 3]),
    }
    path, table = tmp_path / file, pa.table(columns)
    if file == "a.parquet":
        pq.write_table(table, path, row_group_size=2)
    elif file == "a.feather":
        feather.write_feather(table, path, chunksize=2)
    else:
        kinds = {"a.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with kinds[file](path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)
    first, empty, last = rows_of(path)
    assert normalise(first).messages == normalise(last).messages == HI
    assert (normalise(first).id, normalise(first, source_field=None).source) == ("r1", None)
    assert empty["messages"] is None
    assert "unused" not in first


def test_json_of_a_column_that_is_none_is_dropped(tmp_path: Path) -> None:
    kind = pa.list_(pa.field("x", pa.string(), metadata={"ARROW:extension:name": "arrow.json"}))
    batch = pa.record_batch([pa.array([['"a"'], ["{"], None], type=kind)], names=["text"])
    expected = [{"text": ["a"]}, DropReason.UNREADABLE, {"text": None}]
    assert list(tables._rows(batch)) == expected


def test_columns_of_one_name_and_feather_of_long_ago_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(
        CorpusError, match=r"a name each, got \['text'\] more than once in '.*arrow"
    ):
        rows_of(tmp_path / "a.arrow")
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(CorpusError, match="which is Feather of version 1; read it with pyarrow"):
        rows_of(tmp_path / "a.feather")


def written(table: pa.Table, name: str) -> bytes:
    sink = io.BytesIO()
    if name == "a.parquet":
        pq.write_table(table, sink)
    elif name == "a.feather":
        feather.write_feather(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def test_offsets_that_lead_out_of_their_buffer_are_refused_and_not_followed(tmp_path: Path) -> None:
    # Found by changing bytes at random: pyarrow follows them, and the process is gone.
    table = pa.table({"text": ["a" * 7, "b" * 7, "c" * 7]})
    data = written(table, "a.arrow")
    offsets = np.array([0, 7, 14, 21], np.int32).tobytes()
    assert data.count(offsets) == 1
    wrong = np.array([0, 7, 1 << 30, 21], np.int32).tobytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, wrong))
    with pytest.raises(CorpusError, match=r"must be whole and readable, got .*ArrowInvalid"):
        rows_of(tmp_path / "a.arrow")


def test_names_of_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    data = written(pa.table({"text": [[{"role": "user"}]]}), "a.parquet")
    (tmp_path / "a.parquet").write_bytes(data.replace(b"role", b"r\xa6le"))
    with pytest.raises(CorpusError, match="inputs must be whole and readable"):
        rows_of(tmp_path / "a.parquet")


@given(
    name=st.sampled_from(["a.parquet", "a.feather", "a.arrow"]),
    places=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=3),
    value=st.sampled_from([0, 1, 127, 128, 255]),
)
@settings(max_examples=60)
def test_any_damaged_table_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, places: list[int], value: int
) -> None:
    data = bytearray(written(pa.Table.from_pylist([{"id": "1", "messages": HI}] * 9), name))
    for place in places:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with contextlib.suppress(CorpusError):
        rows_of(path)
