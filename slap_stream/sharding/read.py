"""Raw samples of MDS shards through files that stay open."""

from __future__ import annotations

import os
import struct
import weakref
from collections import OrderedDict
from time import monotonic
from typing import Any

from slap_stream.errors import ShardError
from slap_stream.sharding.cache import ShardCache

REOPENS = 3


class OpenShards:
    """A bounded number of open shard files, least recently used closed first.

    Positioned reads, not memory maps: as fast here, but a file that is cut short under a map kills
    the process, and mapped pages count as memory of every worker that reads them.

    Holds file descriptors only, which survive a fork and the eviction of their file.

    Args:
        shards: (num_shards,) streaming's readers.
        cache: Fetches a shard that is not there, or not whole.
        max_open: Files kept open.
        deadline_seconds: Time that a missing shard may take to arrive.
    """

    def __init__(
        self, shards: list[Any], cache: ShardCache, *, max_open: int, deadline_seconds: float
    ) -> None:
        self._shards = shards
        self._cache = cache
        self._max_open = max_open
        self._deadline_seconds = deadline_seconds
        self._files: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)

    def read(self, shard_id: int, index: int) -> bytes:
        """One sample's bytes.

        Args:
            shard_id: Which shard.
            index: Position of the sample in the shard.

        Raises:
            ShardError: If the shard cannot be fetched, or its file ends too early.
        """
        file = self._files.get(shard_id)
        if file is None:
            file = self._open(shard_id)
        else:
            self._files.move_to_end(shard_id)
        bounds = os.pread(file, 8, 4 + 4 * index)
        if len(bounds) == 8:
            begin, end = struct.unpack("<II", bounds)
            data = os.pread(file, end - begin, begin)
            if len(data) == end - begin:
                return data
        os.close(self._files.pop(shard_id))
        raise ShardError(
            f"shard {shard_id} must keep its size while it is read, got a file that ends before "
            f"sample {index}; something else wrote to it."
        )

    def _open(self, shard_id: int) -> int:
        file = self._open_whole(shard_id)
        for _ in range(REOPENS):
            if file is not None:
                break
            # More than once, since `cache_limit` may evict the shard before it is opened.
            self._cache.ensure(shard_id, monotonic() + self._deadline_seconds)
            file = self._open_whole(shard_id)
        if file is None:
            raise ShardError(
                f"shard {shard_id} must stay on local disk until it is opened, got it evicted "
                f"{REOPENS} times; raise cache_limit."
            )
        if len(self._files) >= self._max_open:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard_id] = file
        return file

    def _open_whole(self, shard_id: int) -> int | None:
        """Descriptor of the shard's file, or None if it is missing or not of its full size."""
        info = self._shards[shard_id].raw_data
        try:
            file = os.open(self._cache.directory(shard_id) / info.basename, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size == info.bytes:
            return file
        os.close(file)
        return None


def _close_all(files: OrderedDict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
