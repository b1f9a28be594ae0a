"""Uniform in strata: every candidate of a stratum has the same chance."""

from __future__ import annotations

import numpy as np

from slap_stream.policies.base import PoolView, top_of_each_stratum
from slap_stream.types import FloatArray, IntArray


class Uniform:
    """The baseline that any selection has to beat, and what every policy starts with."""

    proportional = True
    needs_losses = False
    uses_losses = False
    weighs_evidence = False

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """Zero: all candidates are worth the same."""
        return np.zeros(len(rank))

    def score(self, view: PoolView) -> FloatArray:
        """Gumbel noise alone."""
        return view.gumbel

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The highest noise of each stratum."""
        return top_of_each_stratum(view.gumbel, view, quota)
