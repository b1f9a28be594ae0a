"""Highest loss first, over all strata: online hard example mining."""

from __future__ import annotations

from slap_stream.policies.base import PoolView, top
from slap_stream.types import FloatArray, IntArray


class MaxLoss:
    """Trains on what is predicted to have the highest loss, whatever its stratum.

    Reference: Loshchilov and Hutter, "Online batch selection for faster training of neural
        networks", 2015, in the greedy limit.
    """

    proportional = False
    needs_losses = True
    uses_losses = True
    weighs_evidence = False

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """The loss."""
        return loss

    def score(self, view: PoolView) -> FloatArray:
        """The loss, without noise."""
        return view.utility

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The highest losses."""
        return top(view.utility, view, int(quota.sum()))
