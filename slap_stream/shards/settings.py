"""A `StreamingDataset`'s settings as counts per shard, or a refusal by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.core.files import file_digest, require_inside
from slap_stream.errors import ConfigError
from slap_stream.shards.index import INDEX_NAME, apportion_counts, require_hashes
from slap_stream.shards.library import StreamingDataset, has_stock_state, launched_world
from slap_stream.types import IntArray

logger = logging.getLogger(__name__)

# Settings that order samples, with their defaults: the sampler's order takes their place.
_ORDER_DEFAULTS = {
    "shuffle_algo": "py1e",
    "shuffle_seed": 9176,
    "shuffle_block_size": None,
    "partition_algo": "relaxed",
    "num_canonical_nodes": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetShards:
    """The shards of a dataset, over all its streams.

    Attributes:
        sizes: (num_shards,) samples in each shard.
        counts: (num_shards,) candidates that an epoch offers from each: the streams' proportion,
            repeat, choose, and the dataset's epoch_size.
        stream_of_shard: (num_shards,) index of the stream a shard belongs to, ascending.
    """

    sizes: IntArray
    counts: IntArray
    stream_of_shard: IntArray


def dataset_shards(dataset: Any) -> DatasetShards:
    """A dataset's shards and weights; every setting is honoured, superseded or refused.

    Settings that only order samples (shuffle and its algorithm, seed and block size, partitioning,
    canonical nodes) are superseded by the sampler's order, which is logged if they were set.

    Raises:
        TypeError: If it is no `StreamingDataset`.
        ConfigError: If a setting is refused; the message names it.
        CorpusError: If an index.json names a file outside of its directory, or has hashes that are
            none.
    """
    _refuse(dataset)
    sizes = np.asarray(dataset.samples_per_shard, np.int64).copy()
    stream_of_shard = np.asarray(dataset.stream_per_shard, np.int64).copy()
    counts = np.zeros_like(sizes)
    for stream_id, stream in enumerate(dataset.streams):
        mine = stream_of_shard == stream_id
        counts[mine] = apportion_counts(
            sizes[mine],
            int(stream.choose),
            granularity=int(dataset.sampling_granularity),
            seed=int(dataset.shuffle_seed),
        )
    if not counts.sum():
        raise ConfigError(
            "streams must offer at least one sample per epoch, got 0; raise proportion, repeat, "
            "choose or epoch_size."
        )
    if dataset.sampling_method == "fixed":
        partial = np.flatnonzero(counts % np.maximum(sizes, 1))
        if len(partial):
            raise ConfigError(
                "sampling_method must be 'balanced' unless every shard is offered a whole number "
                f"of times, got 'fixed' and parts of {len(partial)} shards, first "
                f"{partial[:5].tolist()}; which samples fill a part is drawn anew each epoch."
            )
    _log_superseded(dataset)
    return DatasetShards(
        sizes=sizes,
        counts=counts,
        stream_of_shard=stream_of_shard,
    )


def index_digests(dataset: Any) -> list[str]:
    """(num_streams,) SHA-256 of each stream's index.json, to compare with its embeddings'."""
    return [file_digest(Path(stream.local, stream.split, INDEX_NAME)) for stream in dataset.streams]


def launched_rank(dataset: Any) -> int:
    """This process among them, as the launcher told the dataset (`RANK`)."""
    return int(launched_world(dataset).rank)


def launched_ranks(dataset: Any) -> int:
    """Processes of the job, as the launcher told the dataset (`WORLD_SIZE`)."""
    return int(launched_world(dataset).num_ranks)


def processes_per_node(dataset: Any) -> int:
    """Processes of the job on each node, as the launcher told the dataset (`LOCAL_WORLD_SIZE`)."""
    return int(launched_world(dataset).ranks_per_node)


def min_cache_bytes(dataset: Any, num_shards: int, ranks_on_node: int = 1) -> int:
    """Bytes of `cache_limit` with which any `num_shards` shards of each rank of a node fit on its
    disk at a time.

    Args:
        dataset: The `StreamingDataset`.
        num_shards: Shards that a rank must have at hand together: those of two blocks.
        ranks_on_node: Ranks of the node, which share its limit.
    """
    largest = sorted((shard.get_max_size() for shard in dataset.shards), reverse=True)
    indexes = sum(stream.get_index_size() for stream in dataset.streams)
    return int(indexes + min(sum(largest), ranks_on_node * sum(largest[:num_shards])))


def _refuse(dataset: Any) -> None:
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
    if dataset.batching_method != "random":
        raise ConfigError(
            f"batching_method must be 'random', got {dataset.batching_method!r}; strata decide "
            "what a batch holds: give each stream a source of its own instead."
        )
    if has_stock_state(dataset):
        raise ConfigError(
            "dataset must not have been given a state by load_state_dict, got one that has; "
            "load the loader's own state into the loader."
        )
    for shard in dataset.shards:
        for file in (file for pair in shard.file_pairs for file in pair if file):
            require_inside(INDEX_NAME, file.basename)
            require_hashes(f"{INDEX_NAME}, file {file.basename!r},", file.hashes)
    for stream_id, stream in enumerate(dataset.streams):
        local_only = stream.remote in (None, stream.local)
        if dataset.cache_limit and local_only:
            raise ConfigError(
                f"cache_limit must be None for streams without a separate remote, got "
                f"{dataset.cache_limit!r} and stream {stream_id} in {stream.local!r}; streaming "
                "would delete its only copy of the shards."
            )
        if stream.validate_hash:
            begin = int(dataset.shard_offset_per_stream[stream_id])
            end = begin + int(dataset.shards_per_stream[stream_id])
            pairs = (pair for shard in dataset.shards[begin:end] for pair in shard.file_pairs)
            for hashes in (file.hashes for pair in pairs for file in pair if file):
                if stream.validate_hash not in hashes:
                    raise ConfigError(
                        f"validate_hash must be one that the shards were written with "
                        f"({', '.join(sorted(hashes)) or 'none'}), got {stream.validate_hash!r} "
                        f"for stream {stream_id} in {stream.local!r}."
                    )


def _log_superseded(dataset: Any) -> None:
    defaults = {
        **_ORDER_DEFAULTS,
        "predownload": 8 * dataset.batch_size if dataset.batch_size else 64,
    }
    changed = [
        f"{name}={getattr(dataset, name)!r}"
        for name, default in defaults.items()
        if getattr(dataset, name) != default
    ]
    if changed:
        logger.warning(
            "the sampler's order (SlapConfig.seed) and prefetch take the place of the dataset's %s",
            ", ".join(changed),
        )
