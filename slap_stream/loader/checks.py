"""Refusals before any work is done: settings and data that do not fit together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from slap_stream.config import SlapConfig
from slap_stream.core.checks import require_whole
from slap_stream.embeddings.layout import STORE_NAME
from slap_stream.embeddings.rows import StackedStore
from slap_stream.embeddings.store import open_embeddings
from slap_stream.errors import AlignmentError, ConfigError
from slap_stream.loader.ranks import Ranks
from slap_stream.loader.run_log import RunLog
from slap_stream.remote.urls import is_remote, parse_url
from slap_stream.selection.policies.registry import make_policy
from slap_stream.selection.sampler import SlapSampler
from slap_stream.selection.schedule import check_lanes, check_plan
from slap_stream.selection.state import check_ranks_agree
from slap_stream.shards.settings import (
    DatasetShards,
    dataset_shards,
    index_digests,
    launched_rank,
    launched_ranks,
    min_cache_bytes,
)
from slap_stream.types import IntArray, Position, RowStore


def check_arguments(
    config: Any, num_workers: Any, prefetch_factor: Any, collate_fn: Any
) -> SlapConfig:
    """Refuse arguments of another kind than they must be; the settings.

    Raises:
        ConfigError: If one is, or the policy is not known.
    """
    if not isinstance(config, SlapConfig | None):
        raise ConfigError(
            f"config must be a SlapConfig, got {config!r}; write config=SlapConfig(keep=0.7)."
        )
    require_whole("num_workers", num_workers, 0)
    if prefetch_factor is not None:
        require_whole("prefetch_factor", prefetch_factor, 1)
    if collate_fn is not None and not callable(collate_fn):
        raise ConfigError(
            f"collate_fn must be a function of a list of samples, got {collate_fn!r}."
        )
    settings: SlapConfig = config or SlapConfig()
    # The sampler makes it again, for the columns at hand: here a bad policy is refused before ranks
    # and embeddings are waited for.
    make_policy(settings)
    return settings


def meet_ranks(
    ranks: Ranks,
    sampler: SlapSampler,
    index_digests: Sequence[str],
    log: RunLog,
    needs_log: bool,
) -> int:
    """Check that all ranks were given the same run, and settle who keeps its log.

    Args:
        ranks: Who takes part; every one calls it.
        sampler: This rank's.
        index_digests: Of each stream's index.
        log: This rank's.
        needs_log: Whether a run whose log cannot be written must not begin.

    Returns:
        Most shards that a rank needs at a time.

    Raises:
        ConfigError: If runs differ, or the log is needed and a rank cannot write it.
    """
    run = sampler.config.to_dict() | sampler.describe() | {"index_digests": index_digests}
    mine = json.dumps([run, sampler.shards_at_hand, log.started, log.problem]).encode()
    everyones = ranks.gather(mine, Position(epoch=sampler.epoch, step=sampler.step, digest=0))
    runs, needs, starts, problems = zip(*map(json.loads, everyones), strict=True)
    check_ranks_agree(runs)
    log.settle(starts, problems, required=needs_log)
    return int(max(needs))


def batch_size_of(batch_size: int | None, dataset: Any) -> int:
    """The batch size that was given, or else the dataset's.

    Raises:
        ConfigError: If neither was given, or both and different ones.
    """
    theirs: int | None = dataset.batch_size
    batch_size = None if batch_size is None else require_whole("batch_size", batch_size, 1)
    if batch_size is None:
        if theirs is None:
            raise ConfigError(
                "batch_size must be given to the loader or to the dataset, got neither; write "
                "SlapDataLoader(dataset, batch_size=32, ...)."
            )
        return theirs
    if theirs is not None and theirs != batch_size:
        raise ConfigError(
            f"batch_size must be the dataset's, {theirs}, got {batch_size!r}; give both the same, "
            "or the dataset's alone."
        )
    return batch_size


def prefetch_within(num_workers: int, prefetch_factor: int | None, lookahead: int) -> int | None:
    """Batches that each worker works ahead, None without workers.

    Raises:
        ConfigError: If they would work on batches that are not composed yet.
    """
    if not num_workers:
        return None
    if prefetch_factor is None:
        # All but one, which is composed in the background.
        prefetch_factor = max(1, min(2, (lookahead - 1) // num_workers))
    if prefetch_factor * num_workers > lookahead:
        raise ConfigError(
            f"prefetch_factor * num_workers must be at most lookahead = {lookahead}, got "
            f"{prefetch_factor} * {num_workers}; raise SlapConfig(lookahead=...)."
        )
    return prefetch_factor


def check_batches(
    config: SlapConfig,
    batch_size: int,
    *,
    world_size: int,
    num_workers: int,
    prefetch_factor: int | None,
) -> None:
    """Refuse batches that no data could be composed or read ahead in, before a loader is made.

    Raises:
        ConfigError: If lanes, ranks and batch do not fit together, or workers and lookahead.
    """
    prefetch_within(num_workers, prefetch_factor, config.lookahead)
    num_lanes = world_size if config.num_lanes is None else config.num_lanes
    check_lanes(num_lanes, batch_size=batch_size, world_size=world_size)


def check_run(
    dataset: Any, embeddings: Any, config: SlapConfig, batch_size: int, *, world_size: int
) -> None:
    """Refuse a dataset and embeddings that a loader would refuse, before one is made.

    Args:
        dataset: As for `SlapDataLoader`, as all that follows.
        embeddings: Likewise.
        config: Settings.
        batch_size: Samples in a rank's batch.
        world_size: Processes.

    Raises:
        ConfigError: If settings do not fit the dataset, which may be too small.
        AlignmentError: If embeddings and dataset do not describe the same samples.
    """
    shards = dataset_shards(dataset)
    store = aligned_embeddings(dataset, embeddings, shards, index_digests(dataset))
    check_plan(
        shards.sizes,
        shards.counts,
        store,
        config,
        batch_size=batch_size,
        world_size=world_size // (dataset.replication or 1),
    )


def aligned_embeddings(
    dataset: Any, embeddings: Any, shards: DatasetShards, digests: Sequence[str]
) -> RowStore:
    """The row store that was given, or else the one beside the shards of each stream.

    What of it lies elsewhere is kept beside the stream's local shards.

    Args:
        dataset: The `StreamingDataset`.
        embeddings: As for `SlapDataLoader`.
        shards: Of the dataset.
        digests: (num_streams,) of each stream's index.

    Raises:
        ConfigError: If none was given, and a stream's shards lie where none can be looked for.
        TypeError: If it is no such thing.
        AlignmentError: If there is no finished store, or stores do not fit together or the dataset.
        RemoteError: If it cannot be reached.
    """
    if embeddings is None:
        embeddings = [_beside(stream) for stream in dataset.streams]
    # Without a remote the shards are their owner's, and nothing is put beside them.
    places = [s.local if s.remote not in (None, s.local) else None for s in dataset.streams]
    store = open_embeddings(embeddings, places)
    check_alignment(store, digests, shards.sizes, shards.stream_of_shard)
    return store


def _beside(stream: Any) -> str | Path:
    local = Path(stream.local, stream.split or "", STORE_NAME)
    if local.exists() or stream.remote is None:
        return local
    if is_remote(stream.remote):
        return str(parse_url("remote", stream.remote).below(stream.split or "").below(STORE_NAME))
    if "://" in stream.remote:
        raise ConfigError(
            f"embeddings must be given for shards in {stream.remote!r}, got None; copy "
            f"{STORE_NAME} to a local disk, or to an object store that it can be fetched from."
        )
    return Path(stream.remote, stream.split or "", STORE_NAME)


def check_launched(dataset: Any) -> None:
    """Refuse a dataset that takes this process for another than torch.distributed does.

    Streaming asks the environment, and only there. Lightning's own launcher sets `WORLD_SIZE`
    without `RANK`: every process is then the first to its dataset, and prepares what one should.

    Raises:
        ConfigError: If it does.
    """
    told, ranks = launched_rank(dataset), launched_ranks(dataset)
    connected = dist.is_available() and dist.is_initialized()
    if connected and ranks > 1 and told != dist.get_rank():
        raise ConfigError(
            f"RANK must be the process's in torch.distributed, {dist.get_rank()}, when its dataset "
            f"is made, got {told} of {ranks}; start the processes with torchrun, or set RANK, "
            "LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE before."
        )


def check_alignment(
    store: RowStore, digests: Sequence[str], sizes: IntArray, stream_of_shard: IntArray
) -> None:
    """Refuse embeddings that do not describe a dataset's samples.

    Args:
        store: The embeddings.
        digests: Of each stream's index.
        sizes: (num_shards,) samples of each shard.
        stream_of_shard: (num_shards,) stream of each.

    Raises:
        AlignmentError: If digests or counts differ.
    """
    samples = np.bincount(stream_of_shard, weights=sizes, minlength=len(digests)).astype(int)
    if isinstance(store, StackedStore) and len(store.stores) == len(digests):
        parts: Sequence[RowStore] = store.stores
    elif len(digests) == 1 or not hasattr(store, "verify"):
        parts, digests, samples = [store], [digests[0]], np.array([samples.sum()])
    else:
        raise AlignmentError(
            f"embeddings must be a list of {len(digests)} stores, one per stream in their order, "
            "got one store."
        )
    for part, digest, count in zip(parts, digests, samples, strict=True):
        verify = getattr(part, "verify", None)
        if verify is not None:
            verify(digest, int(count))
        elif part.shape[0] != count:
            raise AlignmentError(
                f"embeddings must have one row per sample, got {part.shape[0]} rows for {count} "
                "samples; make them again for this dataset."
            )


def embedded_hashes(store: RowStore, stream_of_shard: IntArray) -> dict[int, str]:
    """What embeddings say of the content of shards of which the dataset's index says nothing.

    Args:
        store: Embeddings that are aligned with the dataset.
        stream_of_shard: (num_shards,) stream of each shard, ascending.
    """
    shards = np.bincount(stream_of_shard).tolist()
    parts = store.stores if isinstance(store, StackedStore) else [store]
    if len(parts) != len(shards):
        return {}
    told = [
        getattr(part, "shard_hashes", ()) or ("",) * count
        for part, count in zip(parts, shards, strict=True)
    ]
    return {shard_id: one for shard_id, one in enumerate(chain.from_iterable(told)) if one}


def check_cache_limit(dataset: Any, shards_at_hand: int, ranks_on_node: int) -> None:
    """Refuse a `cache_limit` that cannot hold what the lanes of a node work on at a time.

    Raises:
        ConfigError: If it is smaller; says what it takes.
    """
    if dataset.cache_limit:
        needed = min_cache_bytes(dataset, shards_at_hand, ranks_on_node)
        if dataset.cache_limit < needed:
            raise ConfigError(
                f"cache_limit must be at least {needed} bytes, got {dataset.cache_limit!r}: the "
                f"lanes of each rank, of which this node has {ranks_on_node}, work on "
                f"{shards_at_hand} shards at a time; raise it, or lower num_lanes or "
                "shards_per_block."
            )
