"""Tables in files: Parquet, Arrow and Feather by pyarrow, CSV and TSV by the standard library."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slap_stream.corpus.json_rows import MAX_RECORD_BYTES, FormatError, Row
from slap_stream.corpus.messages import DropReason
from slap_stream.corpus.opening import arrow_source, table_source
from slap_stream.errors import CorpusError
from slap_stream.remote.listing import RemotePath

if TYPE_CHECKING:
    import pyarrow as pa

Separated = Literal["csv", "tsv"]

# An extension of Arrow's.
_JSON = "arrow.json"
# Tables become Python objects so many rows at a time.
_SLICE_ROWS = 64
_FILE_MAGIC, _FEATHER_1_MAGIC = b"ARROW1", b"FEA1"


@contextmanager
def _told_by_pyarrow() -> Iterator[None]:
    """What pyarrow raises for damaged files beside its own errors: names that are no text, say.

    Raises:
        FormatError: Instead.
    """
    try:
        yield
    except (CorpusError, FormatError):
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from error


def row_group_bytes(path: Path | RemotePath) -> list[int]:
    """Bytes of each row group of a Parquet file, uncompressed."""
    import pyarrow.parquet as pq

    with _told_by_pyarrow(), pq.ParquetFile(table_source(path)) as table:
        groups = table.metadata
        return [groups.row_group(n).total_byte_size for n in range(groups.num_row_groups)]


def batch_bytes(path: Path) -> list[int]:
    """Bytes of each record batch of an Arrow stream or file."""
    with _arrow(path) as (source, _):
        # Not nbytes, which believes what the batches say of themselves.
        return [batch.get_total_buffer_size() for batch in _batches(source, 0, None)]


def parquet_names(path: str | RemotePath) -> list[str]:
    """Columns of a Parquet file."""
    import pyarrow.parquet as pq

    with _told_by_pyarrow():
        names: list[str] = pq.read_schema(table_source(path)).names
    return names


def arrow_names(path: str | RemotePath) -> list[str]:
    """Columns of an Arrow stream or file."""
    with _arrow(path) as (source, _):
        names: list[str] = source.schema.names
        return names


def parquet_rows(
    path: str | RemotePath,
    start: int,
    stop: int,
    columns: Sequence[str],
    report: Callable[[float], None],
) -> Iterator[Row]:
    """Rows of the row groups `start` to `stop`; `report` gets the share that is done."""
    import pyarrow.parquet as pq

    # Buffered and not pre-buffered: pages are read as they are needed, not whole row groups.
    source = table_source(path)
    with (
        _told_by_pyarrow(),
        pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as table,
    ):
        groups = range(start, stop)
        present = _present(columns, table.schema_arrow.names, str(path))
        total = sum(table.metadata.row_group(group).num_rows for group in groups)
        done = 0
        for batch in table.iter_batches(
            batch_size=4 * _SLICE_ROWS, row_groups=list(groups), columns=present, use_threads=False
        ):
            yield from _rows(batch)
            done += batch.num_rows
            report(done / total)


def arrow_rows(
    path: str | RemotePath,
    start: int,
    stop: int,
    columns: Sequence[str],
    report: Callable[[float], None],
) -> Iterator[Row]:
    """Rows of the record batches `start` to `stop`; `report` gets the share that is done.

    Of a file elsewhere all batches, whose number is not known: `stop` is its size.
    """
    with _arrow(path) as (source, file):
        present = _present(columns, source.schema.names, str(path))
        for done, batch in enumerate(_batches(source, start, stop), start=1):
            chosen = batch.select(present)
            # Arrow believes its files: what lies elsewhere than it should ends this process.
            chosen.validate(full=True)
            yield from _rows(chosen)
            report((file.tell() if isinstance(path, RemotePath) else done) / (stop - start))


@contextmanager
def _arrow(path: str | Path | RemotePath) -> Iterator[tuple[Any, Any]]:
    """What gives the batches, and the file that they are read from.

    `datasets` saves streams; what else ends in .arrow, and Feather, are files with a footer.
    """
    import pyarrow as pa

    with _told_by_pyarrow(), arrow_source(path) as source:
        magic = source.read(len(_FILE_MAGIC))
        source.seek(0)
        if magic.startswith(_FEATHER_1_MAGIC):
            raise CorpusError(
                f"inputs must be Arrow or Feather of version 2, got {str(path)!r}, which is "
                "Feather of version 1; read it with pyarrow.feather.read_table and write it as "
                "Parquet."
            )
        kind = pa.ipc.open_file if magic == _FILE_MAGIC else pa.ipc.open_stream
        with kind(source) as opened:
            yield opened, source


def _batches(source: Any, start: int, stop: int | None) -> Iterator[pa.RecordBatch]:
    """Record batches one at a time: where they are compressed, each is copied into memory."""
    if hasattr(source, "num_record_batches"):
        there = source.num_record_batches
        yield from map(source.get_batch, range(start, there if stop is None else min(stop, there)))
    else:
        yield from islice(source, start, stop)


def _present(columns: Sequence[str], names: Sequence[str], path: str) -> list[str]:
    present = [name for name in dict.fromkeys(columns) if name in names]
    twice = [name for name in present if names.count(name) > 1]
    if twice:
        raise CorpusError(
            f"columns must have a name each, got {twice!r} more than once in {path!r}; rename one."
        )
    return present


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    found = {field.name: _unfolding(field) for field in batch.schema}
    unfold = {name: function for name, function in found.items() if function is not None}
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        rows = batch.slice(start, _SLICE_ROWS).to_pylist()
        for row in rows:
            try:
                for name, function in unfold.items():
                    row[name] = function(row[name])
            except (ValueError, RecursionError):
                yield DropReason.UNREADABLE
            else:
                yield row


def _unfolding(field: pa.Field) -> Callable[[Any], Any] | None:
    """What makes of the values of a column what they stand for; None if they are that already.

    `datasets` writes its feature `Json`, as text, wherever values of one field are of several
    kinds. Maps arrive as pairs of keys and values.
    """
    import pyarrow as pa

    kind, metadata = field.type, field.metadata or {}
    # Where pyarrow does not know the extension, the name alone is left.
    name = getattr(kind, "extension_name", None) or metadata.get(b"ARROW:extension:name")
    if name in (_JSON, _JSON.encode()):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_map(kind):
        entry = _unfolding(kind.item_field) or (lambda value: value)
        return lambda value: None if value is None else {key: entry(item) for key, item in value}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _unfolding(kind.value_field)
        if inner is None:
            return None
        return lambda value: None if value is None else [inner(entry) for entry in value]
    if pa.types.is_struct(kind):
        parts = {part.name: found for part in kind if (found := _unfolding(part)) is not None}
        if not parts:
            return None
        return lambda value: (
            None if value is None else value | {name: parts[name](value[name]) for name in parts}
        )
    return None


def separated_rows(stream: io.BufferedReader, kind: Separated, path: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file, whose first row names the columns; an empty cell is no value.

    The standard library's parser, and not pyarrow's: that one guesses types, and gives up on a
    whole file for a row that is not UTF-8 or too long. Quotes count in TSV, too, as spreadsheets
    write it.

    Raises:
        CorpusError: If the first row does not name columns, or a line is too large to be one.
    """
    # Bytes that are not UTF-8 come to light when the record is packed, and drop that record.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _separated(text, kind, path)
    finally:
        # The file is not its own: whoever opened it closes it.
        text.detach()


def _separated(text: io.TextIOBase, kind: Separated, path: str) -> Iterator[Row]:
    # The limit is one of the process, and made for small cells; nobody's files get shorter by it.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    lines = _bounded(text, path)
    first = next(lines, "")
    delimiter = "\t" if kind == "tsv" else _delimiter(first)
    rows = csv.reader(_again(first, lines), delimiter=delimiter, strict=True)
    names = _next(rows)
    if isinstance(names, DropReason):
        raise CorpusError(
            f"inputs must name their columns in the first row, got {path!r}, whose first row is no "
            f"{kind.upper()}; write it again, or as JSON lines."
        )
    if names is None:
        return
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CorpusError(
            f"columns must have a name each, got {twice[:5]!r} more than once in the first row of "
            f"{path!r}; rename one."
        )
    while (row := _next(rows)) is not None:
        if isinstance(row, DropReason):
            yield row
        elif not row:
            yield None
        elif len(row) != len(names):
            yield DropReason.UNLIKE_HEADER
        else:
            yield {name: cell or None for name, cell in zip(names, row, strict=True)}


def _delimiter(first: str) -> str:
    """Of a CSV file: a comma, unless its first line has none."""
    return next((mark for mark in ",;\t" if mark in first), ",")


def _next(rows: Iterator[list[str]]) -> list[str] | DropReason | None:
    try:
        return next(rows, None)
    except csv.Error:
        # The parser begins anew with the next line.
        return DropReason.NOT_CSV


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _bounded(text: io.TextIOBase, path: str) -> Iterator[str]:
    while line := text.readline(MAX_RECORD_BYTES):
        if len(line) == MAX_RECORD_BYTES:
            raise CorpusError(
                f"lines must be shorter than {MAX_RECORD_BYTES >> 20} MiB, got a longer one in "
                f"{path!r}; is it a table of texts?"
            )
        yield line
