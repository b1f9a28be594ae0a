"""The composition of a lane's next batch, and of those that leave its pool untrained."""

from __future__ import annotations

import numpy as np

from slap_stream.core.rng import Purpose, generator, uniforms
from slap_stream.core.saved import Saved
from slap_stream.selection.intake import Intake
from slap_stream.selection.loss_model import LOG_LENGTH, NUM_OWN_COLUMNS, LossModel
from slap_stream.selection.policies.base import (
    Policy,
    PoolView,
    checked_choice,
    checked_score,
    top_of_each_stratum,
)
from slap_stream.selection.policies.uniform import Uniform
from slap_stream.selection.pool import Pool, RecentlyTrained, SketchQueue
from slap_stream.selection.quota import Keep, apportion, claims_of
from slap_stream.selection.repeats import Turns, copy_number, pressing
from slap_stream.selection.schedule import LanePlan, LaneProgress
from slap_stream.selection.scoring import Yardsticks
from slap_stream.selection.state import Lookup
from slap_stream.types import (
    REFERENCE_COLUMN,
    BoolArray,
    Float32Array,
    FloatArray,
    IntArray,
    State,
)

# Of so many candidates drawn by chance, one is probed for its prediction being uncertain: to rank
# the whole pool takes as long as composing a batch, and the best of four are nearly as uncertain.
UNCERTAIN_OF = 4
GAUGES = ("batch_learnability", "uniform_learnability")


class Composer:
    """Chooses from a lane's pool; changes nothing but its own gauges.

    Args:
        index: The lane.
        plan: What all lanes have in common.
        policy: Rule that picks a batch, once losses can be predicted.
        model: Shared model.
        keep: Shared fraction that is kept.
        intake: The lane's candidates to come.
        pool: The lane's pool.
        recent: What the lane trained on lately.
        chosen: Gradient sketches of what the lane chose last.
        yardsticks: The lane's yardsticks.
        progress: How far the lane is; the lane moves it.

    Attributes:
        target: (sketch_dim,) mean gradient sketch of a target set, None if there is none.
        compare: Whether the next batch is compared with one drawn uniformly.
        gauges: Learnability of the last batch that was compared, and of the other.
    """

    def __init__(
        self,
        index: int,
        plan: LanePlan,
        policy: Policy,
        model: LossModel,
        keep: Keep,
        *,
        intake: Intake,
        pool: Pool,
        recent: RecentlyTrained,
        chosen: SketchQueue,
        yardsticks: Yardsticks,
        progress: LaneProgress,
    ) -> None:
        self._index, self._plan, self._model, self._keep = index, plan, model, keep
        self._trained_policy, self._uniform = policy, Uniform(plan.config)
        self._intake, self._pool, self._recent, self._chosen = intake, pool, recent, chosen
        self._yardsticks, self._progress = yardsticks, progress
        names = plan.store.feature_names
        if REFERENCE_COLUMN in names:
            self._reference_column = NUM_OWN_COLUMNS + names.index(REFERENCE_COLUMN)
        self.target: Float32Array | None = None
        self.compare = False
        self.gauges: dict[str, float] = {}

    @property
    def policy(self) -> Policy:
        """The policy now in force: uniform until losses can be predicted."""
        if self._trained_policy.waits_for_losses and not self._model.fitted:
            return self._uniform
        return self._trained_policy

    def _turns(self, step: int, part: int) -> Turns:
        steps = step + self._plan.steps_left(step, part, self._keep.value)
        return Turns(lane=self._index, step=step, steps=steps, shared=self._intake.order.turns)

    @property
    def _turns_now(self) -> Turns:
        return self._turns(self._progress.step, self._progress.part)

    def _copy_number(self, slots: IntArray) -> IntArray:
        pool = self._pool
        return copy_number(pool.columns.sample_id[slots], pool.columns.occurrence[slots])

    def open_slots(self) -> tuple[IntArray, BoolArray]:
        """Slots in use, and which of their candidates may enter the next batch."""
        slots = self._pool.slots()
        if not self._plan.repeats:
            return slots, np.ones(len(slots), bool)
        now = self._turns_now.now(self._pool.columns.sample_id[slots])
        return slots, now & (self._copy_number(slots) == 0)

    def _due(self, slots: IntArray) -> tuple[BoolArray, bool]:
        """(n,) candidates that must leave for a later block to begin, and whether it waits."""
        intake = self._intake
        old = self._pool.columns.block[slots] < intake.block_index
        if intake.in_last_block:
            return np.zeros(len(slots), bool), False
        leaving = self._plan.leaving_most(self._keep.value, intake.order.num_candidates)
        pressing_now = intake.left_in_block <= int(np.count_nonzero(old)) + leaving
        return old & pressing_now, intake.left_in_block == 0

    def choose(self, slots: IntArray, open_: BoolArray) -> IntArray:
        """Slots of the batch: first what must go, then what is due, then the rest."""
        policy = self.policy
        open_, wanted = open_.copy(), self._plan.batch_size
        strata = self._pool.columns.stratum[slots]
        taken = np.zeros_like(self._progress.offered)
        claims = self._claims(slots)
        chosen: list[IntArray] = []

        def take(group: BoolArray, most: int, *, within_quota: bool) -> None:
            nonlocal wanted, taken
            at = np.flatnonzero(open_ & group)
            if not len(at):
                return
            have = self._progress.by_stratum(strata[at])
            part = np.array([min(most, wanted, len(at))])
            if policy.proportional:
                trained = self._progress.trained + taken
                if within_quota:
                    stock = self._progress.by_stratum(strata[open_])
                    part = np.minimum(apportion(claims, trained, stock, wanted), have)
                else:
                    part = apportion(claims, trained, have, int(part[0]))
            if not part.sum():
                return
            view = self.view(slots[at])
            chosen_here = policy.select(view, part)
            picked = at[checked_choice(policy, chosen_here, view, int(part.sum()))]
            chosen.append(picked)
            open_[picked] = False
            wanted -= len(picked)
            taken = taken + self._progress.by_stratum(strata[picked])

        everyone = np.ones(len(slots), bool)
        if self._plan.repeats and not self._intake.remaining:
            must, needed = pressing(
                self._pool.columns.sample_id[slots],
                self._copy_number(slots),
                self._turns_now,
                wanted,
            )
            take(must, needed, within_quota=False)
        due, held = self._due(slots)
        take(due, wanted, within_quota=not held)
        take(everyone, wanted, within_quota=False)
        positions = np.concatenate(chosen)
        if self.compare and policy.compares_batches:
            self._compare_with_uniform(policy, slots, positions)
        return slots[positions]

    def choose_probes(self, count: int) -> IntArray:
        """Choose whom to probe: half uniformly in strata, so that means stay unbiased, half where
        the prediction is least certain, of four times as many.

        Args:
            count: How many.

        Returns:
            (count,) slots, all different, by length, so that what is padded to one length differs
            little; as many as the pool has if it has fewer.

        Raises:
            ValueError: If the pool is empty.
        """
        pool, progress, slots = self._pool, self._progress, self._pool.slots()
        slots = slots[self._copy_number(slots) == 0]
        if not len(slots):
            raise ValueError(
                "probe_candidates needs candidates in the pool; compose a batch first."
            )
        known = ~np.isnan(pool.columns.own_loss[slots])
        if np.count_nonzero(~known) >= count:
            slots = slots[~known]
        elif self._trained_policy.measures_all:
            # All that is new, then what was measured longest ago.
            since = np.where(known, pool.columns.own_since[slots], -1)
            slots = slots[np.lexsort((pool.columns.offered_at[slots], since))[:count]]
        # Otherwise what was measured before may be measured again.
        count = min(count, len(slots))
        uncertain = count // 2 if self._model.fitted else 0
        view = self.view(slots)
        draws = uniforms(
            self._plan.config.seed, Purpose.PROBE, progress.epoch, view.sample_id, view.occurrence
        )
        stock = progress.by_stratum(view.stratum)
        quota = apportion(stock, np.zeros_like(stock), stock, count - uncertain)
        picked = top_of_each_stratum(draws, view, quota)
        if uncertain:
            rest = np.setdiff1d(np.arange(len(slots)), picked)
            # By chance, too: a tail of odd ones is not probed again and again.
            rest = rest[np.argsort(-draws[rest], kind="stable")[: UNCERTAIN_OF * uncertain]]
            variance = self._model.variance(pool.x[slots[rest]])
            least_certain = np.argsort(-variance, kind="stable")[:uncertain]
            picked = np.concatenate([picked, rest[least_certain]])
        probes: IntArray = slots[picked]
        return probes[np.argsort(pool.x[probes, LOG_LENGTH], kind="stable")]

    def loss_weights(self, slots: IntArray, chosen: IntArray) -> FloatArray:
        """Weights of a batch's losses, as the policy wants them.

        Args:
            slots: (n,) slots that the batch was chosen from, ascending.
            chosen: (batch_size,) slots of the batch.

        Returns:
            (batch_size,) weights; ones unless the policy makes up for what it prunes.
        """
        policy = self.policy
        if not policy.weighs_losses:
            return np.ones(len(chosen))
        return policy.loss_weights(self.view(slots))[np.searchsorted(slots, chosen)]

    def view(self, slots: IntArray) -> PoolView:
        """What the policy in force sees of the candidates in (n,) slots, in their order."""
        pool = self._pool
        view = PoolView(
            sample_id=pool.columns.sample_id[slots],
            occurrence=pool.columns.occurrence[slots],
            stratum=pool.columns.stratum[slots],
            offered_at=pool.columns.offered_at[slots],
            gumbel=pool.columns.gumbel[slots],
            loss=pool.columns.loss[slots],
            utility=pool.columns.utility[slots],
            z=lambda at: pool.z[slots[at]],
            recent=self._recent,
            typical=self._yardsticks.typical,
            epoch=self._progress.epoch,
            embedding=lambda: pool.unit[slots],
            measured=lambda: ~np.isnan(pool.columns.own_loss[slots]),
            sketch=lambda: pool.sketch[slots],
            measurement=lambda name: pool.measured[name][slots],
            chosen=lambda: self._chosen.sketch,
            reference_loss=lambda: pool.x[slots, self._reference_column].astype(np.float64),
            target=self.target,
            rng=lambda: generator(
                self._plan.config.seed,
                Purpose.POLICY,
                self._progress.epoch,
                self._index,
                self._progress.step,
            ),
        )
        return view.restricted_to(self.policy.needs)

    def _compare_with_uniform(self, policy: Policy, slots: IntArray, positions: IntArray) -> None:
        """Learnability of a batch beside that of one drawn uniformly with the same quotas."""
        view = self.view(slots)
        draws = uniforms(
            self._plan.config.seed,
            Purpose.BASELINE,
            self._progress.epoch,
            view.sample_id,
            view.occurrence,
        )
        quota = self._progress.by_stratum(view.stratum[positions])
        drawn = top_of_each_stratum(draws, view, quota)
        batch, uniform = policy.learnability(view, [positions, drawn])
        self.gauges = dict(zip(GAUGES, (batch, uniform), strict=True))
        self.compare = False

    def _claims(self, slots: IntArray) -> FloatArray:
        """(num_strata,) what the strata have a right to, with these (n,) slots in use."""
        progress = self._progress
        pooled = np.bincount(
            self._pool.columns.stratum[slots],
            weights=self._pool.columns.worth[slots],
            minlength=progress.num_strata,
        )
        return claims_of(progress.offered, progress.worth + pooled, self._keep.value)

    def leaving(self, end: int) -> IntArray:
        """(n,) slots to prune after a batch up to part `end`: the pool is then as planned."""
        plan, pool, progress = self._plan, self._pool, self._progress
        candidates = self._intake.order.num_candidates
        slots = pool.slots()
        now = progress.step, progress.part
        surplus = len(slots) - plan.pooled_after(*now, end, self._keep.value, candidates)
        if surplus <= 0:
            return slots[:0]
        useless = slots[:0]
        if plan.repeats and not self._intake.remaining:
            # Copies that can no longer enter a batch of their own go first.
            left = self._turns(progress.step + 1, end).left(pool.columns.sample_id[slots])
            useless = slots[self._copy_number(slots) >= left][:surplus]
            slots, surplus = np.setdiff1d(slots, useless), surplus - len(useless)
        policy = self.policy
        quota: IntArray | int = surplus
        if policy.proportional:
            claims = self._claims(pool.slots())
            kept = self._keep.value * float(progress.offered.sum())
            quota = apportion(
                progress.offered - claims * (kept / float(claims.sum())),
                progress.pruned + progress.by_stratum(pool.columns.stratum[useless]),
                progress.by_stratum(pool.columns.stratum[slots]),
                surplus,
            )
        view = self.view(slots)
        score = checked_score(policy, policy.score(view), view)
        due, _ = self._due(slots)
        return np.concatenate([useless, pool.lowest(score, quota, due, slots)])

    def state_dict(self) -> State:
        """Whether to compare, and the gauges; the target is the sampler's."""
        return {"compare": self.compare, "gauges": dict(self.gauges)}

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved state."""
        self.compare, gauges = state.flag("compare"), state.part("gauges")
        self.gauges = {name: gauges.number(name) for name in GAUGES} if len(gauges) else {}
