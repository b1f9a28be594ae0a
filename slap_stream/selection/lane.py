"""One lane: candidate order -> strata -> pool -> policy -> lane batches.

A plain state machine without threads, torch or files of its own: what it does next follows from its
state, the shared model and the store.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np

from slap_stream.core.rng import gumbels
from slap_stream.core.saved import Saved
from slap_stream.errors import ShardError
from slap_stream.selection.composer import Composer
from slap_stream.selection.departures import PRUNED, TRAINED, Departures
from slap_stream.selection.feedback import LaneFeedback
from slap_stream.selection.intake import Intake
from slap_stream.selection.loss_model import NUM_OWN_COLUMNS
from slap_stream.selection.outliers import Outliers
from slap_stream.selection.policies.base import Policy
from slap_stream.selection.pool import Pool, RecentlyTrained, SketchQueue
from slap_stream.selection.schedule import LanePlan, LaneProgress
from slap_stream.selection.scoring import Scorer, Yardsticks
from slap_stream.selection.shared import Shared, SinceRefresh
from slap_stream.selection.state import Lookup
from slap_stream.selection.strata import cluster_sums
from slap_stream.types import Float32Array, FloatArray, IntArray, ShardGate, State

# Samples trained on lately, over all strata; bounds the lane's memory where strata are many.
MAX_RECENT = 2048
# Gradient sketches remembered of the samples chosen last, where the policy asks for them.
CHOSEN_SKETCHES = 1024
# Stands in a state for a target that there is none of.
_NONE = -1


class _Part(Protocol):
    """A part of a lane that owns what is saved of it."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None: ...


class Lane:
    """Composes one lane's batches.

    Its state: position in the epoch; candidates of each stratum offered, trained and pruned; the
    pool; samples trained on lately; questions asked and answers since the last refresh.

    Args:
        index: Which lane, in [0, num_lanes).
        plan: What all lanes have in common.
        policy: Rule that picks a batch.
        shared: Strata, model and keep, which whoever owns them moves at refreshes.
        gate: Who makes sure that shards are on disk before their candidates are offered.
    """

    def __init__(
        self,
        index: int,
        plan: LanePlan,
        policy: Policy,
        shared: Shared,
        gate: ShardGate | None = None,
    ) -> None:
        config = plan.config
        strata, model, keep = shared.strata, shared.model, shared.keep
        # Where nobody will look at them, candidates leave their vectors behind.
        vectors = policy.sees_vectors
        self._columns = plan.columns if vectors else NUM_OWN_COLUMNS
        shape = {
            "columns": self._columns,
            "dim": plan.store.shape[1] if vectors else 0,
            "metric_dim": model.metric.shape[1],
        }
        self.index = index
        self._plan, self._policy, self._strata = plan, policy, strata
        self._model, self._keep = model, keep
        self.progress = LaneProgress(num_strata=strata.num_strata)
        self.intake = Intake(
            plan.table,
            plan.store,
            gate,
            {
                "seed": config.seed,
                "lane": index,
                "num_lanes": plan.num_lanes,
                "shards_per_block": config.advanced.shards_per_block,
                "min_block": plan.pool_size,
                "passes": plan.passes,
            },
        )
        sketch_dim = config.advanced.sketch_dim if policy.keeps_sketches else 0
        self.pool = Pool(
            capacity=plan.pool_size,
            sketch_dim=sketch_dim,
            measurements=policy.measurements,
            **shape,
        )
        remembered = CHOSEN_SKETCHES if "chosen_sketches" in policy.needs else 0
        self._chosen = SketchQueue(length=remembered, sketch_dim=sketch_dim)
        per_stratum = min(
            config.advanced.recent_per_stratum, max(1, MAX_RECENT // strata.num_strata)
        )
        self._recent = RecentlyTrained(
            num_strata=strata.num_strata,
            per_stratum=per_stratum,
            **shape,
        )
        self._yardsticks = Yardsticks(
            model, keep, plan.store.feature_names, columns=shape["columns"], dim=shape["dim"]
        )
        outliers = None
        if policy.needs >= {"losses", "evidence"}:
            names, share = list(plan.store.feature_names), "target_share"
            outliers = Outliers(
                model,
                num_sources=strata.num_sources,
                target_share=NUM_OWN_COLUMNS + names.index(share) if share in names else None,
            )
        self._scorer = Scorer(policy, model, self.pool, self._recent, self._yardsticks, outliers)
        self.feedback = LaneFeedback(
            plan, policy, model, self.pool, self._scorer, outliers, self.progress
        )
        clusters, dim = strata.centroids.shape
        self._since_refresh = SinceRefresh(clusters=clusters, dim=dim)
        self._composed = 0
        self._composer = Composer(
            index,
            plan,
            policy,
            model,
            keep,
            intake=self.intake,
            pool=self.pool,
            recent=self._recent,
            chosen=self._chosen,
            yardsticks=self._yardsticks,
            progress=self.progress,
        )
        # Composed and not taken yet: another lane of the rank could not compose its batch.
        self._ready: IntArray | None = None
        # Where an error has ended the offering of candidates before a batch.
        self._unfinished: tuple[int, bool] | None = None
        self.start_epoch(0)

    @property
    def departures(self) -> Departures | None:
        """What has left the pool; None until somebody wants to be told."""
        return self.feedback.departures

    def watch_departures(self, watch: bool = True) -> None:
        """Note from now on, in `departures`, what leaves the pool; nothing is decided by it."""
        watched = Departures(pool=self.pool, scorer=self._scorer, policy=self._policy)
        self.feedback.departures = watched if watch else None

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch; what was learnt about the data stays."""
        self.progress.begin(epoch)
        self._probed = 0
        self.pool.clear()
        self.intake.start_epoch(epoch)

    @property
    def num_candidates(self) -> int:
        """Candidates of this lane in an epoch, those of all its passes."""
        return self.intake.order.num_candidates

    @property
    def batches_of_earlier_epochs(self) -> int:
        """Batches composed in the run before this epoch."""
        return self._composed - self.progress.step

    @property
    def counters(self) -> Counter[str]:
        """Losses that came back, candidates withdrawn for theirs, samples repeated in a batch."""
        return self.feedback.counters

    @property
    def gauges(self) -> dict[str, float]:
        """Learnability of the batch compared last, and of a uniformly drawn one."""
        return self._composer.gauges

    def prepare(self) -> None:
        """Have the next lane batch ready, unless it is; after an error it may be called again.

        If so many candidates were withdrawn that what is left does not fill a batch, it is the last
        one again: all ranks must take as many steps, and they agree on where the epoch ends at
        refreshes only.

        Raises:
            ShardError: If a shard cannot be fetched and bad shards are not to be skipped, or if
                nothing is left for a first batch.
        """
        if self._ready is None:
            batch = self._compose()
            self._ready = self._repeat_batch() if batch is None else batch

    def take(self) -> IntArray:
        """The (batch_size,) sample ids of the batch that is ready."""
        assert self._ready is not None, "prepare comes before take"
        batch, self._ready = self._ready, None
        return batch

    def _compose(self) -> IntArray | None:
        """The next batch's (batch_size,) sample ids; None if there are not as many left."""
        size = self._plan.batch_size
        if self._unfinished is None:
            now = self.progress.step, self.progress.part, self._keep.value
            self._refill(self._plan.offered_before(*now, self.num_candidates))
        else:
            self._refill(*self._unfinished)
        slots, open_ = self._composer.open_slots()
        while np.count_nonzero(open_) < size and self._refill(self.intake.position + size, True):
            slots, open_ = self._composer.open_slots()
        if len(slots) < size:
            return None
        if np.count_nonzero(open_) < size:
            # A sample repeated in nearly every batch of a tiny epoch cannot leave another way.
            self.counters["repeats_in_batch"] += size - int(np.count_nonzero(open_))
            open_ = np.ones(len(slots), bool)
        chosen = self._composer.choose(slots, open_)
        ids = self.pool.columns.sample_id[chosen].copy()
        end = self._plan.after(self.progress.part, self._keep.value)
        self._train(chosen, ids, self._composer.loss_weights(slots, chosen))
        self._drop(self._composer.leaving(end))
        self.progress.advance(end, self._plan)
        self._composed += 1
        return ids

    def _repeat_batch(self) -> IntArray:
        """(batch_size,) sample ids of the last batch, which stands in for one more."""
        last = self.feedback.awaiting_trained.last_whole(self._plan.batch_size)
        if last is None:
            raise ShardError(
                f"lane {self.index} must have candidates for a first batch, got "
                f"{len(self.pool)} after {self.intake.withdrawn} were withdrawn; fetch the bad "
                "shards again."
            )
        self.counters["batches_repeated"] += 1
        self.feedback.awaiting_trained.ask(self._composed, *last)
        end = self._plan.after(self.progress.part, self._keep.value)
        self.progress.advance(end, self._plan)
        self._composed += 1
        return last[0].copy()

    def _refill(self, target: int, force: bool = False) -> bool:
        """Offer candidates up to `target` of the lane's order; whether any was taken.

        A block begins only when no candidate of two blocks before it is left in the pool, unless
        there is no other way to fill a batch.
        """
        intake, before = self.intake, self.intake.position
        self._unfinished = target, force
        target = min(target, self.num_candidates)
        while intake.position < target:
            room = self.pool.capacity - len(self.pool)
            next_block = intake.next_block
            if not room:
                break
            if next_block != intake.block_index and not force:
                blocks = self.pool.columns.block[self.pool.slots()]
                if np.any(blocks <= next_block - 2):
                    break
            self._offer(min(room, target - intake.position))
        self._unfinished = None
        return intake.position > before

    def _offer(self, most: int) -> None:
        offered = self.intake.take(most)
        ids, count = offered.sample_id, len(offered.sample_id)
        embedding = np.ascontiguousarray(offered.x[:, -self._plan.store.shape[1] :])
        stratum = self._strata.assign(embedding, offered.source)
        clusters = len(self._strata.centroids)
        sums, counts = cluster_sums(embedding, stratum % clusters, clusters)
        self._since_refresh.centroid_sum += sums
        self._since_refresh.centroid_count += counts
        self._scorer.watch(ids, offered.x, stratum)
        slots = self.pool.offer(
            offered.x[:, : self._columns],
            sample_id=ids,
            occurrence=offered.occurrence,
            block=np.full(count, offered.block),
            stratum=stratum,
            offered_at=np.arange(count) + int(self.progress.offered.sum()),
            gumbel=gumbels(self._plan.config.seed, self.progress.epoch, ids, offered.occurrence),
        )
        self._scorer.score(slots, offered.x)
        self.progress.offered += self.progress.by_stratum(stratum)

    def _train(self, slots: IntArray, ids: IntArray, weights: FloatArray) -> None:
        """Book a batch: its samples leave the pool, their losses are awaited."""
        stratum, x = self.pool.columns.stratum[slots], self.pool.x[slots]
        source = self._strata.sources_of(stratum)
        self.feedback.awaiting_trained.ask(self._composed, ids, x, source, weights)
        if "recent" in self._policy.needs:
            self._recent.add(ids, stratum, x, self.pool.z[slots])
        self._chosen.add(self.pool.sketch[slots])
        self.progress.trained += self.progress.by_stratum(stratum)
        self._leave(slots, TRAINED)
        self._scorer.bring_near(ids, stratum, x)

    def _drop(self, slots: IntArray) -> None:
        stratum = self.pool.columns.stratum[slots]
        self.progress.pruned += self.progress.by_stratum(stratum)
        self._leave(slots, PRUNED)

    def _leave(self, slots: IntArray, outcome: str) -> None:
        """Free slots of candidates that were trained on or pruned, and book their worth."""
        if self.departures is not None:
            now = self.progress.epoch, self.progress.step
            self.departures.note(slots, outcome, epoch=now[0], step=now[1])
        weight = self.pool.columns.worth[slots]
        self.progress.worth += np.bincount(
            self.pool.columns.stratum[slots], weights=weight, minlength=self.progress.num_strata
        )
        if self._keep.leniency > 1.0:
            weight = self._keep.plain(weight, self._yardsticks.unrelated(self.pool.x, slots))
        self._since_refresh.left_worth += float(weight.sum())
        self._since_refresh.left_count += len(slots)
        self.pool.remove(slots)

    def probe_candidates(self, count: int) -> IntArray:
        """Choose candidates whose losses would tell most.

        Args:
            count: How many; ids repeat if the pool holds fewer, and are those of the last batch if
                it holds none.

        Returns:
            (count,) sample ids; their losses are awaited.

        Raises:
            ValueError: If no batch was composed yet.
        """
        last = self.feedback.awaiting_trained.last()
        if len(self.pool) or last is None:
            slots = np.resize(self._composer.choose_probes(count), count)
            ids, x = self.pool.columns.sample_id[slots], self.pool.x[slots]
            source = self._strata.sources_of(self.pool.columns.stratum[slots])
        else:
            # Withdrawals have emptied it; the other ranks forward now, and so must this one.
            at = np.resize(np.arange(len(last[0])), count)
            ids, x, source = last[0][at], last[1][at], last[2][at]
        due, pooled = self._due_probes(self._plan.least_candidates)
        # What left the pool before it could be probed cannot be made up for.
        self._probed += count + max(0, due - pooled)
        self.feedback.awaiting_probed.ask(self._composed, ids, x, source)
        return ids

    def probe_budget(self, candidates: int) -> int:
        """Probes due now for a lane with so many candidates; the smallest lane's count makes it
        equal on all lanes."""
        progress = self.progress
        if not progress.part or progress.over:
            return 0
        return max(0, min(self._due_probes(candidates)))

    def _due_probes(self, candidates: int) -> tuple[int, int]:
        """Candidates that are still to be probed, and those that are in the pool, of a lane with so
        many candidates in all."""
        plan, progress = self._plan, self.progress
        step, part, keep = progress.step - 1, progress.before, self._keep.value
        offered = plan.offered_before(step, part, keep, candidates)
        due = int(plan.config.probe_fraction * offered) - self._probed
        return due, plan.pooled_after(step, part, progress.part, keep, candidates)

    def set_target(self, sketch: Float32Array | None) -> None:
        """Aim batches at the (sketch_dim,) mean gradient sketch of a target set, or at none."""
        self._composer.target = sketch

    def statistics(self) -> State:
        """Sums since the last refresh, float64; those of all lanes can be added in lane order."""
        return {
            "lane": self.index,
            **self.feedback.answers.moments().to_dict(),
            **self._since_refresh.state_dict(),
        }

    def refresh(self) -> None:
        """Score everything anew: model and strata have just been refreshed."""
        self.feedback.refresh(self._plan.config.advanced.decay)
        self._since_refresh.clear()
        if self._scorer.refresh():
            self._composer.compare = self._model.fitted

    def state_dict(self) -> State:
        """All that the next batches follow from, besides what the lanes share; only reads."""
        target, force = self._unfinished or (_NONE, False)
        return {
            "lane": self.index,
            "ready": np.zeros(0, np.int64) if self._ready is None else self._ready.copy(),
            "unfinished": {"target": target, "force": force},
            "probed": self._probed,
            "composed": self._composed,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Saved) -> None:
        """Go on from a saved state; what the lanes share must have been loaded before.

        Raises:
            StateError: If it does not fit; the lane is then of no use any more.
            ShardError: If a shard of the open block cannot be fetched.
        """
        num_samples = self._plan.table.num_samples
        ready = state.wholes("ready", None, below=num_samples)
        unfinished = state.part("unfinished")
        if len(ready) not in (0, self._plan.batch_size):
            raise state.refusal("ready", f"{self._plan.batch_size} sample ids or none", ready)
        target, force = unfinished.whole("target", least=_NONE), unfinished.flag("force")
        self._ready = ready if len(ready) else None
        self._unfinished = None if target == _NONE else (target, force)
        self._probed, self._composed = state.whole("probed"), state.whole("composed")
        lookup = Lookup(
            num_samples=num_samples,
            num_strata=self._strata.num_strata,
            rows_of=lambda ids: self.intake.rows_of(ids)[:, : self._columns],
        )
        for name, part in self._parts().items():
            part.load_state_dict(state.part(name), lookup)

    def _parts(self) -> dict[str, _Part]:
        """Parts by name, in the order in which they are loaded: the scorer finds anew the places of
        what is in the pool and what was trained on, by the yardsticks."""
        return {
            "progress": self.progress,
            "intake": self.intake,
            "pool": self.pool,
            "recent": self._recent,
            "chosen": self._chosen,
            "yardsticks": self._yardsticks,
            "scorer": self._scorer,
            "composer": self._composer,
            "feedback": self.feedback,
            "since_refresh": self._since_refresh,
        }
