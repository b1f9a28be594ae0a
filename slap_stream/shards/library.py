"""All that we use of mosaicml-streaming, its private names included; its only importer.

Streaming keeps one state per shard in shared memory, guarded by a file lock, so that ranks and
workers of a node share downloads. The functions below read and change it under streaming's names.
CONTRIBUTING.md lists the private ones, and tests/test_private_names.py says which a new version of
streaming no longer has.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.compression import (
    brotli,
    compress,
    decompress,
    get_compression_extension,
    is_compression,
    snappy,
    zstd,
)
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader, reader_from_json
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import (
    _get_coder as coder_of,
)
from streaming.base.format.mds.encodings import get_mds_encodings

__all__ = [
    "MDSReader",
    "Reader",
    "StreamingDataset",
    "coder_of",
    "compress",
    "decompress",
    "get_compression_extension",
    "get_mds_encodings",
    "is_compression",
    "reader_from_json",
]

REMOTE, PREPARING, LOCAL = map(int, (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL))

# What `decompress` raises for bytes that are not what the compressor wrote.
UNPACK_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    brotli.error,
    snappy.UncompressError,
    zstd.Error,
)

# Attributes of a dataset that belong to one process or one iteration: locks and threads cannot be
# pickled, and a copy that still had `_locals_shm` would release the original's directories when
# it is collected. All but that one are made when they are first needed.
PROCESS_BOUND = ("_locals_shm", "_cache_filelock", "_executor", "_event", "_iterator")


def shard_states(dataset: Any) -> NDArray[Any]:
    """(num_shards,) REMOTE, PREPARING or LOCAL, in shared memory; write under `cache_lock` only."""
    states: NDArray[Any] = dataset._shard_states.numpy()
    return states


def access_times(dataset: Any) -> NDArray[Any]:
    """(num_shards,) nanoseconds of last use, in shared memory; eviction takes the least."""
    times: NDArray[Any] = dataset._shard_access_times.numpy()
    return times


def cache_lock(dataset: Any) -> FileLock:
    """The lock of the node's shard states, for one use: it is neither shared nor pickled."""
    return FileLock(dataset._cache_filelock_path)


def fetch_lock(dataset: Any, shard_id: int) -> FileLock:
    """The lock that our fetcher of a shard holds; its file is there for as long, or longer if the
    process was killed, whose lock the system then frees."""
    return FileLock(f"{dataset._cache_filelock_path}.{shard_id}")


def evict_coldest(dataset: Any) -> None:
    """Throw away the shard used longest ago; needs the lock."""
    dataset._evict_coldest_shard()


def launched_world(dataset: Any) -> Any:
    """Ranks and nodes of the job, as the launcher told the dataset."""
    return dataset._unique_rank_world


def has_stock_state(dataset: Any) -> bool:
    """Whether the dataset was given a state by its own `load_state_dict`."""
    return hasattr(dataset, "_resume_shm")


def own_stream(stream: Any, unpack: Callable[..., None]) -> Any:
    """A copy of a stream, for one thread, that fetches and leaves all checks to others.

    Download clients are not made for several threads, and a failing one throws away its connection.

    Args:
        stream: The dataset's.
        unpack: Takes the place of the stock way to check and unpack a file: (zipped file's info,
            its path, path of the raw file, compression).
    """
    own = copy.copy(stream)
    own._downloader = copy.copy(stream._downloader)
    own.validate_hash = None
    if type(stream)._decompress_shard_part is Stream._decompress_shard_part:
        own._decompress_shard_part = unpack
    return own


def without_process_state(dataset: StreamingDataset) -> StreamingDataset:
    """A copy of a dataset that can be pickled and whose end changes nothing for the original."""
    clone = copy.copy(dataset)
    clone._shared_barrier = copy.copy(dataset._shared_barrier)
    for owner, names in ((clone, PROCESS_BOUND), (clone._shared_barrier, ("lock",))):
        for name in names:
            vars(owner).pop(name, None)
    return clone
