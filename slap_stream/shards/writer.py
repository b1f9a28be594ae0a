"""Samples to MDS shards with a hash each, and an index that is written last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.index import SHARD_BYTES, PathLike, write_index
from slap_stream.shards.library import (
    MDSWriter,
    get_mds_encodings,
    is_mds_encoding,
    is_mds_encoding_safe,
)

MAX_SHARD_BYTES = (1 << 32) - 1
# Fast enough that writing and every later check of a shard cost next to nothing.
SHARD_HASH = "xxh64"


class SampleWriter:
    """Writes samples into the shards of one directory; made by `open_writer`."""

    def __init__(self, writer: MDSWriter) -> None:
        self._writer = writer

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample.

        Raises:
            CorpusError: If a column is missing.
        """
        missing = [name for name in self._writer.column_names if name not in sample]
        if missing:
            raise CorpusError(
                f"sample must have the columns {self._writer.column_names!r}, got "
                f"{sorted(sample)!r}; {missing!r} cannot be left out."
            )
        self._writer.write(sample)


@contextmanager
def open_writer(
    out_dir: PathLike,
    columns: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
    compression: str | None = None,
) -> Iterator[SampleWriter]:
    """Write MDS shards into an empty directory.

    The index is written last and only if the block ends without an exception: a directory with an
    index is complete. (The stock writer writes one after an exception, too.)

    Args:
        out_dir: Directory to make; may exist if it is empty.
        columns: Column name to MDS encoding.
        shard_bytes: Size above which a new shard is started.
        compression: Streaming's name of a compression, `zstd` say; None leaves shards raw.

    Yields:
        A writer with `write(sample)`.

    Raises:
        ConfigError: If shard_bytes is out of range, or an encoding is unknown or unsafe.
        CorpusError: If the directory is not empty.
    """
    if not 0 < shard_bytes <= MAX_SHARD_BYTES:
        raise ConfigError(
            f"shard_bytes must be in [1, {MAX_SHARD_BYTES}], got {shard_bytes!r}; "
            "MDS stores offsets in 32 bits."
        )
    if not columns:
        raise ConfigError("columns must name at least one column, got none.")
    for name, encoding in columns.items():
        if not is_mds_encoding(encoding):
            raise ConfigError(
                f"columns must use known MDS encodings, got {encoding!r} for {name!r}; "
                f"one of {', '.join(sorted(get_mds_encodings()))}."
            )
        if not is_mds_encoding_safe(encoding):
            raise ConfigError(
                f"columns must use encodings that are safe to read, got {encoding!r} for "
                f"{name!r}; unpickling runs code, use json or ndarray."
            )
    path = Path(out_dir)
    if path.exists() and any(path.iterdir()):
        raise CorpusError(
            f"out_dir must be empty, got {str(path)!r}, which is not; "
            "remove what an interrupted run left there, or choose another."
        )
    path.mkdir(parents=True, exist_ok=True)
    writer = MDSWriter(
        columns=dict(columns),
        out=str(path),
        compression=compression,
        hashes=[SHARD_HASH],
        size_limit=shard_bytes,
    )
    try:
        yield SampleWriter(writer)
        if writer.new_samples:
            writer.flush_shard()
        # The stock writer flushes an empty shard ahead of a sample larger than `shard_bytes`.
        for shard in [shard for shard in writer.shards if not shard["samples"]]:
            file = shard["zip_data"] or shard["raw_data"]
            (path / file["basename"]).unlink()
        write_index(path, [shard for shard in writer.shards if shard["samples"]])
    finally:
        writer.cancel_future_jobs()
