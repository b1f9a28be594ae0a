"""What a lane thinks of its pooled candidates: renewed when they come, at refreshes, and when
something like them has been trained on."""

from __future__ import annotations

import numpy as np

from slap_stream.appraisal import Appraiser
from slap_stream.evidence import NO_COPY, copy_likelihood, worth
from slap_stream.kernels import heads_of, nearest_of_group
from slap_stream.learnability import LearnabilityModel
from slap_stream.policies import Policy
from slap_stream.reservoir import RecentlyTrained, Reservoirs
from slap_stream.types import Float32Array, IntArray

# Refreshes after which a measured loss gives way to the prediction: the model has moved on.
FRESH_REFRESHES = 3
# Distances to what was trained on are known from the start up to that of a copy times this, so
# that they need not be looked for again when the yardstick grows a little.
REACH = 1.1


class Judge:
    """Keeps the judgements in a lane's pool up to date.

    Args:
        policy: Rule that picks a batch; says what it wants to be told.
        model: Shared model.
        pool: The lane's pool.
        recent: What the lane trained on lately.
        appraiser: The lane's yardsticks.
        measured_for_good: Whether a measured loss is never given up for a prediction.

    Attributes:
        refreshes: Refreshes so far; part of the lane's state.
        reach: Up to which distance those in the pool are known; part of the lane's state.
    """

    def __init__(
        self,
        policy: Policy,
        model: LearnabilityModel,
        pool: Reservoirs,
        recent: RecentlyTrained,
        appraiser: Appraiser,
        *,
        measured_for_good: bool,
    ) -> None:
        self._policy, self._model = policy, model
        self._pool, self._recent, self._appraiser = pool, recent, appraiser
        self._measured_for_good = measured_for_good
        self.refreshes = 0
        self.reach = REACH * self._copies_within
        self._metric: Float32Array | None = None

    @property
    def _copies_within(self) -> float:
        """Distance from which on a candidate is no copy."""
        return NO_COPY * self._appraiser.apart

    @property
    def _model_counts(self) -> bool:
        return self._model.fitted and self._policy.uses_losses

    @property
    def _appraises(self) -> bool:
        return self._policy.uses_losses or self._policy.weighs_evidence

    def watch(self, ids: IntArray, x: Float32Array, stratum: IntArray) -> None:
        """Take the yardsticks from (n,) samples that were just offered, too."""
        if self._appraises:
            self._appraiser.watch(ids, x, stratum)

    def appraise(self, slots: IntArray, x: Float32Array) -> None:
        """Judge candidates that have just come into the pool, by the model of the last refresh and
        by what was trained on.

        Args:
            slots: (n,) where they are.
            x: (n, columns) their design rows, which the pool holds too, but not in one piece.
        """
        self._pool.floats("worth")[slots] = 1.0
        if not len(slots) or not (self._model_counts or self._policy.weighs_evidence):
            return
        self._place(slots, x)
        self._look_for_copies(slots)
        self._predict(slots, x)

    def _predict(self, slots: IntArray, x: Float32Array) -> None:
        """Say what loss (n,) pooled candidates have and how it ranks, and so what they are worth.

        A loss of their own goes before the model's prediction, while it is fresh."""
        pool = self._pool
        stratum, own = pool.ints("stratum")[slots], pool.floats("own_loss")[slots]
        if not self._measured_for_good:
            age = self.refreshes - pool.ints("own_since")[slots]
            own = np.where(age >= FRESH_REFRESHES, np.nan, own)
        judged = self._appraiser.appraise(x, stratum, own)
        pool.floats("loss")[slots] = judged.loss
        pool.floats("rank")[slots] = judged.rank
        pool.floats("mismatch")[slots] = judged.mismatch
        self._weigh(slots)

    def _place(self, slots: IntArray, x: Float32Array) -> None:
        """Find the (n,) pooled candidates' places in the metric space."""
        if self._model_counts:
            self._pool.z[slots] = self._appraiser.project(x)

    def _look_for_copies(self, slots: IntArray) -> None:
        """Compare (n,) pooled candidates with all that was trained on lately."""
        pool = self._pool
        pool.floats("distance")[slots] = np.inf
        if self._policy.weighs_evidence:
            pool.floats("distance")[slots] = self._recent.nearest_embedding(
                pool.x,
                slots,
                pool.ints("stratum")[slots],
                pool.ints("sample_id")[slots],
                within=self.reach,
                heads=pool.heads,
            )

    def _weigh(self, slots: IntArray) -> None:
        """Renew the utility and the worth of (n,) candidates that have been judged."""
        pool = self._pool
        copy = copy_likelihood(pool.floats("distance")[slots] / self._appraiser.apart)
        mismatch = pool.floats("mismatch")[slots]
        pool.floats("utility")[slots] = self._policy.utility(
            rank=pool.floats("rank")[slots],
            loss=pool.floats("loss")[slots],
            copy=copy,
            mismatch=mismatch,
        )
        if self._policy.weighs_evidence:
            pool.floats("worth")[slots] = worth(copy, mismatch)

    def bring_near(self, ids: IntArray, stratum: IntArray, x: Float32Array) -> None:
        """What waits in the pool may be a copy of what was just trained on.

        Args:
            ids: (n,) samples that were trained on and have left the pool.
            stratum: (n,) their strata.
            x: (n, columns) their design rows.
        """
        if not self._policy.weighs_evidence:
            return
        pool, slots = self._pool, self._pool.slots()
        waiting, before = pool.ints("stratum")[slots], pool.floats("distance")[slots]
        order = np.argsort(stratum, kind="stable")
        counts = np.bincount(stratum, minlength=int(waiting.max(initial=0)) + 1)
        known = x[order]
        near = nearest_of_group(
            pool.x,
            slots,
            pool.ints("sample_id")[slots],
            waiting,
            known,
            ids[order],
            np.append(0, np.cumsum(counts)),
            first=pool.first_of_unit,
            within=self.reach,
            heads=pool.heads,
            known_heads=heads_of(known[:, pool.first_of_unit :]),
        )
        nearer = near < before
        pool.floats("distance")[slots[nearer]] = near[nearer]
        self._weigh(slots[nearer])

    def refresh(self) -> bool:
        """Judge everything anew, model and strata having been refreshed; whether there was need.

        Places in the metric space change with the metric only. Distances to what was trained on
        have been kept up to date; they are looked for again if the yardstick has outgrown them.
        """
        self.refreshes += 1
        if not (self._model_counts or self._policy.weighs_evidence):
            return False
        self._appraiser.refresh()
        slots = self._pool.slots()
        if self._metric is not self._model.metric:
            self.project_again()
        known, self.reach = self.reach, min(self.reach, REACH * self._copies_within)
        if known < self._copies_within:
            self.reach = REACH * self._copies_within
            self._look_for_copies(slots)
        self._predict(slots, self._pool.x[slots])
        return True

    def project_again(self) -> None:
        """Renew all metric vectors, which a checkpoint does not hold."""
        self._metric = self._model.metric
        if self._model_counts:
            slots = self._pool.slots()
            self._place(slots, self._pool.x[slots])
            self._recent.project(self._appraiser.project)
