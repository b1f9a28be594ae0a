"""Pieces of inputs, read row by row: JSON, tables, loaded datasets."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from slap_stream.corpus.json_rows import (
    MAX_RECORD_BYTES,
    FormatError,
    Row,
    one_a_line,
    require_utf8,
    rows_of_line,
    rows_of_values,
)
from slap_stream.corpus.loaded import LoadedKind, loaded_rows
from slap_stream.corpus.messages import DropReason
from slap_stream.corpus.opening import BUFFER_BYTES, opened
from slap_stream.corpus.tables import (
    Separated,
    arrow_names,
    arrow_rows,
    parquet_names,
    parquet_rows,
    separated_rows,
)
from slap_stream.errors import CorpusError
from slap_stream.remote.listing import RemotePath

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    Buffered = io.BufferedReader[Any]

Kind = Literal["lines", "parquet", "arrow"] | Separated | LoadedKind
Packing = Literal["", "gz", "zst"]

_REPORT_ROWS = 256
# A chunk this small expands to at most 128 MiB, however well it was compressed.
_ZSTD_CHUNK_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of an input that can be read apart from the others.

    Attributes:
        path: File that it lies in, as it was when it was cut if it lies elsewhere; a name for what
            lies in none.
        kind: How that file is read.
        stem: Name of the input: source of the records that name none, and start of their ids.
        start: First byte (text), row group (Parquet), record batch (Arrow) or row.
        stop: Half-open end in the same unit; compressed files, and Arrow files elsewhere, are read
            from end to end.
        num_bytes: On disk, about; for the progress bar. 0: not known.
        packing: How the file is compressed.
        whole: Whether it is all of its file, so that its records need not be lines.
        dataset: Whose rows are read, if it is loaded already.
    """

    path: str | RemotePath
    kind: Kind
    stem: str
    start: int
    stop: int
    num_bytes: int
    packing: Packing = ""
    whole: bool = False
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

    def report_share(share: float) -> None:
        report(piece.num_bytes * share)

    with explained(piece.path):
        start, stop = piece.start, piece.stop
        if piece.kind == "lines" or piece.kind == "csv" or piece.kind == "tsv":
            yield from _rows_of_text(piece, report)
        elif piece.kind == "parquet":
            yield from parquet_rows(piece.path, start, stop, columns, report_share)
        elif piece.kind == "arrow":
            yield from arrow_rows(piece.path, start, stop, columns, report_share)
        elif piece.kind == "rows":
            yield from loaded_rows(piece.dataset, start, stop, columns, report_share)
        else:
            yield from loaded_rows(piece.dataset, 0, 0, columns, report)


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
    except (
        *(OSError, EOFError, FormatError, zlib.error),
        *(zstandard.ZstdError, ArrowException),
    ) as error:
        kept_out = isinstance(error, PermissionError)
        cure = "allow it to be read" if kept_out else "fetch or write the file again"
        raise CorpusError(
            f"inputs must be whole and readable, got {str(path)!r}, where reading failed with "
            f"{type(error).__name__}: {error}; {cure}."
        ) from error


def other_columns(piece: Piece, columns: Sequence[str]) -> list[str]:
    """Columns of a table or a dataset that are not among these.

    None of what is read with all of its fields.
    """
    names: list[str] = []
    with explained(piece.path):
        if piece.kind == "parquet":
            names = parquet_names(piece.path)
        elif piece.kind == "arrow":
            names = arrow_names(piece.path)
        elif piece.kind == "rows":
            names = piece.dataset.column_names
    return sorted(set(names) - set(columns))


def _rows_of_text(piece: Piece, report: Callable[[float], None]) -> Iterator[Row]:
    with ExitStack() as stack:
        raw = stack.enter_context(opened(piece.path))
        stream = stack.enter_context(_unpacked(raw, piece))
        for number, row in enumerate(_rows_in(piece, raw, stream), start=1):
            yield row
            if number % _REPORT_ROWS == 0:
                report(raw.tell() - piece.start)


def _rows_in(piece: Piece, raw: Buffered, stream: Buffered) -> Iterator[Row]:
    if piece.kind == "csv" or piece.kind == "tsv":
        require_utf8(stream.peek(2))
        return separated_rows(stream, piece.kind, str(piece.path))
    # Of a part it is known already that its records are lines.
    if piece.whole and not one_a_line(stream.peek(BUFFER_BYTES)):
        return rows_of_values(stream.read)
    return _rows_of_lines(piece, raw, stream)


def _rows_of_lines(piece: Piece, raw: Buffered, stream: Buffered) -> Iterator[Row]:
    # Counted, and not asked for with every line.
    at = piece.start
    if piece.start:
        # The line that holds the byte before belongs to the piece before.
        raw.seek(piece.start - 1)
        at += _skip_line(raw) - 1
    while piece.packing or at < piece.stop:
        line = stream.readline(MAX_RECORD_BYTES)
        if not line:
            break
        at += len(line)
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            at += _skip_line(stream)
            yield DropReason.TOO_LARGE
        else:
            yield from rows_of_line(line)


def records_are_lines(path: Path | RemotePath) -> bool:
    """Whether a file of JSON that is not compressed can be read in parts.

    Raises:
        FormatError: If it is UTF-16.
    """
    with opened(path) as file:
        return one_a_line(file.read(BUFFER_BYTES))


def _unpacked(raw: Buffered, piece: Piece) -> Buffered:
    """The bytes of a file as they were before it was compressed."""
    if piece.packing == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), buffer_size=BUFFER_BYTES)
    if piece.packing == "zst":
        return io.BufferedReader(_ZstdStream(raw), buffer_size=BUFFER_BYTES)
    return raw


def _skip_line(stream: Buffered) -> int:
    """Bytes that were read to go to the start of the next line."""
    skipped = 0
    while rest := stream.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


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
