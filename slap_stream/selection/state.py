"""Checks that a saved state belongs to the run that it is loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError, StateError
from slap_stream.selection.order import ShardTable
from slap_stream.types import RowStore, State

# What a fingerprint is taken of: a few rows at a few places.
_ROWS_LOOKED_AT, _PLACES_LOOKED_AT = 8, 4


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


def require_keys(state: Any, names: Sequence[str]) -> None:
    """Refuse what is no state, before anything of it is taken over.

    Raises:
        StateError: If it is no mapping or lacks one of the names.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"state must be what state_dict gave, got {type(state).__name__}; load a checkpoint."
        )
    missing = [name for name in names if name not in state]
    if missing:
        raise StateError(
            f"state must hold {', '.join(names)}, got none of {', '.join(missing)}; it is of "
            "another version, or was cut."
        )


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
    state: State,
    *,
    version: int,
    run: dict[str, Any],
    config: SlapConfig,
    rank: int,
    world_size: int,
) -> int:
    """Compare a state with the run.

    Args:
        state: What a sampler's `state_dict` gave; arrays may be nested lists.
        version: Version of the state that can be read.
        run: What `describe_run` says of the run.
        config: Settings of the run.
        rank: This rank.
        world_size: Ranks.

    Returns:
        The number of lanes to go on with: the saved one, unless the config asks for another.

    Raises:
        StateError: If the state is of another version, config, dataset or batch size, or lacks
            lanes of this rank; the message lists the differences.
    """
    require_keys(state, ("version", "run", "config", "lanes", "epoch", "refreshes_itself"))
    if state.get("version") != version:
        raise StateError(
            f"version must be {version}, got {state.get('version')!r}; the state was written by "
            "another version of slap_stream."
        )
    saved = state["run"]
    if config.num_lanes is None:
        # Not asked for, so the run's own number of lanes stays what it was.
        run = {**run, "num_lanes": int(saved["num_lanes"])}
        config = replace(config, num_lanes=state["config"].get("num_lanes"))
    differences = config.differences(state["config"]) + [
        f"{name}: {saved.get(name)!r} -> {run[name]!r}"
        for name in run
        if saved.get(name) != run[name]
    ]
    num_lanes = int(run["num_lanes"])
    each = num_lanes // world_size
    wanted = range(rank * each, (rank + 1) * each)
    theirs = {int(lane["lane"]) for lane in state["lanes"]}
    if num_lanes % world_size or not set(wanted) <= theirs:
        differences.append(
            f"lanes: {sorted(theirs)} of {num_lanes} -> {list(wanted)} of rank {rank} in "
            f"{world_size}"
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
    return num_lanes
