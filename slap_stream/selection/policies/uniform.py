"""Uniform in strata: every candidate of a stratum has the same chance."""

from __future__ import annotations

from slap_stream.selection.policies.base import Policy, PoolView, top_of_each_stratum
from slap_stream.types import FloatArray, IntArray


class Uniform(Policy):
    """The baseline that any selection has to beat, and what every policy starts with."""

    proportional = True

    def score(self, view: PoolView) -> FloatArray:
        """Gumbel noise alone."""
        return view.gumbel

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The highest noise of each stratum."""
        return top_of_each_stratum(view.gumbel, view, quota)
