"""A file of an input, opened wherever it lies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from slap_stream.remote.listing import RemotePath
from slap_stream.remote.reading import open_remote

if TYPE_CHECKING:
    Buffered = io.BufferedReader[Any]

BUFFER_BYTES = 1 << 17


def opened(path: str | Path | RemotePath) -> Buffered:
    """Its bytes; of one elsewhere those of the version that was found."""
    if isinstance(path, RemotePath):
        return open_remote(path.file)
    return io.BufferedReader(io.FileIO(str(path)), BUFFER_BYTES)


def table_source(path: str | Path | RemotePath) -> str | BinaryIO:
    """What pyarrow reads a Parquet file from: local files it opens itself, which is faster."""
    return open_remote(path.file) if isinstance(path, RemotePath) else str(path)


def arrow_source(path: str | Path | RemotePath) -> Any:
    """What pyarrow reads an Arrow file from; a local one is mapped, so that its batches are found
    without reading what they hold."""
    import pyarrow as pa

    if isinstance(path, RemotePath):
        return pa.PythonFile(opened(path), "r")
    return pa.memory_map(str(path))
