"""Pieces of inputs, read row by row: lines (plain, gz, zst), Parquet, Arrow, loaded datasets."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from slap_stream.corpus.loaded import LoadedKind, loaded_rows
from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.records import parse_line
from slap_stream.errors import CorpusError
from slap_stream.remote.listing import RemotePath
from slap_stream.remote.reading import open_remote
from slap_stream.remote.urls import is_remote

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import WriteableBuffer

Kind = Literal["lines", "gz", "zst", "parquet", "arrow"] | LoadedKind
Row = Mapping[str, Any] | DropReason | None
"""A record; or why it cannot be read; or None for a blank line, which is counted and no record."""

MAX_RECORD_BYTES = 64 << 20
_REPORT_LINES = 256
# An extension of Arrow's.
_JSON = "arrow.json"
# Tables become Python objects so many rows at a time.
_SLICE_ROWS = 64
# A chunk this small expands to at most 128 MiB, however well it was compressed.
_ZSTD_CHUNK_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of an input that can be read apart from the others.

    Attributes:
        path: File that it lies in; a name for what lies in none.
        kind: How that file is read.
        stem: Name of the input: source of the records that name none, and start of their ids.
        start: First byte (lines), row group (Parquet), record batch (Arrow) or row.
        stop: Half-open end in the same unit; compressed files are read from end to end.
        num_bytes: On disk, about; for the progress bar. 0: not known.
        dataset: Whose rows are read, if it is loaded already.
    """

    path: str
    kind: Kind
    stem: str
    start: int
    stop: int
    num_bytes: int
    dataset: Any = None


def read(
    piece: Piece, columns: Sequence[str], advance: Callable[[int], None] | None = None
) -> Generator[Row, None, None]:
    """Read the rows of a piece, one at a time; the n-th that it yields is row n of the piece.

    Args:
        piece: What to read.
        columns: Fields to read, where the format allows to leave out others.
        advance: Called now and then with the bytes of the piece that are done, or with its rows if
            its bytes are not known.

    Raises:
        CorpusError: If the file is damaged; a single bad line is no such damage.
    """

    def report(done: float) -> None:
        if advance is not None:
            advance(min(int(done), piece.num_bytes or int(done)))

    with explained(piece.path):
        if piece.kind == "parquet":
            yield from _table_rows(_parquet_batches(piece, columns, report))
        elif piece.kind == "arrow":
            yield from _table_rows(_arrow_batches(piece, columns, report))
        elif piece.kind == "rows":
            yield from loaded_rows(
                piece.dataset,
                piece.start,
                piece.stop,
                columns,
                lambda share: report(piece.num_bytes * share),
            )
        elif piece.kind == "stream":
            yield from loaded_rows(piece.dataset, 0, 0, columns, report)
        else:
            yield from _line_rows(piece, report)


@contextmanager
def explained(path: object) -> Iterator[None]:
    """Name the file in the errors that reading it raises.

    Raises:
        CorpusError: Instead of the error of the file system, of a compression or of a table.
    """
    import zstandard
    from pyarrow.lib import ArrowException

    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, ArrowException) as error:
        raise CorpusError(
            f"inputs must be whole and readable, got {str(path)!r}, where reading failed with "
            f"{type(error).__name__}: {error}; fetch or write the file again."
        ) from error


def opened(path: str) -> BinaryIO:
    """A file of an input, wherever it lies, to be read."""
    return open_remote(path) if is_remote(path) else open(path, "rb")


def table_source(path: str) -> str | BinaryIO:
    """What pyarrow reads a table from: local files it opens itself, which is faster."""
    return open_remote(path) if is_remote(path) else path


def row_group_bytes(path: Path | RemotePath) -> list[int]:
    """Bytes of each row group of a Parquet file, uncompressed."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(table_source(str(path))) as table:
        groups = table.metadata
        return [groups.row_group(n).total_byte_size for n in range(groups.num_row_groups)]


def other_columns(piece: Piece, columns: Sequence[str]) -> list[str]:
    """Columns of a table or a dataset that are not among these.

    None of lines and of a stream, whose fields are all read.
    """
    names: list[str] = []
    if piece.kind not in ("parquet", "arrow", "rows"):
        return names
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(piece.path):
        if piece.kind == "parquet":
            names = pq.read_schema(table_source(piece.path)).names
        elif piece.kind == "arrow":
            with pa.memory_map(piece.path) as source, pa.ipc.open_stream(source) as batches:
                names = batches.schema.names
        elif piece.kind == "rows":
            names = piece.dataset.column_names
    return sorted(set(names) - set(columns))


def batch_bytes(path: Path | RemotePath) -> list[int]:
    """Bytes of each record batch of an Arrow stream."""
    import pyarrow as pa

    # Mapped: the batches are found without reading what they hold.
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        return [batch.nbytes for batch in batches]


def _line_rows(piece: Piece, report: Callable[[float], None]) -> Iterator[Row]:
    with opened(piece.path) as raw, _decompressed(raw, piece.kind) as stream:
        # Counted, and not asked for with every line; nothing but plain lines has a stop.
        at = piece.start
        if piece.start:
            # The line that holds the byte before belongs to the piece before.
            raw.seek(piece.start - 1)
            at += _skip_line(raw) - 1
        number = 0
        while piece.kind != "lines" or at < piece.stop:
            line = stream.readline(MAX_RECORD_BYTES)
            if not line:
                break
            at += len(line)
            if number == 0 and piece.start == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                at += _skip_line(stream)
                yield DropReason.TOO_LARGE
            else:
                yield _parse(line)
            number += 1
            if number % _REPORT_LINES == 0:
                report(raw.tell() - piece.start)


def _decompressed(raw: BinaryIO, kind: Kind) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    if kind == "gz":
        return gzip.GzipFile(fileobj=raw)
    if kind == "zst":
        return io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 17)
    return raw


def _skip_line(stream: BinaryIO | gzip.GzipFile | io.BufferedReader) -> int:
    """Bytes that were read to go to the start of the next line."""
    skipped = 0
    while rest := stream.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _parse(line: bytes) -> Row:
    if not line.strip():
        return None
    try:
        value = parse_line(line)
    except RecordDropped as dropped:
        return dropped.reason
    return value if isinstance(value, Mapping) else DropReason.NOT_AN_OBJECT


def _table_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    for batch in batches:
        found = {field.name: _json_in(field) for field in batch.schema}
        unfold = {name: function for name, function in found.items() if function is not None}
        for start in range(0, batch.num_rows, _SLICE_ROWS):
            rows = batch.slice(start, _SLICE_ROWS).to_pylist()
            for row in rows:
                for name, function in unfold.items():
                    row[name] = function(row[name])
            yield from rows


def _json_in(field: pa.Field) -> Callable[[Any], Any] | None:
    """What reads the JSON that the values of a column hold as text; None if they hold none.

    `datasets` writes its feature `Json` so, wherever values of one field are of several kinds.
    """
    import pyarrow as pa

    kind, metadata = field.type, field.metadata or {}
    # Where pyarrow does not know the extension, the name alone is left.
    name = getattr(kind, "extension_name", None) or metadata.get(b"ARROW:extension:name")
    if name in (_JSON, _JSON.encode()):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _json_in(kind.value_field)
        if inner is None:
            return None
        return lambda value: None if value is None else [inner(entry) for entry in value]
    if pa.types.is_struct(kind):
        parts = {part.name: found for part in kind if (found := _json_in(part)) is not None}
        if not parts:
            return None
        return lambda value: (
            None if value is None else value | {name: parts[name](value[name]) for name in parts}
        )
    return None


def _parquet_batches(
    piece: Piece, columns: Sequence[str], report: Callable[[float], None]
) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    # Buffered and not pre-buffered: pages are read as they are needed, not whole row groups.
    source = table_source(piece.path)
    with pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as table:
        groups = range(piece.start, piece.stop)
        present = [name for name in columns if name in table.schema_arrow.names]
        total = sum(table.metadata.row_group(group).num_rows for group in groups)
        done = 0
        for batch in table.iter_batches(
            batch_size=4 * _SLICE_ROWS, row_groups=list(groups), columns=present, use_threads=False
        ):
            yield batch
            done += batch.num_rows
            report(piece.num_bytes * done / total)


def _arrow_batches(
    piece: Piece, columns: Sequence[str], report: Callable[[float], None]
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(piece.path) as source, pa.ipc.open_stream(source) as batches:
        present = [name for name in columns if name in batches.schema.names]
        for number in range(piece.stop):
            batch = batches.read_next_batch()
            if number >= piece.start:
                yield batch.select(present)
                report(piece.num_bytes * (number + 1 - piece.start) / (piece.stop - piece.start))


class _ZstdStream(io.RawIOBase):
    """Zstandard frames, decompressed; unlike the library's own stream it notices a cut-off end."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._decompressor = zstandard.ZstdDecompressor()
        self._raw = raw
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._ready:
            chunk = b""
            if self._frame is not None and self._frame.eof:
                chunk, self._frame = self._frame.unused_data, None
            chunk = chunk or self._raw.read(_ZSTD_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(chunk)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
