"""Raw samples of MDS shards through memory maps that stay open."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import ShardError
from slap_stream.shards.cache import ShardCache
from slap_stream.shards.decode import SampleDecoder, sample_bounds
from slap_stream.types import IntArray

# Files kept open in a process.
MAX_OPEN = 64
REOPENS = 3

_Map = tuple[mmap.mmap, NDArray[np.uint32]]


class OpenShards:
    """A bounded number of mapped shard files, least recently used closed first.

    Maps, not positioned reads: those cost a system call a sample, which is more than all the rest
    of reading a short one. What is read is copied out, so that no sample holds a file open. A file
    that is cut short under a map kills the process that reads what is gone, so its size is looked
    up before each group is read; nothing in streaming changes a shard in place.

    Holds maps only, which survive a fork and the eviction of their file.

    Args:
        shards: (num_shards,) streaming's readers.
        cache: Fetches a shard that is not there, or not whole, and is told which are in use.
    """

    def __init__(self, shards: list[Any], cache: ShardCache) -> None:
        self._shards = shards
        self._cache = cache
        # Each with the (samples + 1,) bounds of its samples, as the file has them.
        self._maps: OrderedDict[int, _Map] = OrderedDict()

    def read(self, shard_id: int, rows: IntArray) -> list[bytes]:
        """Several samples' bytes.

        Args:
            shard_id: Which shard.
            rows: (n,) positions of the samples in the shard.

        Returns:
            (n,) bytes, in the order asked.

        Raises:
            DamagedShardError: If it is not what its index says, also after it was fetched again.
            ShardError: If it cannot be fetched.
        """
        found = self._maps.get(shard_id)
        if found is not None and found[0].size() != len(found[0]):
            # Something else has cut the file: opened anew, it is verified and fetched again.
            del self._maps[shard_id]
            found = None
        if found is None:
            found = self._open(shard_id)
        else:
            self._maps.move_to_end(shard_id)
        data, bounds = found
        self._cache.touch(shard_id)
        begin, end = bounds[rows].tolist(), bounds[rows + 1].tolist()
        return [data[low:high] for low, high in zip(begin, end, strict=True)]

    def verify(self, shard_id: int) -> None:
        """Compare a shard with its index once more, fetch it again if it is damaged, and forget
        the map of what was there before.

        Raises:
            DamagedShardError: As `read`.
            ShardError: Likewise.
        """
        self._cache.ensure(shard_id)
        self._maps.pop(shard_id, None)

    def _open(self, shard_id: int) -> _Map:
        data = self._map_whole(shard_id)
        for _ in range(REOPENS):
            if data is not None:
                break
            # More than once, since `cache_limit` may evict the shard before it is opened.
            self._cache.ensure(shard_id)
            data = self._map_whole(shard_id)
        if data is None:
            raise ShardError(
                f"shard {shard_id} must stay on local disk until it is opened, got it evicted "
                f"{REOPENS} times; raise cache_limit."
            )
        if len(self._maps) >= MAX_OPEN:
            self._maps.popitem(last=False)
        samples = self._shards[shard_id].samples
        header = np.frombuffer(data, np.uint32, min(samples + 2, len(data) // 4))
        bounds = sample_bounds(header, samples, len(data), f"shard {shard_id}")
        self._maps[shard_id] = data, bounds
        return data, bounds

    def _map_whole(self, shard_id: int) -> mmap.mmap | None:
        """The shard's file, or None if it is missing or not of its full size."""
        info = self._shards[shard_id].raw_data
        try:
            # Links are followed: whoever has a corpus on several disks has made them. Names that
            # lead elsewhere were refused when the run began.
            with open(self._cache.directory(shard_id) / info.basename, "rb", 0) as file:
                if os.fstat(file.fileno()).st_size != info.bytes:
                    return None
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None


class SampleGroups:
    """Reads samples of many shards, each shard's together.

    Args:
        sizes: (num_shards,) samples in each shard.
        decoders: (num_shards,) of each shard, None where the shard has a reader of its own.
        files: The shards' files.
        read_one: Reads a sample, by id, of a shard without decoder.
    """

    def __init__(
        self,
        sizes: IntArray,
        decoders: Sequence[SampleDecoder | None],
        files: OpenShards,
        read_one: Callable[[int], Any],
    ) -> None:
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._decoders, self._files = decoders, files
        self._read_one = read_one

    def read(self, ids: IntArray) -> list[Any]:
        """(n,) samples of (n,) sample ids, in the order asked.

        Raises:
            IndexError: If an id is not one of the dataset's.
            ShardError: If a shard cannot be fetched or read.
        """
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        if len(ids) and not (ids[0] >= 0 and ids[-1] < self._ends[-1]):
            wrong = int(ids[0] if ids[0] < 0 else ids[-1])
            raise IndexError(f"sample ids must be in [0, {self._ends[-1]}), got {wrong}.")
        shard_of = np.searchsorted(self._ends, ids, side="right")
        cuts = np.flatnonzero(np.diff(shard_of, prepend=-1, append=-1)).tolist()
        found: list[Any] = []
        for low, high in pairwise(cuts):
            shard_id = int(shard_of[low])
            decoder = self._decoders[shard_id]
            if decoder is None:
                found += map(self._read_one, ids[low:high].tolist())
            else:
                rows = ids[low:high] - self._begins[shard_id]
                found += self._decoded(decoder, shard_id, rows)
        samples: list[Any] = [None] * len(found)
        for position, sample in zip(order.tolist(), found, strict=True):
            samples[position] = sample
        return samples

    def _decoded(self, decoder: SampleDecoder, shard_id: int, rows: IntArray) -> list[Any]:
        data = self._files.read(shard_id, rows)
        try:
            return decoder(data)
        except Exception:
            # A shard is verified once; bytes that have changed since must not count as a bad
            # sample's. Also where it is whole now: another process may have fetched it again.
            self._files.verify(shard_id)
        return decoder(self._files.read(shard_id, rows))
