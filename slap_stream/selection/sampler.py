"""SlapSampler: this rank's lanes -> batches of sample ids, without torch and streaming."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from slap_stream.config import SlapConfig
from slap_stream.core.linear import single_threaded
from slap_stream.core.saved import Saved
from slap_stream.embeddings.rows import as_row_store
from slap_stream.errors import ConfigError, FeedbackError, StateError
from slap_stream.selection.awaiting import (
    check_feedback,
    check_measurements,
    check_sketches,
    find_questions,
)
from slap_stream.selection.lane import Lane
from slap_stream.selection.metrics import count_lanes, shards_needed
from slap_stream.selection.order import ShardTable
from slap_stream.selection.policies.registry import make_policy
from slap_stream.selection.run import Run
from slap_stream.selection.schedule import plan_run
from slap_stream.selection.state import check_state, describe_run, fingerprint
from slap_stream.types import (
    MISMATCH_COLUMN,
    Float32Array,
    FloatArray,
    IntArray,
    LaneExchange,
    ShardGate,
    State,
)

logger = logging.getLogger(__name__)

STATE_VERSION = 9


class SlapSampler:
    """Composes batches of sample ids while a model trains.

    Iterating yields one epoch of lists of `batch_size` sample ids; breaking off and iterating
    again goes on with the epoch. Feed losses back with `observe` and `update`.

    For one thread at a time. An interrupt, such as Ctrl-C, that ends a call half way leaves the
    sampler half way, too: go on from a state, in a new sampler. (A loader's is called in a thread
    that nothing interrupts.)

    State: the shared model and centroids, this rank's lanes, and what was agreed on at refreshes.

    Args:
        shard_sizes: (num_shards,) samples in each shard; sample ids count through them.
        embeddings: (num_samples, dim), anything with `shape`, `dtype` and row slices (NumPy, a
            memory map, a Zarr array, a virtual one), or an `EmbeddingStore`.
        batch_size: Samples of this rank's batch; the global batch is batch_size * world_size.
        shard_counts: (num_shards,) candidates an epoch offers from each shard; default: its size.
        lengths: (num_samples,) lengths in tokens or characters / 4.
        features: (num_samples, num_features) columns that say something about a sample.
        sources: (num_samples,) source of each sample, counted from 0.
        config: Settings; default `SlapConfig()`.
        rank: This rank.
        world_size: Ranks; must divide the number of lanes.
        gate: Who makes sure that shards are on disk before their candidates are offered; the
            loader's business.
        exchange: Who adds up what the lanes of all ranks have counted; the loader's business.
            Without one a sampler of several ranks waits for `merge`.

    Raises:
        ConfigError: If batch size, lanes and ranks do not fit together, an epoch is too short, or
            the policy is not known or lacks what it needs.
        AlignmentError: If there are fewer rows than samples.
    """

    def __init__(
        self,
        shard_sizes: ArrayLike,
        embeddings: Any,
        *,
        batch_size: int,
        shard_counts: ArrayLike | None = None,
        lengths: Any = None,
        features: Any = None,
        sources: Any = None,
        config: SlapConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        gate: ShardGate | None = None,
        exchange: LaneExchange | None = None,
    ) -> None:
        self.config = config = config or SlapConfig()
        sizes = np.asarray(shard_sizes, np.int64)
        counts = None if shard_counts is None else np.asarray(shard_counts, np.int64)
        self.table = ShardTable.of(sizes, counts)
        self._store = as_row_store(embeddings, lengths, features, sources)
        self._policy = make_policy(config, self._store.feature_names)
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self._gate, self._exchange = gate, exchange
        if not (world_size >= 1 and 0 <= rank < world_size):
            raise ConfigError(f"rank must be in [0, {world_size}), got {rank!r}.")
        if config.keep == "auto" and MISMATCH_COLUMN not in self._store.feature_names:
            logger.warning(
                'keep="auto" finds no targets of other prompts: the embeddings have no column '
                "mismatch; slap-embed makes it."
            )
        if config.num_lanes is None:
            logger.info("num_lanes is %d, the world size; it stays so for the run.", world_size)
        self._take_over(self._made(world_size if config.num_lanes is None else config.num_lanes))
        self._fingerprint = fingerprint(self._store, self.table.num_samples)
        self.epoch = 0
        # Until somebody else merges; then a second clock would refresh twice.
        self.refreshes_itself = True
        self.set_target(None)

    def _made(self, num_lanes: int) -> Run:
        """Make what the lanes share, and this rank's lanes; changes nothing."""
        plan = plan_run(
            self.table,
            self._store,
            self.config,
            num_lanes=num_lanes,
            batch_size=self.batch_size,
            world_size=self.world_size,
        )
        return Run(
            plan,
            self._policy,
            rank=self.rank,
            world_size=self.world_size,
            gate=self._gate,
            exchange=self._exchange,
        )

    def _take_over(self, run: Run) -> None:
        """Compose with these from now on."""
        self._run, self._plan, self._shared = run, run.plan, run.shared
        self._refreshes, self.lanes, self.num_lanes = run.refreshes, run.lanes, run.plan.num_lanes

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of what the policy wants measured of probed candidates, besides losses and
        sketches."""
        return self._policy.measurements

    @property
    def step(self) -> int:
        """Batches composed in this epoch."""
        return self._last_lane.progress.step

    @property
    def progress(self) -> float:
        """Share of this epoch that has been composed, in [0, 1]."""
        now = self._last_lane.progress
        return 1.0 if now.over else self._plan.done(now.step, now.part)

    def __len__(self) -> int:
        """Batches of an epoch; where `keep` alone decides and is "auto", the most there can be."""
        return self._plan.max_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rest of this epoch's batches."""
        if self.exhausted:
            self.start_next_epoch()
        while not self.exhausted:
            batch = self.compose()
            if batch is None:
                break
            yield batch.tolist()

    @property
    def offered_by_stratum(self) -> IntArray:
        """(num_strata,) candidates that this rank's lanes were offered this epoch."""
        counts: IntArray = np.sum([lane.progress.offered for lane in self.lanes], axis=0)
        return counts

    @property
    def trained_by_stratum(self) -> IntArray:
        """(num_strata,) samples that this rank's lanes composed into batches this epoch."""
        counts: IntArray = np.sum([lane.progress.trained for lane in self.lanes], axis=0)
        return counts

    @property
    def exhausted(self) -> bool:
        """Whether every batch of this epoch has been composed."""
        return self._last_lane.progress.over

    @property
    def _last_lane(self) -> Lane:
        # After an error the lanes before it may be a batch ahead.
        return self.lanes[-1]

    def start_next_epoch(self) -> None:
        """Begin the next epoch; what was learnt stays."""
        self.epoch += 1
        self._refreshes.start_epoch()
        for lane in self.lanes:
            lane.start_epoch(self.epoch)

    def compose(self) -> IntArray | None:
        """Compose this rank's next batch.

        Returns:
            (batch_size,) sample ids, lane by lane; None if the refresh that was due has found that
            withdrawals have left nothing for another batch.

        Raises:
            ShardError: If a shard cannot be fetched and bad shards are not to be skipped. The next
                call tries it again, and composes the same batch.
        """
        with single_threaded():
            if not self._shared.seeded:
                self._run.seed()
            if self.refreshes_itself and self._refreshes.due(self.step):
                self.refresh()
                if self.exhausted:
                    return None
            for lane in self.lanes:
                lane.prepare()
            batch = np.concatenate([lane.take() for lane in self.lanes])
            self._refreshes.after_batch(batch)
        return batch

    def latest_lengths(self, count: int) -> FloatArray:
        """(count, batch_size) log lengths of the samples of the `count` batches composed last."""
        rows = [lane.feedback.latest_lengths(count) for lane in self.lanes]
        return np.concatenate(rows, axis=1, dtype=np.float64)

    def observe(self, ids: ArrayLike, losses: ArrayLike) -> None:
        """Feed back the losses of samples that were trained on.

        Args:
            ids: (n,) sample ids of batches that were yielded lately.
            losses: (n,) mean loss per supervised token; not finite ones are counted and left out.

        Raises:
            FeedbackError: If shapes differ, or an id was not yielded lately or already observed.
        """
        names, values = check_feedback(ids, losses)
        awaiting = [lane.feedback.awaiting_trained for lane in self.lanes]
        for match in find_questions(names, awaiting, "observe: ids of yielded batches"):
            self.lanes[match.lane].feedback.take_trained(*match.close(), values[match.of])

    def loss_weights(self, ids: ArrayLike) -> FloatArray:
        """Weights of the losses of samples that are trained on now; call it before `observe`.

        Args:
            ids: (n,) sample ids of batches that were yielded lately.

        Returns:
            (n,) weights: ones, unless the policy makes up for what it prunes (`infobatch`).

        Raises:
            FeedbackError: If an id was not yielded lately or was already observed.
        """
        names, weights = check_feedback(ids, np.ones(np.shape(ids)))
        awaiting = [lane.feedback.awaiting_trained for lane in self.lanes]
        for match in find_questions(names, awaiting, "loss_weights: ids of yielded batches"):
            weights[match.of] = match.asked.weight[match.at]
        return weights

    def update(
        self,
        ids: ArrayLike,
        losses: ArrayLike,
        sketches: ArrayLike | None = None,
        measurements: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Feed back what the probe measured of the ids that `probe_candidates` gave.

        Args:
            ids: (n,) sample ids.
            losses: (n,) mean loss per supervised token.
            sketches: (n, sketch_dim) gradient sketches.
            measurements: (n,) other numbers by name: those of `measurements` at least.

        Raises:
            FeedbackError: If shapes differ, a wanted measurement is missing, or an id was not given
                by `probe_candidates`.
        """
        names, values = check_feedback(ids, losses)
        shape = len(names), self.config.advanced.sketch_dim
        rows = None if sketches is None else check_sketches(sketches, shape)
        measured = check_measurements(measurements or {}, len(names), self.measurements)
        awaiting = [lane.feedback.awaiting_probed for lane in self.lanes]
        for match in find_questions(names, awaiting, "update: ids to be probed"):
            self.lanes[match.lane].feedback.take_probed(
                *match.close(),
                values[match.of],
                None if rows is None else rows[match.of],
                {name: column[match.of] for name, column in measured.items()},
            )

    def set_target(self, sketch: ArrayLike | None) -> None:
        """Say what the model is to become good at, for policies that aim at a target (`greats`).

        Args:
            sketch: (sketch_dim,) mean gradient sketch of a target set under the present model, as
                `LearnabilityProbe.mean_sketch` gives it; None: no target any more.

        Raises:
            FeedbackError: If it has another shape or is not finite.
        """
        shape = (self.config.advanced.sketch_dim,)
        target = None if sketch is None else check_sketches(sketch, shape)
        if target is not None and not np.isfinite(target).all():
            raise FeedbackError("sketch must be finite, got NaN or infinity; keep the last one.")
        self._aim(target)

    def _aim(self, target: Float32Array | None) -> None:
        self._target = target
        for lane in self.lanes:
            lane.set_target(target)

    def probe_budget(self) -> int:
        """Candidates due to be probed now on this rank, equally many per lane; 0 if none."""
        smallest = self._plan.least_candidates
        return len(self.lanes) * min(lane.probe_budget(smallest) for lane in self.lanes)

    def probe_candidates(self, count: int) -> IntArray:
        """Ids whose losses and sketches would tell most about the candidates at hand.

        Args:
            count: How many, over this rank's lanes; a multiple of their number.

        Returns:
            (count,) sample ids, lane by lane, equally many per lane.

        Raises:
            FeedbackError: If `count` is not a multiple of this rank's lanes.
        """
        if count < 0 or count % len(self.lanes):
            raise FeedbackError(
                f"count must be a multiple of this rank's {len(self.lanes)} lanes, got {count!r}."
            )
        each = count // len(self.lanes)
        with single_threaded():
            ids = [lane.probe_candidates(each) for lane in self.lanes if each]
        return np.concatenate([np.zeros(0, np.int64), *ids])

    def statistics(self) -> list[State]:
        """Sums of this rank's lanes since the last refresh, and batches left; only reads."""
        return self._refreshes.statistics()

    def merge(self, statistics_in_lane_order: Sequence[State]) -> None:
        """Refresh from the statistics of all lanes of all ranks.

        From the first call on the sampler no longer refreshes itself.

        Raises:
            FeedbackError: If the lanes are not all there, once each, in order, and whole.
        """
        self._refreshes.merge(statistics_in_lane_order)
        self.refreshes_itself = False

    def refresh(self, also: FloatArray | None = None) -> FloatArray:
        """Refresh from the lanes of all ranks, over the exchange; every rank at the same step.

        Args:
            also: (local lanes, n) more numbers that are to be added up over all lanes.

        Returns:
            (n,) their sums, in lane order.

        Raises:
            ConfigError: If there are other ranks and no exchange.
            ExchangeError: If the ranks cannot be reached or are not at the same step, or if the one
                that was to learn from the sums could not.
        """
        return self._refreshes.refresh(also)

    def metrics(self) -> dict[str, float]:
        """Counts over this rank's lanes in this epoch, and how well losses are predicted."""
        return {
            "epoch": float(self.epoch),
            "step": float(self.step),
            "epochs_cut_short": float(self._refreshes.epochs_cut_short),
            **self._shared.metrics(),
            **count_lanes(self.lanes),
        }

    def state_dict(self) -> State:
        """Everything the next batches follow from: arrays, numbers and strings; only reads."""
        return {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            "run": self.describe(),
            "epoch": self.epoch,
            "refreshes_itself": self.refreshes_itself,
            # Without a target, none of its numbers.
            "target": np.zeros(0, np.float32) if self._target is None else self._target,
            **self._run.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state; nothing is changed unless all of it fits.

        Arrays may come back as nested lists.

        Raises:
            StateError: If the state is of another version, config, dataset or batch size, or was
                cut or changed; the message says where.
            ShardError: If a shard that the state needs cannot be fetched.
        """
        saved = Saved(state)
        saved.check_version(STATE_VERSION)
        num_lanes, lanes = check_state(
            saved,
            run=self.describe(),
            config=self.config,
            rank=self.rank,
            world_size=self.world_size,
        )
        epoch, refreshes_itself = saved.whole("epoch"), saved.flag("refreshes_itself")
        target: Float32Array | None = saved.numbers32("target", None)
        if target is not None and len(target) not in (0, self.config.advanced.sketch_dim):
            raise saved.refusal("target", f"({self.config.advanced.sketch_dim},) or empty", target)
        try:
            run = self._made(num_lanes)
        except ConfigError as error:
            raise StateError(f"state.run.num_lanes must fit this run: {error}") from error
        run.load_state_dict(saved, lanes)
        # From here on nothing fails.
        self._take_over(run)
        self.epoch, self.refreshes_itself = epoch, refreshes_itself
        self._aim(target if target is not None and len(target) else None)

    def finish_reading(self) -> None:
        """Wait until no rows are read ahead in the background: before the process is forked."""
        for lane in self.lanes:
            lane.intake.finish_reading()

    @property
    def shards_at_hand(self) -> int:
        """Shards that this rank's lanes need on disk at a time."""
        return shards_needed(self.lanes, self._plan)

    def describe(self) -> dict[str, Any]:
        """What must be the same on all ranks, and in a state that is loaded, besides the config."""
        return describe_run(
            self.table,
            self._store,
            embeddings=self._fingerprint,
            global_batch=self.batch_size * self.world_size,
            num_lanes=self.num_lanes,
        )
