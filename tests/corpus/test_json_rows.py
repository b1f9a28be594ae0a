"""JSON is read in whatever layout it stands; what is no JSON costs the record, and no other."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.corpus import json_rows
from slap_stream.corpus.json_rows import FormatError, one_a_line, rows_of_line, rows_of_values
from slap_stream.corpus.messages import DropReason

UNREADABLE, NOT_AN_OBJECT = DropReason.UNREADABLE, DropReason.NOT_AN_OBJECT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5)


def dump(record: Any, indent: int | None = None) -> str:
    return json.dumps(record, ensure_ascii=False, indent=indent)


def indented(records: list[Any]) -> str:
    return dump(records, 2)


# One way to write records each; those of the second kind may be read line by line, too.
LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "array": dump,
    "indented array": indented,
    "array with a record a line": lambda rs: "[\n" + ",\n".join(map(dump, rs)) + "\n]\n",
    "commas first": lambda rs: "[ " + "\n, ".join(map(dump, rs)) + "\n]",
    "two arrays": lambda rs: dump(rs[:2]) + "\n" + dump(rs[2:]),
    "nothing between": lambda rs: "".join(map(dump, rs)),
    "CR between": lambda rs: "\r".join(map(dump, rs)),
    "over several lines": lambda rs: "\n".join(dump(r, 1) for r in rs),
    "commas between": lambda rs: ",\n".join(map(dump, rs)),
    "lines": lambda rs: "".join(dump(r) + "\n" for r in rs),
    "CRLF": lambda rs: "\r\n".join(map(dump, rs)),
    "blank lines": lambda rs: "\n\n".join(map(dump, rs)) + "\n \n",
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 7)


def values(text: str | bytes) -> list[Any]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return list(rows_of_values(io.BytesIO(data).read))


def as_read(data: bytes) -> list[Any]:
    """As `readers` reads a file, blank lines left out."""
    if not one_a_line(data):
        return values(data)
    rows = [row for line in data.split(b"\n") for row in rows_of_line(line)]
    return [row for row in rows if row is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(records=RECORDS, mark=st.booleans())
@settings(max_examples=12)
def test_records_are_the_same_in_every_layout(
    layout: str, records: list[dict[str, Any]], mark: bool
) -> None:
    # By the first record is told whether all are lines.
    records = [{"first": 1}, *records]
    text = "\ufeff" * mark + LAYOUTS[layout](records)
    data = text.encode("utf-8", "surrogatepass")
    assert as_read(data) == records
    assert values(data) == records


@given(
    st.lists(st.sampled_from([*'{}[],:" \n\r', '{"a": ', '"x"', "1", "}\n{", "Ω", "\ufeff"])),
    st.integers(1, 40),
)
@settings(max_examples=100)
def test_any_text_is_read_or_refused_and_chunks_make_no_difference(
    parts: list[str], chunk: int
) -> None:
    data = "".join(parts).encode()

    def found(chunk: int) -> tuple[list[Any], str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
            rows: list[Any] = []
            try:
                rows.extend(rows_of_values(io.BytesIO(data).read))
            except FormatError as error:
                return rows, str(error)
            return rows, ""

    assert found(chunk) == found(1 << 20)
    assert all(isinstance(row, dict | DropReason | None) for row in rows_of_line(data))


@pytest.mark.parametrize("layout", ["array with a record a line", "indented array", "commas first"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_record_that_is_no_json_is_the_only_one_lost(layout: str, place: int) -> None:
    records: list[Any] = [{"text": f"{n}" * 20, "more": [{"text": "x"}]} for n in range(4)]
    text = LAYOUTS[layout](records).replace(f'"{place}{place}', f'x"{place}{place}')
    expected = [*records[:place], UNREADABLE, *records[place + 1 :]]
    assert values(text) == expected


def test_where_no_next_record_can_be_told_the_file_is_refused() -> None:
    with pytest.raises(FormatError, match="no JSON any more from about letter 11 on"):
        values('[{"a": 1}, x{"a": 2}, {"a": 3}]')
    with pytest.raises(FormatError, match="no JSON any more from about letter 8 on"):
        values('{"a": 1}x{"a": 2}' + " " * 50 + '{"a": 3}')


def test_an_array_that_is_cut_off_is_refused_and_a_last_record_dropped() -> None:
    text = indented([{"a": 1}, {"a": 2}])
    for end in range(1, len(text)):
        with pytest.raises(FormatError, match=r"its array has no end|no JSON any more"):
            values(text[:end])
    assert values('{"a": 1}{"a": 2') == [{"a": 1}, UNREADABLE]
    assert as_read(b'{"a": 1}\n{"a": 2') == [{"a": 1}, UNREADABLE]


def test_a_record_beyond_the_limit_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_RECORD_BYTES", 60)
    text = LAYOUTS["array with a record a line"]([{"a": 1}, {"a": "x" * 500}, {"a": 3}])
    assert values(text) == [{"a": 1}, DropReason.TOO_LARGE, {"a": 3}]


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        (b"", [None]),
        (b" \r", [None]),
        (b'{"a": 1}{"a": 2} \t{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        (b'[{"a": 1}, 2]', [{"a": 1}, NOT_AN_OBJECT]),
        (b'\xef\xbb\xbf{"a": 1}', [{"a": 1}]),
        # The last one counts, as for everyone who reads JSON.
        (b'{"a": 1, "a": 2}', [{"a": 2}]),
        (b'"text"', [NOT_AN_OBJECT]),
        (b"{", [UNREADABLE]),
        (b'{"a": 1} x', [UNREADABLE]),
        # A line of an indented record.
        (b'{"a": 1},', [UNREADABLE]),
        (b"[" * 100_000, [UNREADABLE]),
        (b"9" * 5000, [UNREADABLE]),
        (b'{"a": "\xff"}', [DropReason.NOT_UNICODE]),
    ],
)
def test_rows_of_a_line(line: bytes, rows: list[Any]) -> None:
    assert list(rows_of_line(line)) == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(FormatError, match="it is UTF-16, not UTF-8: iconv"):
        one_a_line('{"a": 1}'.encode(encoding))
