"""Shards in, samples out: the only module that imports `streaming`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.compression import decompress
from streaming.base.format import MDSWriter, Reader, reader_from_json
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import (
    get_mds_encodings,
    is_mds_encoding,
    is_mds_encoding_safe,
)

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shard_index import (
    PathLike,
    corpus_columns,
    corpus_size,
    merge_indexes,
    read_index,
    shard_sizes,
    write_index,
)
from slap_stream.sharding.cache import ShardCache
from slap_stream.sharding.fetch import ShardFetcher
from slap_stream.sharding.opening import one_at_a_time
from slap_stream.sharding.plan import (
    DatasetShards,
    index_digests,
    launched_ranks,
    min_cache_bytes,
    plan_shards,
)
from slap_stream.sharding.read import OpenShards

__all__ = [
    "DatasetShards",
    "SampleWriter",
    "ShardFetcher",
    "ShardView",
    "corpus_columns",
    "corpus_size",
    "index_digests",
    "iter_corpus",
    "launched_ranks",
    "merge_indexes",
    "min_cache_bytes",
    "one_at_a_time",
    "open_writer",
    "shard_sizes",
    "shard_table",
]

SHARD_BYTES = 1 << 26
MAX_SHARD_BYTES = (1 << 32) - 1
# Fast enough that writing and every later check of a shard cost next to nothing.
SHARD_HASH = "xxh64"

# Attributes of a dataset that belong to one process or one iteration: locks and threads cannot be
# pickled, and a copy that still had `_locals_shm` would release the original's directories when
# it is collected.
_PROCESS_BOUND = ("_locals_shm", "_cache_filelock", "_executor", "_event", "_iterator")


class SampleWriter:
    """Writes samples into the shards of one directory; made by `open_writer`."""

    def __init__(self, writer: MDSWriter, out_dir: Path) -> None:
        self._writer = writer
        self._out_dir = out_dir
        self.num_samples = 0

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
        self.num_samples += 1

    def finish(self) -> None:
        """Write the last shard, then the index."""
        if self._writer.new_samples:
            self._writer.flush_shard()
        # The stock writer flushes an empty shard ahead of a sample larger than `shard_bytes`.
        empty = [shard for shard in self._writer.shards if not shard["samples"]]
        for shard in empty:
            file = shard["zip_data"] or shard["raw_data"]
            (self._out_dir / file["basename"]).unlink()
        write_index(self._out_dir, [s for s in self._writer.shards if s["samples"]])

    def close(self) -> None:
        """Let go of the writer's threads; without `finish` the directory has no index."""
        self._writer.cancel_future_jobs()


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
    writer = SampleWriter(
        MDSWriter(
            columns=dict(columns),
            out=str(path),
            compression=compression,
            hashes=[SHARD_HASH],
            size_limit=shard_bytes,
        ),
        path,
    )
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


def iter_corpus(
    corpus_dir: PathLike, start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Raw samples of a corpus on local disk, in sample-id order.

    Shards of which only the compressed files are there are unpacked into a temporary directory,
    one at a time; the corpus is not changed.

    Args:
        corpus_dir: Directory with an index.json.
        start: First sample id.
        stop: Sample id to stop before; None reads to the end.

    Yields:
        Samples as dicts of their columns.

    Raises:
        CorpusError: If the index is missing or unusable, the range is not inside the corpus, a
            shard is missing, or a column would have to be unpickled.
    """
    directory = Path(corpus_dir)
    index = read_index(directory)
    sizes = np.array([shard["samples"] for shard in index], np.int64)
    num_samples = int(sizes.sum())
    stop = num_samples if stop is None else stop
    if not 0 <= start <= stop <= num_samples:
        raise CorpusError(
            f"range must lie inside [0, {num_samples}), got [{start}, {stop}) in "
            f"{str(directory)!r}."
        )
    first_id = np.cumsum(sizes) - sizes
    for shard_id in range(len(index)):
        low = max(start - int(first_id[shard_id]), 0)
        high = min(stop - int(first_id[shard_id]), int(sizes[shard_id]))
        if low >= high:
            continue
        try:
            reader = reader_from_json(str(directory), None, index[shard_id])
            reader.validate(allow_unsafe_types=False)
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(
                f"shard {shard_id} of {str(directory)!r} must be readable without unpickling, got "
                f"an entry in index.json of which streaming says: {error}"
            ) from error
        with ExitStack() as stack:
            _unpack(directory, reader, stack)
            for row in range(low, high):
                yield reader[row]


def _unpack(directory: Path, reader: Reader, stack: ExitStack) -> None:
    """Point the reader at raw files: its own, or unpacked ones that live as long as the stack."""
    raw = [directory / info.basename for info, _ in reader.file_pairs]
    if all(path.is_file() for path in raw):
        for path, (info, _) in zip(raw, reader.file_pairs, strict=True):
            if path.stat().st_size != info.bytes:
                raise CorpusError(
                    f"shard {path.name!r} must have the {info.bytes} bytes that index.json says, "
                    f"got {path.stat().st_size}; fetch it or write the corpus again."
                )
        return
    packed = [directory / info.basename for _, info in reader.file_pairs if info is not None]
    if len(packed) != len(raw) or not all(path.is_file() for path in packed):
        missing = next(path for path in raw if not path.is_file())
        raise CorpusError(
            f"shards of {str(directory)!r} must be on local disk, got no {missing.name!r}; "
            "download the corpus first, or write it again."
        )
    unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slap-shard-")))
    for (info, _), path in zip(reader.file_pairs, packed, strict=True):
        target = unpacked / info.basename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(decompress(reader.compression, path.read_bytes()))
    reader.dirname, reader.split = str(unpacked), ""


def shard_table(dataset: StreamingDataset) -> DatasetShards:
    """A dataset's shards and how many candidates an epoch offers from each.

    Raises:
        TypeError: If it is no `StreamingDataset`.
        ConfigError: If it asks for something that cannot be honoured; the message names it.
    """
    if not isinstance(dataset, StreamingDataset):
        raise TypeError(
            f"dataset must be a streaming.StreamingDataset, got {type(dataset).__name__}; only "
            "its shards can be planned ahead."
        )
    if type(dataset).__iter__ is not StreamingDataset.__iter__:
        raise ConfigError(
            f"dataset must not override __iter__, got {type(dataset).__name__}, which does; "
            "samples are read by id: put the change into __getitem__."
        )
    return plan_shards(dataset)


class ShardView:
    """A dataset as samples by id, for torch's DataLoader: reads grouped by shard, files kept open.

    Every sample goes through `dataset[sample_id]`, so that what a subclass does there still
    happens; only the raw read below it is replaced (MDS; other formats are read by streaming's
    own readers). A shard that is missing is fetched, blocking, and one of the wrong size is treated
    as missing.

    Pickles under spawn and survives a fork. Holds open files and no position.

    Args:
        dataset: The dataset; it is not changed.
        max_open_shards: Files kept open per process.
        deadline_seconds: Time that a missing shard may take to arrive.
    """

    def __init__(
        self,
        dataset: StreamingDataset,
        *,
        max_open_shards: int = 64,
        deadline_seconds: float = 600.0,
    ) -> None:
        # Collecting the original would release its local directories to other datasets.
        self._owner = dataset
        self._dataset = _without_process_state(dataset)
        self._max_open_shards = max_open_shards
        self._deadline_seconds = deadline_seconds
        self._cache = ShardCache(self._dataset)
        files = OpenShards(
            self._dataset.shards,
            self._cache,
            max_open=max_open_shards,
            deadline_seconds=deadline_seconds,
        )
        self._reading = copy.copy(self._dataset)
        self._reading.prepare_shard = self._prepare_shard
        self._reading.shards = [
            _reading_through(files, shard_id, shard)
            for shard_id, shard in enumerate(self._dataset.shards)
        ]

    def __len__(self) -> int:
        """Samples in the dataset, each once, whatever the streams' weights."""
        return int(self._dataset.num_samples)

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        """One sample with its id."""
        return int(sample_id), self._reading[int(sample_id)]

    def __getitems__(self, sample_ids: Sequence[int]) -> list[tuple[int, Any]]:
        """Several samples with their ids, read shard by shard, returned in the order asked.

        Raises:
            IndexError: If an id is not one of the dataset's.
            ShardError: If a shard cannot be fetched or read.
        """
        ids = [int(sample_id) for sample_id in sample_ids]
        samples: list[Any] = [None] * len(ids)
        for position in sorted(range(len(ids)), key=ids.__getitem__):
            samples[position] = self._reading[ids[position]]
        return list(zip(ids, samples, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "max_open_shards": self._max_open_shards,
            "deadline_seconds": self._deadline_seconds,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Stands in for the dataset's own, which leaves a failed shard in preparation for ever."""
        self._cache.ensure(int(shard_id), monotonic() + self._deadline_seconds)


def _without_process_state(dataset: StreamingDataset) -> StreamingDataset:
    clone = copy.copy(dataset)
    for name in _PROCESS_BOUND:
        clone.__dict__.pop(name, None)
    clone._shared_barrier = copy.copy(dataset._shared_barrier)
    clone._shared_barrier.__dict__.pop("lock", None)
    return clone


def _reading_through(files: OpenShards, shard_id: int, shard: Reader) -> Reader:
    """A shard's reader whose raw reads go through open files, if it has the stock MDS ones."""
    if getattr(type(shard), "get_sample_data", None) is not MDSReader.get_sample_data:
        return shard
    reader = copy.copy(shard)
    reader.get_sample_data = partial(files.read, shard_id)
    return reader
