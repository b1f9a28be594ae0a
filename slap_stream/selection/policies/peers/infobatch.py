"""InfoBatch: prune at random among the low losses, and weigh the survivors up."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.policies.base import Policy, PoolView, recency
from slap_stream.types import BoolArray, FloatArray, IntArray

# r counts as this at most, so that no weight exceeds 5: few survivors of a large r would shake
# the training.
MAX_PRUNED = 0.8


class InfoBatch(Policy):
    """Losses below the mean are pruned with probability r, all others are kept.

    A survivor's loss counts 1 / (1 - r) times, so that the gradient summed over an epoch is, on
    average, that of the full data; `SlapSampler.loss_weights` hands the weights out.

    Reference: Qin et al., "InfoBatch: lossless training speed up by unbiased dynamic data pruning",
        ICLR 2024 (arXiv:2303.04947). Departures: r is fixed there (0.5) and the number kept
        follows; here `keep` is fixed and r = (1 - keep) / (share of losses below the mean), with
        mean and share of the pool. There a sample's loss is that of its last visit; here the
        predicted one, unless it was measured lately. There the last 12.5 % of the epochs prune
        nothing; here they do, because `keep` is exact.
    """

    needs = frozenset({"losses"})
    waits_for_losses = True
    weighs_losses = True

    def score(self, view: PoolView) -> FloatArray:
        """What is to be pruned leaves first, then other low losses; oldest first in each group."""
        low, unlucky, _ = self._draw(view)
        return np.where(low, np.where(unlucky, 0.0, 1.0), 2.0) + recency(view)

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """What is not to be pruned, in the order offered: the pool stays a fair sample."""
        _, unlucky, _ = self._draw(view)
        order: IntArray = np.lexsort((view.occurrence, view.sample_id, view.offered_at, unlucky))
        return order[: int(quota.sum())]

    def loss_weights(self, view: PoolView) -> FloatArray:
        """(n,) weight that each candidate's loss has if it is trained on now."""
        low, _, rate = self._draw(view)
        return np.where(low, 1.0 / (1.0 - rate), 1.0)

    def _draw(self, view: PoolView) -> tuple[BoolArray, BoolArray, float]:
        """(n,) losses below the mean, (n,) those of them to be pruned, and the rate r."""
        if not len(view):
            return np.zeros(0, bool), np.zeros(0, bool), 0.0
        low = view.loss < view.loss.mean()
        rate = min(MAX_PRUNED, (1.0 - float(self.config.keep)) / max(float(low.mean()), 1e-9))
        # The candidate's own draw of this epoch: the Gumbel noise as a uniform number.
        return low, low & (np.exp(-np.exp(-view.gumbel)) < rate), rate
