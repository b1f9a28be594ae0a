"""Highest loss first, over all strata: online hard example mining."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.policies.base import Policy, PoolView, top, unmeasured
from slap_stream.types import FloatArray, IntArray


class MaxLoss(Policy):
    """Trains on what has the highest loss, whatever its stratum.

    Losses are predicted unless they were measured lately. With `probe_fraction=1` each candidate
    waits until it was measured.

    Reference: Loshchilov and Hutter, "Online batch selection for faster training of neural
        networks", 2015, in the greedy limit.
    """

    needs = frozenset({"losses"})
    waits_for_losses = True
    measures_all = True

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """The loss."""
        return loss

    def score(self, view: PoolView) -> FloatArray:
        """The loss, without noise; what still waits is not pruned."""
        return np.where(unmeasured(view, self.config), np.inf, view.utility)

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The highest losses."""
        last = unmeasured(view, self.config)
        return top(view.utility, view, int(quota.sum()), last=last)
