"""Samples to MDS shards with a hash each, and an index that is written last."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from slap_stream.core.files import local_path
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.encodings import UNSAFE_ENCODINGS, Codec, codec_of
from slap_stream.shards.index import INDEX_VERSION, SHARD_BYTES, PathLike, ShardInfo, write_index

MAX_SHARD_BYTES = (1 << 32) - 1
# Fast enough that writing and every later check of a shard cost next to nothing.
SHARD_HASH = "xxh64"


class SampleWriter:
    """Writes samples into the shards of one directory; made by `open_writer`.

    What it leaves are the bytes that streaming's `MDSWriter` leaves. That one takes streaming to be
    loaded, looks up a codec for every value, parses all JSON that it has written, and has threads
    whose uploads its end cancels.

    State: the encoded samples of the shard that is not written yet, and the entries of those that
    are.

    Args:
        directory: Where the shards go.
        codecs: Of each column.
        config: What the index says of every shard alike.
    """

    def __init__(self, directory: Path, codecs: Mapping[str, Codec], config: ShardInfo) -> None:
        self._directory, self._config = directory, config
        encodings = zip(config["column_names"], config["column_encodings"], strict=True)
        self._columns = [(name, encoding, codecs[name]) for name, encoding in encodings]
        # A sample begins with the sizes of those of its values that have one of their own.
        own_sizes = sum(codec.size is None for codec in codecs.values())
        self._pack_sizes = struct.Struct(f"={own_sizes}I").pack
        self._header = json.dumps(config, sort_keys=True).encode()
        self.shards: list[ShardInfo] = []
        self._samples: list[bytes] = []
        self._num_bytes = self._empty_bytes = 8 + len(self._header)

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample.

        Raises:
            CorpusError: If a column is missing, or a value cannot be encoded as its column is.
        """
        self.write_encoded(sample, ())

    def write_encoded(self, sample: Mapping[str, Any], encoded: Collection[str]) -> None:
        """Append one sample of which some columns are encoded already.

        Nothing tells whether they are as their columns have them: what is not is found when it is
        read.

        Args:
            sample: Values by column.
            encoded: Columns whose values are the bytes that go into the shard.

        Raises:
            CorpusError: If a column is missing, or a value cannot be encoded as its column is.
        """
        sizes, parts = [], []
        for name, encoding, codec in self._columns:
            try:
                value = sample[name]
                data: bytes = value if name in encoded else codec.encode(value)
            except KeyError as error:
                raise self._refusal(sample) from error
            except (TypeError, ValueError, OverflowError, AttributeError) as error:
                raise CorpusError(
                    f"column {name!r} must hold what can be encoded as {encoding}, got "
                    f"{type(value).__name__}: {error}"
                ) from error
            if codec.size is None:
                sizes.append(len(data))
            elif len(data) != codec.size:
                raise CorpusError(
                    f"column {name!r} must take {codec.size} bytes, got {len(data)}; is it encoded "
                    "as it is declared?"
                )
            parts.append(data)
        whole = b"".join([self._pack_sizes(*sizes), *parts])
        if self._samples and self._num_bytes + len(whole) + 4 > self._config["size_limit"]:
            self.flush()
        self._samples.append(whole)
        self._num_bytes += len(whole) + 4

    def flush(self) -> None:
        """Write the samples that wait, if there are any, as one shard."""
        if not self._samples:
            return
        count = len(self._samples)
        bounds = np.cumsum([0, *map(len, self._samples)]) + 8 + 4 * count + len(self._header)
        if bounds[-1] > MAX_SHARD_BYTES:
            raise CorpusError(
                f"a shard must end within {MAX_SHARD_BYTES} bytes, got {bounds[-1]}; MDS stores "
                "offsets in 32 bits."
            )
        head = np.uint32(count).tobytes() + bounds.astype(np.uint32).tobytes() + self._header
        raw = b"".join([head, *self._samples])
        name, compression = f"shard.{len(self.shards):05}.mds", self._config["compression"]
        raw_data, zip_data = _described(name, raw), None
        if compression is not None:
            from slap_stream.shards.library import compress, get_compression_extension

            raw = compress(compression, raw)
            name = f"{name}.{get_compression_extension(compression)}"
            zip_data = _described(name, raw)
        (self._directory / name).write_bytes(raw)
        entry = {"samples": count, "raw_data": raw_data, "zip_data": zip_data}
        self.shards.append(self._config | entry)
        self._samples, self._num_bytes = [], self._empty_bytes

    def _refusal(self, sample: Mapping[str, Any]) -> CorpusError:
        names = self._config["column_names"]
        missing = [name for name in names if name not in sample]
        return CorpusError(
            f"sample must have the columns {names!r}, got {sorted(sample)!r}; {missing!r} cannot "
            "be left out."
        )


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
        ConfigError: If shard_bytes is out of range, or an encoding or a compression is unknown, or
            an encoding unsafe.
        CorpusError: If the directory is not empty, or not local.
    """
    if not 0 < shard_bytes <= MAX_SHARD_BYTES:
        raise ConfigError(
            f"shard_bytes must be in [1, {MAX_SHARD_BYTES}], got {shard_bytes!r}; "
            "MDS stores offsets in 32 bits."
        )
    codecs = _codecs(columns)
    if compression is not None:
        from slap_stream.shards.library import is_compression

        if not is_compression(compression):
            raise ConfigError(
                f"compression must be one that streaming knows, got {compression!r}; zstd, say."
            )
    path = local_path("out_dir", out_dir)
    if path.exists() and any(path.iterdir()):
        raise CorpusError(
            f"out_dir must be empty, got {str(path)!r}, which is not; "
            "remove what an interrupted run left there, or choose another."
        )
    path.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    writer = SampleWriter(
        path,
        codecs,
        {
            "version": INDEX_VERSION,
            "format": "mds",
            "compression": compression,
            "hashes": [SHARD_HASH],
            "size_limit": shard_bytes,
            "column_names": names,
            "column_encodings": [columns[name] for name in names],
            "column_sizes": [codecs[name].size for name in names],
        },
    )
    yield writer
    writer.flush()
    write_index(path, writer.shards)


def _codecs(columns: Mapping[str, str]) -> dict[str, Codec]:
    if not columns:
        raise ConfigError("columns must name at least one column, got none.")
    codecs: dict[str, Codec] = {}
    for name, encoding in columns.items():
        try:
            codecs[name] = codec_of(encoding)
        except ValueError as error:
            from slap_stream.shards.library import get_mds_encodings

            raise ConfigError(
                f"columns must use known MDS encodings, got {encoding!r} for {name!r}; "
                f"one of {', '.join(sorted(get_mds_encodings()))}."
            ) from error
        if encoding in UNSAFE_ENCODINGS:
            raise ConfigError(
                f"columns must use encodings that are safe to read, got {encoding!r} for "
                f"{name!r}; unpickling runs code, use json or ndarray."
            )
    return codecs


def _described(name: str, data: bytes) -> ShardInfo:
    hashes = {SHARD_HASH: xxhash.xxh64(data).hexdigest()}
    return {"basename": name, "bytes": len(data), "hashes": hashes}
