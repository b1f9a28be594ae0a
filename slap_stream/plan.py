"""How a run is cut into lanes, epochs and batches, and how a lane's pool fills and drains."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.errors import AlignmentError, ConfigError
from slap_stream.order import ShardTable
from slap_stream.types import IntArray, RowStore

# Batches, beyond the lookahead, for which a trained sample's loss is still accepted.
FEEDBACK_PATIENCE = 16


def steps_of_epoch(num_candidates: int, global_batch: int, keep: float) -> int:
    """floor(keep * N / B), with `keep` taken as the decimal number that was written."""
    return int(Fraction(repr(float(keep))) * num_candidates // global_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanePlan:
    """What all lanes of a run have in common.

    Attributes:
        table: The dataset's shards.
        store: Embeddings, lengths, features and sources by sample id.
        config: Settings.
        num_lanes: Lanes of the run.
        batch_size: Samples of a lane batch.
        steps: Batches of an epoch.
    """

    table: ShardTable
    store: RowStore
    config: SlapConfig
    num_lanes: int
    batch_size: int
    steps: int

    @property
    def pool_size(self) -> int:
        """Candidates in a lane's pool.

        That is `pool_batches` batches, or twice a step's intake where a small `keep` makes that
        more; and never more than the largest lane has.
        """
        largest = -(-self.table.num_candidates // self.num_lanes)
        intake = -(-largest // self.steps)
        return min(largest, max(self.config.pool_batches * self.batch_size, 2 * intake))

    @property
    def columns(self) -> int:
        """Columns of a design row."""
        return 2 + len(self.store.feature_names) + self.store.shape[1]

    @property
    def patience(self) -> int:
        """Batches for which a trained sample's loss is accepted after it was composed."""
        return self.config.lookahead + max(FEEDBACK_PATIENCE, 2 * self.config.probe_every)

    def offered_before(self, step: int, candidates: int) -> int:
        """Candidates that a lane with so many was offered when it composes batch `step`.

        The pool is filled first, then kept level, and drained last.
        """
        return min(candidates, self.pool_size + step * candidates // self.steps)

    def pooled_after(self, step: int, candidates: int) -> int:
        """Candidates left in the pool after batch `step`, before the next refill."""
        leaving = (step + 1) * candidates // self.steps
        return self.offered_before(step, candidates) - leaving


def plan_run(
    table: ShardTable,
    store: RowStore,
    config: SlapConfig,
    *,
    num_lanes: int,
    batch_size: int,
    world_size: int,
) -> LanePlan:
    """Cut a run into lanes and batches.

    Args:
        table: The dataset's shards.
        store: Embeddings, lengths, features and sources by sample id.
        config: Settings.
        num_lanes: Lanes of the run.
        batch_size: Samples of a rank's batch.
        world_size: Ranks.

    Raises:
        ConfigError: If lanes, ranks and batch do not fit together, or an epoch is too short.
        AlignmentError: If the store does not have one row per sample.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive whole number, got {batch_size!r}.")
    if num_lanes % world_size:
        raise ConfigError(
            f"num_lanes must be a multiple of the world size {world_size}, got {num_lanes}; each "
            "rank hosts as many lanes as the others."
        )
    global_batch = batch_size * world_size
    if global_batch % num_lanes:
        raise ConfigError(
            f"the global batch must be divisible by num_lanes, got {batch_size} * {world_size} "
            f"samples and {num_lanes} lanes; each lane composes an equal part of it."
        )
    if store.shape[0] != table.num_samples:
        raise AlignmentError(
            f"embeddings must have one row per sample, got {store.shape[0]} rows for "
            f"{table.num_samples} samples; make them again for this dataset."
        )
    steps = steps_of_epoch(table.num_candidates, global_batch, config.keep)
    if not steps:
        raise ConfigError(
            f"keep * candidates must fill a global batch of {global_batch}, got {config.keep} * "
            f"{table.num_candidates}; use a smaller batch or more data."
        )
    if table.max_occurrences > steps:
        raise ConfigError(
            "a sample must not be offered more often than an epoch has batches, got "
            f"{table.max_occurrences} times in {steps} batches; lower `repeat`."
        )
    return LanePlan(
        table=table,
        store=store,
        config=config,
        num_lanes=num_lanes,
        batch_size=global_batch // num_lanes,
        steps=steps,
    )


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a lane is in its epoch.

    Attributes:
        num_strata: Strata.
        epoch: Epoch.
        step: Batches composed in it.
        offered: (num_strata,) candidates offered so far.
        trained: (num_strata,) samples composed into batches so far.
        pruned: (num_strata,) candidates pruned so far.
    """

    num_strata: int
    epoch: int = 0
    step: int = 0
    offered: IntArray = field(init=False)
    trained: IntArray = field(init=False)
    pruned: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self.begin(self.epoch)

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch, self.step = epoch, 0
        self.offered, self.trained, self.pruned = np.zeros((3, self.num_strata), np.int64)

    def by_stratum(self, stratum: IntArray) -> IntArray:
        """(num_strata,) how many of (n,) strata are each."""
        return np.bincount(stratum, minlength=self.num_strata)
