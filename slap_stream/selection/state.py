"""Checks that a saved state belongs to the run that it is loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.saved import Saved
from slap_stream.errors import ConfigError, StateError
from slap_stream.selection.order import ShardTable
from slap_stream.types import Float32Array, IntArray, RowStore

# What a fingerprint is taken of: a few rows at a few places.
_ROWS_LOOKED_AT, _PLACES_LOOKED_AT = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What the parts of a saved lane refer to and do not hold.

    Attributes:
        num_samples: Samples in the dataset.
        num_strata: Strata.
        rows_of: Gives (n, columns) what the lane keeps of the design rows of (n,) sample ids.
    """

    num_samples: int
    num_strata: int
    rows_of: Callable[[IntArray], Float32Array]


def describe_run(
    table: ShardTable, store: RowStore, *, embeddings: str, global_batch: int, num_lanes: int
) -> dict[str, Any]:
    """What must be the same for a state to be taken over; the world size is free.

    Args:
        table: The dataset's shards.
        store: Its embeddings.
        embeddings: Their `fingerprint`.
        global_batch: Samples of a batch over all ranks.
        num_lanes: Lanes over all ranks.
    """
    shards = np.stack([table.sizes, table.counts]).tobytes()
    return {
        "num_samples": table.num_samples,
        "num_candidates": table.num_candidates,
        "shards": hashlib.sha256(shards).hexdigest()[:16],
        "embedding_dim": store.shape[1],
        "embeddings": embeddings,
        "feature_names": list(store.feature_names),
        "source_names": list(store.source_names),
        "global_batch": global_batch,
        "num_lanes": num_lanes,
    }


def fingerprint(store: RowStore, num_samples: int) -> str:
    """Digest of some of the rows of (num_samples,) samples; other embeddings of the same samples
    make other batches."""
    digest = hashlib.sha256()
    for start in np.linspace(0, max(0, num_samples - _ROWS_LOOKED_AT), _PLACES_LOOKED_AT):
        first = int(start)
        rows = store.read(first, min(first + _ROWS_LOOKED_AT, num_samples))
        for column in (rows.embedding, rows.feature):
            digest.update(np.ascontiguousarray(column, np.float32).tobytes())
    return digest.hexdigest()[:16]


def check_ranks_agree(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks that were not given the same run: they would train on samples twice.

    Args:
        descriptions: What each rank says of its settings and data, by rank.

    Raises:
        ConfigError: If they differ; the message lists the differences to rank 0.
    """
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        differences = [
            f"{name}: {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if differences:
            raise ConfigError(
                "ranks must be given the same settings and data, got "
                + "; ".join(differences)
                + "; a seed must not depend on the rank."
            )


def check_state(
    state: Saved,
    *,
    run: dict[str, Any],
    config: SlapConfig,
    rank: int,
    world_size: int,
) -> tuple[int, list[Saved]]:
    """Compare a state with the run.

    Args:
        state: What a sampler's `state_dict` gave, of this version.
        run: What `describe_run` says of the run.
        config: Settings of the run.
        rank: This rank.
        world_size: Ranks.

    Returns:
        The number of lanes to go on with, the saved one, unless the config asks for another; and
        this rank's saved lanes, in order.

    Raises:
        StateError: If the state is of another config, dataset or batch size, or lacks lanes of this
            rank; the message lists the differences.
    """
    saved, settings = state.plain_part("run"), state.plain_part("config")
    saved_lanes = state.part("run").whole("num_lanes", least=1)
    if config.num_lanes is None:
        # Not asked for, so the run's own number of lanes stays what it was.
        run, settings["num_lanes"] = {**run, "num_lanes": saved_lanes}, None
    differences = config.differences(settings) + [
        f"{name}: {saved.get(name)!r} -> {run[name]!r}"
        for name in run
        if saved.get(name) != run[name]
    ]
    num_lanes = int(run["num_lanes"])
    each = num_lanes // world_size
    wanted = range(rank * each, (rank + 1) * each)
    theirs = {lane.whole("lane"): lane for lane in state.parts("lanes")}
    # One by one: a number that was changed may name more lanes than fit into memory.
    if num_lanes % world_size or not all(lane in theirs for lane in wanted):
        differences.append(
            f"lanes: {sorted(theirs)} of {num_lanes} -> [{wanted.start}, {wanted.stop}) of rank "
            f"{rank} in {world_size}"
        )
    if differences:
        cure = ""
        if saved.get("global_batch") != run["global_batch"]:
            cure = (
                f" On {world_size} ranks give each a batch_size of the saved global_batch / "
                f"{world_size}."
            )
        raise StateError(
            "state must belong to this run, got one that differs (saved -> current) in "
            + "; ".join(dict.fromkeys(differences))
            + "."
            + cure
        )
    return num_lanes, [theirs[lane] for lane in wanted]
