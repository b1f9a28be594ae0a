"""What a lane thinks of its pooled candidates: renewed when they come, at refreshes, and when
something like them has been trained on."""

from __future__ import annotations

import numpy as np

from slap_stream.appraisal import Appraiser
from slap_stream.evidence import NO_COPY, copy_likelihood, worth
from slap_stream.kernels import nearest_of_group
from slap_stream.learnability import LearnabilityModel
from slap_stream.policies import Policy
from slap_stream.reservoir import RecentlyTrained, Reservoirs
from slap_stream.types import Float32Array, IntArray

# Refreshes after which a measured loss gives way to the prediction: the model has moved on.
FRESH_REFRESHES = 3


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

    def appraise(self, slots: IntArray) -> None:
        """Judge (n,) pooled candidates by the model of the last refresh, and by what was trained
        on."""
        pool = self._pool
        pool.floats("worth")[slots] = 1.0
        if not len(slots) or not (self._model_counts or self._policy.weighs_evidence):
            return
        stratum, own = pool.ints("stratum")[slots], pool.floats("own_loss")[slots]
        if not self._measured_for_good:
            age = self.refreshes - pool.ints("own_since")[slots]
            own = np.where(age >= FRESH_REFRESHES, np.nan, own)
        judged = self._appraiser.appraise(pool.x[slots], stratum, own)
        pool.z[slots] = judged.z
        pool.floats("loss")[slots] = judged.loss
        pool.floats("rank")[slots] = judged.rank
        pool.floats("mismatch")[slots] = judged.mismatch
        pool.floats("distance")[slots] = np.inf
        if self._policy.weighs_evidence:
            distance = self._recent.nearest_embedding(
                pool.unit,
                slots,
                stratum,
                pool.ints("sample_id")[slots],
                within=NO_COPY * self._appraiser.apart,
            )
            pool.floats("distance")[slots] = distance / self._appraiser.apart
        self._weigh(slots)

    def _weigh(self, slots: IntArray) -> None:
        """Renew the utility and the worth of (n,) candidates that have been judged."""
        pool = self._pool
        copy = copy_likelihood(pool.floats("distance")[slots])
        mismatch = pool.floats("mismatch")[slots]
        pool.floats("utility")[slots] = self._policy.utility(
            rank=pool.floats("rank")[slots],
            loss=pool.floats("loss")[slots],
            copy=copy,
            mismatch=mismatch,
        )
        if self._policy.weighs_evidence:
            pool.floats("worth")[slots] = worth(copy, mismatch)

    def bring_near(self, ids: IntArray, stratum: IntArray, unit: Float32Array) -> None:
        """What waits in the pool may be a copy of what was just trained on.

        Args:
            ids: (n,) samples that were trained on and have left the pool.
            stratum: (n,) their strata.
            unit: (n, dim) their unit embeddings.
        """
        if not self._policy.weighs_evidence:
            return
        pool, slots = self._pool, self._pool.slots()
        waiting, before = pool.ints("stratum")[slots], pool.floats("distance")[slots]
        order = np.argsort(stratum, kind="stable")
        counts = np.bincount(stratum, minlength=int(waiting.max(initial=0)) + 1)
        near = nearest_of_group(
            pool.unit,
            slots,
            pool.ints("sample_id")[slots],
            waiting,
            unit[order],
            ids[order],
            np.append(0, np.cumsum(counts)),
            within=NO_COPY * self._appraiser.apart,
        )
        near /= self._appraiser.apart
        nearer = near < before
        pool.floats("distance")[slots[nearer]] = near[nearer]
        self._weigh(slots[nearer])

    def refresh(self) -> bool:
        """Judge everything anew, model and strata having been refreshed; whether there was need."""
        self.refreshes += 1
        if not (self._model_counts or self._policy.weighs_evidence):
            return False
        self._appraiser.refresh()
        self._recent.project(self._appraiser.project)
        self.appraise(self._pool.slots())
        return True

    def project_again(self) -> None:
        """Renew all metric vectors, which a checkpoint does not hold."""
        if self._model_counts:
            slots = self._pool.slots()
            self._pool.z[slots] = self._appraiser.project(self._pool.x[slots])
            self._recent.project(self._appraiser.project)
