"""Samples by id, read and decoded a shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from slap_stream.sharding.cache import ShardCache
from slap_stream.sharding.decode import SampleDecoder
from slap_stream.sharding.read import OpenShards
from slap_stream.types import IntArray


class SampleGroups:
    """Reads samples of many shards, each shard's together.

    Args:
        sizes: (num_shards,) samples in each shard.
        decoders: (num_shards,) of each shard, None where the shard has a reader of its own.
        files: The shards' files.
        cache: Is told which shards are in use.
        read_one: Reads a sample, by id, of a shard without decoder.
    """

    def __init__(
        self,
        sizes: IntArray,
        decoders: Sequence[SampleDecoder | None],
        files: OpenShards,
        cache: ShardCache,
        read_one: Callable[[int], Any],
    ) -> None:
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._decoders, self._files, self._cache = decoders, files, cache
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
                found += decoder(self._files.read(shard_id, rows))
                self._cache.touch(shard_id)
        samples: list[Any] = [None] * len(found)
        for position, sample in zip(order.tolist(), found, strict=True):
            samples[position] = sample
        return samples
