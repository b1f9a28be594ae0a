"""The closest reconstruction of SLAP as its paper and its predecessor's reviews describe it."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.batch_kernels import farthest_points, fill_largest
from slap_stream.selection.policies.base import Policy, PoolView
from slap_stream.types import FloatArray, IntArray

NUM_LOSS_STRATA = 8


class SlapPaper(Policy):
    """Strata by loss, counts drawn with p ~ exp(loss), farthest points inside each.

    Strata are equal-sized bins of the losses in the window. Inside a stratum samples are taken
    greedily by their distance in the metric of preconditioned gradients, also to what earlier
    strata took, highest losses first. What was not taken leaves the window oldest first.

    Reference: SLAP, arXiv:2605.23969 (abstract), and OptBatch (ICLR 2025 submission, reviews). We
        depart where these cannot be followed without a gradient of every candidate: distances
        are taken between the unit vectors of the learned metric space, not between row norms of
        per-sample gradients.
    """

    needs = frozenset({"losses"})
    waits_for_losses = True

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """The loss."""
        return loss

    def score(self, view: PoolView) -> FloatArray:
        """How late a candidate was offered: the window slides."""
        return view.offered_at.astype(np.float64)

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """Draw counts for the loss strata, then take farthest points in each."""
        slots = int(quota.sum())
        if not slots:
            return np.zeros(0, np.int64)
        by_loss = np.lexsort((view.occurrence, view.sample_id, -view.loss))
        bins = np.array_split(by_loss, min(NUM_LOSS_STRATA, len(by_loss)))
        level = np.array([view.loss[members].mean() for members in bins])
        chance = np.exp(level - level.max())
        drawn = view.rng().multinomial(slots, chance / chance.sum())
        stock = np.array([len(members) for members in bins])
        # A stratum that is drawn more often than it has members passes the rest on to those drawn
        # most in relation to their stock.
        counts = np.minimum(drawn, stock)
        counts = counts + fill_largest(
            (drawn - counts).astype(np.float64), stock - counts, slots - int(counts.sum())
        )
        taken: list[IntArray] = []
        for members, count in zip(bins, counts, strict=True):
            if not count:
                continue
            z = view.z(members).astype(np.float64)
            nearest = np.full(len(members), np.inf)
            if taken:
                earlier = view.z(np.concatenate(taken)).astype(np.float64)
                nearest = _squared_distances(z, earlier).min(axis=1)
            inside = _squared_distances(z, z)
            taken.append(members[farthest_points(inside, nearest, int(count))])
        return np.concatenate(taken)


def _squared_distances(left: FloatArray, right: FloatArray) -> FloatArray:
    distances: FloatArray = np.maximum(0.0, 2.0 - 2.0 * (left @ right.T))
    return distances
