"""The schedule of a run: lanes, epochs, batches, slots of each stratum, how the pool fills."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.saved import Saved
from slap_stream.errors import AlignmentError, ConfigError
from slap_stream.selection.order import ShardTable
from slap_stream.selection.policies.registry import make_policy
from slap_stream.selection.state import Lookup
from slap_stream.types import FloatArray, IntArray, RowStore, State

# Batches, beyond the lookahead, for which a trained sample's loss is still accepted.
FEEDBACK_PATIENCE = 16
# Parts of an epoch for each candidate of a lane, where the number of batches is not known in
# advance.
PARTS_PER_CANDIDATE = 2**20


def steps_of_epoch(num_candidates: int, global_batch: int, keep: float) -> int:
    """floor(keep * N / B), with `keep` taken as the decimal number that was written."""
    return int(Fraction(repr(float(keep))) * num_candidates // global_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanePlan:
    """What all lanes of a run have in common.

    A pass over the candidates is divided into equal parts, and a batch moves every lane on by the
    same number of them, so that lanes of unequal size end together. With a fixed `keep` a part is
    a batch; with "auto", or as many steps as full data has, parts are fine, and a batch takes the
    more of them the less is kept.

    An epoch is one pass, or as many steps as full data has: then it ends within a later pass, as
    far as what is pruned has made room for.

    Attributes:
        table: The dataset's shards.
        store: Embeddings, lengths, features and sources by sample id.
        config: Settings.
        num_lanes: Lanes of the run.
        batch_size: Samples of a lane batch.
        parts: Parts of a pass.
        passes: Passes that an epoch may begin.
    """

    table: ShardTable
    store: RowStore
    config: SlapConfig
    num_lanes: int
    batch_size: int
    parts: int
    passes: int = 1

    @property
    def by_steps(self) -> bool:
        """Whether an epoch ends after so many steps, not with the candidates."""
        return self.config.steps == "full"

    @property
    def repeats(self) -> bool:
        """Whether an epoch may offer a sample more than once."""
        return self.passes > 1 or self.table.max_occurrences > 1

    @property
    def least_candidates(self) -> int:
        """Candidates of the smallest lane, those of all passes."""
        return self.table.num_candidates // self.num_lanes * self.passes

    @property
    def _fine(self) -> bool:
        return self.config.keep == "auto" or self.by_steps

    @property
    def least_stride(self) -> int:
        """Parts of a batch when everything is kept: the fewest that hold a batch in any lane."""
        return self.batch_size * PARTS_PER_CANDIDATE if self._fine else 1

    @property
    def max_steps(self) -> int:
        """Batches of an epoch; the most there can be, where their number is not known."""
        return self.parts // self.least_stride

    def stride(self, keep: float) -> int:
        """Parts that a batch takes while this fraction is kept."""
        return int(self.least_stride / keep) if self._fine else 1

    def after(self, part: int, keep: float) -> int:
        """Where the epoch is after a batch; what is too little of a pass for another one goes with
        it, if the epoch ends there."""
        end = part + self.stride(keep)
        return end if self.by_steps or self.parts - end >= self.least_stride else self.parts

    def steps_left(self, step: int, part: int, keep: float) -> int:
        """Batches from here on, if `keep` stays."""
        if self.by_steps:
            return self.max_steps - step
        return -(-(self.parts - part) // self.stride(keep))

    def is_over(self, step: int, part: int) -> bool:
        """Whether an epoch of so many batches, which have taken it so far, has no other."""
        return step >= self.max_steps if self.by_steps else part >= self.parts

    def done(self, step: int, part: int) -> float:
        """Share of an epoch that is over then, in [0, 1]."""
        return step / self.max_steps if self.by_steps else part / self.parts

    @property
    def pool_size(self) -> int:
        """Candidates in a lane's pool.

        That is `pool_batches` batches, or twice a step's intake where a small `keep` makes that
        more; and never more than the largest lane has, unless a step takes more than a pass.
        """
        largest = -(-self.table.num_candidates // self.num_lanes)
        everything = largest * self.passes
        intake = self.leaving_most(self.config.keep_least, everything)
        usual = min(largest, self.config.advanced.pool_batches * self.batch_size)
        return min(everything, max(usual, 2 * intake))

    def leaving_most(self, keep: float, candidates: int) -> int:
        """Most candidates that leave a lane with so many at a batch."""
        return -(-candidates * self.stride(keep) // (self.parts * self.passes))

    @property
    def columns(self) -> int:
        """Columns of a design row."""
        return 2 + len(self.store.feature_names) + self.store.shape[1]

    @property
    def patience(self) -> int:
        """Batches for which a trained sample's loss is accepted after it was composed."""
        ahead = self.config.lookahead + self.config.length_grouping - 1
        return ahead + max(FEEDBACK_PATIENCE, 2 * self.config.probe_every)

    def _passed(self, part: int, candidates: int) -> int:
        """Candidates, of so many in all passes, that have left a lane's pool here."""
        return part * candidates // (self.parts * self.passes)

    def offered_before(self, step: int, part: int, keep: float, candidates: int) -> int:
        """Candidates that a lane with so many in all passes was offered when it composes a batch
        here.

        The pool is filled first, then kept level, and drained last: with the candidates, or towards
        where the epoch's last step will be if `keep` stays.
        """
        most = candidates
        if self.by_steps:
            most = self._passed(part + (self.max_steps - step) * self.stride(keep), candidates)
        return min(candidates, most, self.pool_size + self._passed(part, candidates))

    def pooled_after(self, step: int, part: int, end: int, keep: float, candidates: int) -> int:
        """Candidates left in the pool after the batch from here to `end`, before a refill."""
        offered = self.offered_before(step, part, keep, candidates)
        return offered - self._passed(end, candidates)


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
    check_lanes(num_lanes, batch_size=batch_size, world_size=world_size)
    global_batch = batch_size * world_size
    if store.shape[0] != table.num_samples:
        raise AlignmentError(
            f"embeddings must have one row per sample, got {store.shape[0]} rows for "
            f"{table.num_samples} samples; make them again for this dataset."
        )
    keep, by_steps = config.keep_least, config.steps == "full"
    # As many as all candidates make, whatever is kept of each pass.
    steps = steps_of_epoch(table.num_candidates, global_batch, 1.0 if by_steps else keep)
    if not steps:
        name = "keep_min * " if config.keep == "auto" else "keep * "
        wanted, given = ("", "") if by_steps else (name, f"{keep} * ")
        raise ConfigError(
            f"{wanted}candidates must fill a global batch of {global_batch}, got {given}"
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
        # Those of the smallest lane, so that everyone has a batch left at every batch.
        parts=PARTS_PER_CANDIDATE * (table.num_candidates // num_lanes)
        if config.keep == "auto" or by_steps
        else steps,
        passes=math.ceil(1 / Fraction(repr(keep))) if by_steps else 1,
    )


def check_lanes(num_lanes: int, *, batch_size: int, world_size: int) -> None:
    """Refuse lanes that do not fit batch and ranks, whatever the data.

    Raises:
        ConfigError: If they do not.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive whole number, got {batch_size!r}.")
    if num_lanes % world_size:
        raise ConfigError(
            f"num_lanes must be a multiple of the world size {world_size}, got {num_lanes}; each "
            "rank hosts as many lanes as the others."
        )
    if batch_size * world_size % num_lanes:
        raise ConfigError(
            f"the global batch must be divisible by num_lanes, got {batch_size} * {world_size} "
            f"samples and {num_lanes} lanes; each lane composes an equal part of it."
        )


def check_plan(
    shard_sizes: IntArray,
    shard_counts: IntArray,
    store: RowStore,
    config: SlapConfig,
    *,
    batch_size: int,
    world_size: int,
) -> None:
    """Refuse, before a sampler is made, what it would refuse of a dataset.

    Args:
        shard_sizes: (num_shards,) as of `SlapSampler`.
        shard_counts: (num_shards,) likewise.
        store: The dataset's embeddings.
        config: Settings.
        batch_size: Samples of a rank's batch.
        world_size: Ranks.

    Raises:
        ConfigError: As of `plan_run`, or if the policy lacks a column.
        AlignmentError: As of `plan_run`.
    """
    make_policy(config, store.feature_names)
    plan_run(
        ShardTable.of(shard_sizes, shard_counts),
        store,
        config,
        num_lanes=world_size if config.num_lanes is None else config.num_lanes,
        batch_size=batch_size,
        world_size=world_size,
    )


@dataclass(kw_only=True, slots=True)
class LaneProgress:
    """How far a lane is in its epoch.

    Attributes:
        num_strata: Strata.
        epoch: Epoch.
        step: Batches composed in it.
        part: Parts that are done of its passes.
        before: The same before the last batch.
        over: Whether it has no other batch.
        unusable_trained: Of the samples composed into batches, those that could not be used.
        unusable_pooled: Candidates withdrawn from the pool because they could not be used.
        offered: (num_strata,) candidates offered so far.
        trained: (num_strata,) samples composed into batches so far.
        pruned: (num_strata,) candidates pruned so far.
        worth: (num_strata,) sum over trained and pruned ones of the probability that the
            candidate was not dispensable.
    """

    num_strata: int
    epoch: int = 0
    step: int = 0
    part: int = 0
    before: int = 0
    over: bool = False
    unusable_trained: int = 0
    unusable_pooled: int = 0
    offered: IntArray = field(init=False)
    trained: IntArray = field(init=False)
    pruned: IntArray = field(init=False)
    worth: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.begin(self.epoch)

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        self.step = self.part = self.before = 0
        self.over = False
        self.unusable_trained = self.unusable_pooled = 0
        self.offered, self.trained, self.pruned = np.zeros((3, self.num_strata), np.int64)
        self.worth = np.zeros(self.num_strata)

    def advance(self, part: int, plan: LanePlan) -> None:
        """A batch has been composed; the epoch is now at this part."""
        self.step += 1
        self.before, self.part = self.part, part
        self.over = plan.is_over(self.step, part)

    def by_stratum(self, stratum: IntArray) -> IntArray:
        """(num_strata,) how many of (n,) strata are each."""
        return np.bincount(stratum, minlength=self.num_strata)

    def state_dict(self) -> State:
        """All of it."""
        return {name: getattr(self, name) for name in (*_COUNTERS, "over")} | {
            name: getattr(self, name).copy() for name in (*_COUNTS, "worth")
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved state."""
        for name in _COUNTERS:
            setattr(self, name, state.whole(name))
        self.over = state.flag("over")
        for name in _COUNTS:
            setattr(self, name, state.wholes(name, self.num_strata))
        self.worth = state.numbers("worth", self.num_strata, least=0.0)


_COUNTERS = ("epoch", "step", "part", "before", "unusable_trained", "unusable_pooled")
_COUNTS = ("offered", "trained", "pruned")
