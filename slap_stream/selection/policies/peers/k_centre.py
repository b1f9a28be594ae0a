"""k-centre greedy: the candidate farthest from all that was chosen, again and again."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.batch_kernels import farthest_points
from slap_stream.selection.policies.base import PoolView, SlidingPolicy
from slap_stream.types import FloatArray, IntArray


class KCentre(SlidingPolicy):
    """Farthest points in the space of unit embeddings, whatever their stratum.

    Reference: Sener and Savarese, "Active learning for convolutional neural networks: a core-set
        approach", ICLR 2018, the greedy algorithm. Departure: it goes through the data once, so
        what was chosen is the batch and what was trained on lately, not everything so far.
    """

    needs = frozenset({"recent", "embeddings"})

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """Greedy farthest points; the first ones of a run are drawn."""
        order: IntArray = np.lexsort((view.occurrence, view.sample_id, -view.gumbel))
        unit = view.embedding()[order]
        nearest = view.recent.nearest_of_all(unit, view.sample_id[order])
        wide = unit.astype(np.float64)
        squared: FloatArray = np.maximum(0.0, 2.0 - 2.0 * (wide @ wide.T))
        chosen = farthest_points(squared, nearest**2, int(quota.sum()))
        return order[chosen]
