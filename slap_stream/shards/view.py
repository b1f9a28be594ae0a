"""A dataset as samples by id, for torch's DataLoader and for the probe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from slap_stream.shards.cache import ShardCache
from slap_stream.shards.decode import SampleDecoder
from slap_stream.shards.encodings import codec_of
from slap_stream.shards.library import (
    MDSReader,
    Reader,
    StreamingDataset,
    without_process_state,
)
from slap_stream.shards.read import OpenShards, SampleGroups
from slap_stream.types import IntArray


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
    """

    def __init__(self, dataset: StreamingDataset) -> None:
        # Kept, since collecting it would release its local directories to other datasets.
        self._dataset = dataset
        self._cache = ShardCache(dataset)
        shards = dataset.shards
        files = OpenShards(shards, self._cache)
        self._reading = without_process_state(dataset)
        self._reading.prepare_shard = self._prepare_shard
        self._reading.shards = [
            _reading_through(files, shard_id, shard) for shard_id, shard in enumerate(shards)
        ]
        sizes = np.asarray(dataset.samples_per_shard, np.int64)
        # Bound before it is replaced below.
        read_one = self._reading.get_item
        self._groups = SampleGroups(sizes, _decoders(shards), files, read_one)
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
            ShardError: If a shard cannot be fetched or read; a DamagedShardError if it is damaged.
        """
        ids = np.asarray(sample_ids, np.int64)
        if self._plain:
            return self._groups.read(ids)
        if self._reads_groups:
            self._at_hand = dict(zip(ids.tolist(), self._groups.read(ids), strict=True))
        return [self._reading[sample_id] for sample_id in ids.tolist()]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (without_process_state(self._dataset),)

    def _get_item(self, sample_id: int, retry: int = 0) -> Any:
        """Stands in for the dataset's own: each sample at hand is given out once."""
        if sample_id in self._at_hand:
            return self._at_hand.pop(sample_id)
        return self._groups.read(np.array([sample_id]))[0]

    def _prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Stands in for the dataset's own, which leaves a failed shard in preparation for ever."""
        self._cache.ensure(int(shard_id))


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
    reader.get_sample_data = lambda row: files.read(shard_id, np.array([row]))[0]
    return reader


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
            codecs = list(map(codec_of, shard.column_encodings))
            made[key] = SampleDecoder(shard.column_names, shard.column_sizes, codecs)
        decoders.append(made[key])
    return decoders
