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
    _get_coder,
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
from slap_stream.sharding.decode import SampleDecoder
from slap_stream.sharding.fetch import ShardFetcher
from slap_stream.sharding.groups import SampleGroups
from slap_stream.sharding.opening import one_at_a_time
from slap_stream.sharding.plan import (
    DatasetShards,
    index_digests,
    launched_ranks,
    min_cache_bytes,
    plan_shards,
    processes_per_node,
)
from slap_stream.sharding.read import OpenShards
from slap_stream.types import IntArray

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
    "processes_per_node",
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

    Where a subclass has a `__getitem__` or `get_item` of its own, every sample goes through
    `dataset[sample_id]`, so that what it does there still happens, and only the raw read below it
    is replaced. Other samples are decoded a shard at a time. Shards that are not MDS, or have a
    reader of their own, are read by that. A shard that is missing is fetched, blocking, and one of
    the wrong size is treated as missing.

    Pickles under spawn and survives a fork. Holds mapped files and no position.

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
        shards = self._dataset.shards
        files = OpenShards(
            shards, self._cache, max_open=max_open_shards, deadline_seconds=deadline_seconds
        )
        self._reading = copy.copy(self._dataset)
        self._reading.prepare_shard = self._prepare_shard
        self._reading.shards = [
            _reading_through(files, shard_id, shard) for shard_id, shard in enumerate(shards)
        ]
        sizes = np.asarray(dataset.samples_per_shard, np.int64)
        # Bound before it is replaced below.
        read_one = self._reading.get_item
        self._groups = SampleGroups(sizes, _decoders(shards), files, self._cache, read_one)
        # Samples of the group at hand that `dataset[sample_id]` has not asked for yet.
        self._at_hand: dict[int, Any] = {}
        self._reads_groups = _is_stock(dataset, StreamingDataset, "get_item")
        self._plain = self._reads_groups and _is_stock(dataset, StreamingDataset, "__getitem__")
        if self._reads_groups:
            self._reading.get_item = self._get_item

    def __len__(self) -> int:
        """Samples in the dataset, each once, whatever the streams' weights."""
        return int(self._dataset.num_samples)

    def __getitem__(self, sample_id: int) -> Any:
        """One sample."""
        return self._reading[int(sample_id)]

    def __getitems__(self, sample_ids: Sequence[int] | IntArray) -> list[Any]:
        """Several samples, read shard by shard, returned in the order asked.

        Raises:
            IndexError: If an id is not one of the dataset's.
            ShardError: If a shard cannot be fetched or read.
        """
        ids = np.asarray(sample_ids, np.int64)
        if self._plain:
            return self._groups.read(ids)
        if self._reads_groups:
            self._at_hand = dict(zip(ids.tolist(), self._groups.read(ids), strict=True))
            return [self._reading[sample_id] for sample_id in ids.tolist()]
        samples: list[Any] = [None] * len(ids)
        order = np.argsort(ids, kind="stable")
        for position, sample_id in zip(order.tolist(), ids[order].tolist(), strict=True):
            samples[position] = self._reading[sample_id]
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "max_open_shards": self._max_open_shards,
            "deadline_seconds": self._deadline_seconds,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _get_item(self, sample_id: int, retry: int = 0) -> Any:
        """Stands in for the dataset's own: each sample at hand is given out once."""
        if sample_id in self._at_hand:
            return self._at_hand.pop(sample_id)
        return self._groups.read(np.array([sample_id]))[0]

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


def _is_stock(thing: Any, kind: type, *methods: str) -> bool:
    """Whether these methods of an object are those of a class, not of a subclass or its own."""
    return all(
        getattr(type(thing), name, None) is getattr(kind, name) and name not in vars(thing)
        for name in methods
    )


def _reading_through(files: OpenShards, shard_id: int, shard: Reader) -> Reader:
    """A shard's reader whose raw reads go through open files, if it has the stock MDS ones."""
    if not _is_stock(shard, MDSReader, "get_sample_data"):
        return shard
    reader = copy.copy(shard)
    reader.get_sample_data = partial(_read_one, files, shard_id)
    return reader


def _read_one(files: OpenShards, shard_id: int, row: int) -> bytes:
    return files.read(shard_id, np.array([row]))[0]


def _decoders(shards: Sequence[Reader]) -> list[SampleDecoder | None]:
    """(num_shards,) decoders, None for what is not read as stock MDS; equal columns share one."""
    made: dict[Any, SampleDecoder] = {}
    decoders: list[SampleDecoder | None] = []
    for shard in shards:
        stock = "__getitem__", "get_item", "get_sample_data", "decode_sample"
        if not _is_stock(shard, MDSReader, *stock):
            decoders.append(None)
            continue
        columns = shard.column_names, shard.column_sizes, shard.column_encodings
        key = tuple(map(tuple, columns))
        if key not in made:
            codecs = [_get_coder(encoding) for encoding in shard.column_encodings]
            made[key] = SampleDecoder(shard.column_names, shard.column_sizes, codecs)
        decoders.append(made[key])
    return decoders
