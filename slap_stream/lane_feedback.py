"""What comes back to a lane: losses and sketches of what it gave out."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from slap_stream.feedback import Answers, Awaiting
from slap_stream.judge import Judge
from slap_stream.kernels import weigh
from slap_stream.learnability import LearnabilityModel
from slap_stream.plan import LanePlan
from slap_stream.policies import Policy
from slap_stream.reservoir import Reservoirs
from slap_stream.rng import Purpose, uniforms
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray

logger = logging.getLogger(__name__)

# Losses of trained samples that are learnt from between two refreshes, over all lanes, on average:
# ten refreshes of them, and of what was probed, are many for each column of a design row.
TRAINED_PER_REFRESH = 1024


class LaneFeedback:
    """Takes in answers, and tells the pool what was measured of its candidates.

    Args:
        plan: What all lanes have in common.
        policy: Rule that picks a batch; where it uses no losses, nothing is learnt from them.
        model: Shared model.
        pool: The lane's pool.
        judge: Who counts the lane's refreshes.

    Attributes:
        awaiting_trained: Open questions about what was composed into batches.
        awaiting_probed: Open questions about what was to be probed.
        answers: Finite losses and sketches since the last refresh.
        agreement: (6,) sums over observed samples of 1, p, y, p p, y y and p y, p being the loss
            that was predicted for y.
        counters: Losses observed and not finite, and candidates withdrawn for the latter.
    """

    def __init__(
        self,
        plan: LanePlan,
        policy: Policy,
        model: LearnabilityModel,
        pool: Reservoirs,
        judge: Judge,
    ) -> None:
        self._model, self._pool, self._judge = model, pool, judge
        self._seed = plan.config.seed
        trained = plan.batch_size * plan.num_lanes * plan.config.probe_every
        self._share = min(1.0, TRAINED_PER_REFRESH / trained)
        self._learns = policy.uses_losses or policy.needs_losses
        self.awaiting_trained, self.awaiting_probed = Awaiting(plan.patience), Awaiting(2)
        self.answers = Answers(columns=plan.columns, sketch_dim=plan.config.sketch_dim)
        self.agreement = np.zeros(6)
        self.counters: Counter[str] = Counter()

    def take_probed(
        self,
        ids: IntArray,
        x: Float32Array,
        losses: FloatArray,
        sketches: Float32Array | None = None,
        nuclear_norms: FloatArray | None = None,
    ) -> None:
        """Take in what the probe measured of (n,) samples with design rows x (n, columns)."""
        fine = self._finite(ids, losses)
        ids, losses = ids[fine], losses[fine]
        sketches = None if sketches is None else sketches[fine]
        norms = None if nuclear_norms is None else nuclear_norms[fine]
        if self._learns:
            self.answers.add(ids, x[fine], losses, sketches)
        self._pool.measure(ids, losses, sketches, norms, since=self._judge.refreshes)

    def take_trained(self, ids: IntArray, x: Float32Array, losses: FloatArray) -> None:
        """Take in the losses of (n,) samples that were trained on, with rows x (n, columns).

        Where there are more than are needed, some are drawn to be learnt from.
        """
        fine = self._finite(ids, losses)
        if not fine.all():
            ids, x, losses = ids[fine], x[fine], losses[fine]
        if not self._learns:
            return
        if self._share < 1.0:
            drawn = self._drawn(ids)
            self.answers.add(ids[drawn], x[drawn], losses[drawn])
        else:
            self.answers.add(ids, x, losses)
        if self._model.fitted and len(ids):
            p = weigh(x, self._model.prediction[:1])[:, 0].astype(np.float64)
            sums = [len(p), p.sum(), losses.sum(), p @ p, losses @ losses, p @ losses]
            self.agreement += np.asarray(sums, np.float64)

    def _drawn(self, ids: IntArray) -> BoolArray:
        """(n,) who of (n,) samples is learnt from; does not depend on which come together."""
        refreshes = self._judge.refreshes
        draws = uniforms(self._seed, Purpose.LOSSES, refreshes, ids, np.zeros_like(ids))
        return draws < self._share

    def _finite(self, ids: IntArray, losses: FloatArray) -> BoolArray:
        """(n,) finite losses; the others are counted and their samples withdrawn."""
        fine = np.isfinite(losses)
        self.counters["observed"] += int(np.count_nonzero(fine))
        if not fine.all():
            if not self.counters["nonfinite"]:
                logger.warning(
                    "losses that are not finite came back for %d of %d samples; they are counted "
                    "in nonfinite and left out.",
                    np.count_nonzero(~fine),
                    len(ids),
                )
            self.counters["nonfinite"] += int(np.count_nonzero(~fine))
            slots = self._pool.slots()
            gone = slots[np.isin(self._pool.ints("sample_id")[slots], ids[~fine])]
            self.counters["withdrawn"] += len(gone)
            self._pool.remove(gone)
        return fine

    def refresh(self, forgetting: float) -> None:
        """The model has taken the answers in."""
        self.answers.clear()
        self.agreement *= forgetting
