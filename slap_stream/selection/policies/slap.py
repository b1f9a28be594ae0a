"""SLAP: a stratum's candidates by learnability, a batch by what its members add to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.selection.batch_kernels import compose_greedily, shared_and_nearest
from slap_stream.selection.policies.base import Policy, PoolView, top_of_each_stratum
from slap_stream.types import REFERENCE_COLUMN, Float32Array, FloatArray, IntArray

# Relative distances beyond the typical one are not worth more: outliers would win every slot.
DISTANCE_CAP = 1.0
RANK_WEIGHT, RANK_WEIGHT_WITH_REFERENCE = 0.4, 8.0


class Slap(Policy):
    """Score candidates one by one, then compose the batch greedily from a shortlist.

    s = u + Gumbel noise, where u rewards the rank of the length-residual loss and
    charges near-copies of what was trained on and targets of other prompts;

        U(S) = sum_i s_i - curvature * sum_{i<j} relu(<z_i, z_j>) / |S|
               + diversity * sum_i min(rd_i(S), cap)

    Reference: SLAP, arXiv:2605.23969, for strata, relative distance and Hessian-approximated
        gradients in one composition; the formulas are this project's.
    """

    # It does not wait for losses: ranks are equal and the metric space is empty until these can be
    # predicted, but copies and mismatches are known from the start.
    needs = frozenset({"losses", "evidence", "recent"})
    proportional = True
    compares_batches = True

    def __init__(self, config: SlapConfig, columns: Sequence[str] = ()) -> None:
        super().__init__(config, columns)
        by_default = RANK_WEIGHT_WITH_REFERENCE if REFERENCE_COLUMN in columns else RANK_WEIGHT
        given = config.advanced.rank_weight
        self._rank_weight = by_default if given is None else given

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """u = rank_weight * min(rank, cap) - copy_weight * copy - mismatch_weight * mismatch."""
        weights = self.config.advanced
        utility: FloatArray = (
            self._rank_weight * np.minimum(rank, weights.rank_cap)
            - weights.copy_weight * copy
            - weights.mismatch_weight * mismatch
        )
        return utility

    def score(self, view: PoolView) -> FloatArray:
        """s = u + Gumbel noise."""
        return view.utility + view.gumbel

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """Greedy maximisation of U over a shortlist of the highest s in each stratum."""
        score = self.score(view)
        # Who is on the shortlist does not depend on its order; the order decides ties only.
        shortlist = top_of_each_stratum(score, view, quota * self.config.advanced.shortlist)
        s, stratum = score[shortlist], view.stratum[shortlist]
        z = view.z(shortlist)
        # Of two arrays, or NumPy makes half of it and copies that over, which takes longer.
        gram: Float32Array = z @ z.T.copy()
        distance = view.recent.nearest(z, stratum, view.sample_id[shortlist])
        curvature, diversity = self._weights(s, gram, distance / view.typical, view.typical)
        chosen = compose_greedily(
            s,
            gram,
            distance,
            stratum,
            quota,
            curvature=curvature,
            diversity=diversity,
            typical=view.typical,
            cap=DISTANCE_CAP,
        )
        return shortlist[chosen]

    def learnability(self, view: PoolView, batches: Sequence[IntArray]) -> list[float]:
        """U of several batches per member, in units of s.

        Args:
            view: Candidates.
            batches: (n,) positions of each batch in the view. The weights of the terms are set over
                all of them, so that they can be compared.
        """
        scale = np.concatenate(batches)
        score, z = self.score(view)[scale], view.z(scale)
        near = view.recent.nearest(z, view.stratum[scale], view.sample_id[scale])
        gram: Float32Array = z @ z.T.copy()
        curvature, diversity = self._weights(score, gram, near / view.typical, view.typical)
        found, start = [], 0
        for batch in batches:
            here = slice(start, start + len(batch))
            start += len(batch)
            nearest = np.minimum(near[here], _chord(shared_and_nearest(gram[here, here])[1]))
            relative = np.minimum(nearest / view.typical, DISTANCE_CAP)
            pairs = np.maximum(gram[here, here].astype(np.float64), 0.0)
            shared = (pairs.sum() - np.trace(pairs)) / 2.0 / len(batch)
            total = score[here].sum() - curvature * shared + diversity * relative.sum()
            found.append(float(total) / len(batch))
        return found

    def _weights(
        self, s: FloatArray, gram: Float32Array, relative: FloatArray, typical: float
    ) -> tuple[float, float]:
        """Absolute weights that give each term its share of the spread of s.

        A candidate's distance counts to what was trained on lately and to the others here, so
        that mutual copies are told apart from what stands alone.
        """
        spread = float(s.std()) if len(s) else 0.0
        means, nearest = shared_and_nearest(gram)
        shared = float(means.std()) if len(s) else 0.0
        relative = np.minimum(relative, _chord(nearest) / typical)
        near = float(np.minimum(relative, DISTANCE_CAP).std()) if len(s) else 0.0
        return (
            self.config.advanced.curvature * spread / shared if shared > 1e-6 else 0.0,
            self.config.advanced.diversity * spread / near if near > 1e-6 else 0.0,
        )


def _chord(cosine: FloatArray) -> FloatArray:
    """(n,) distances of unit vectors with (n,) such inner products."""
    distance: FloatArray = np.sqrt(2.0 - 2.0 * np.clip(cosine, -1.0, 1.0))
    return distance
