"""GREATS: the batch whose step lowers the loss on a target set most, greedily."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.policies.base import PoolView, SketchPolicy
from slap_stream.types import FloatArray, IntArray

# Weight of what a candidate shares with the batch: the learning rate, which the sampler does not
# know; this is one that is common with Adam. It hardly matters: the other term is far larger.
ETA = 1e-3


class Greats(SketchPolicy):
    """Each round takes the candidate i with the largest

        <g_i, g_target> - ETA * sum_{j in batch} <g_i, g_j>

    the second-order Taylor expansion of the target's loss after a step, the Hessian replaced by
    the identity. g are gradient sketches.

    Reference: Wang et al., "GREATS: online selection of high-quality data for LLM training in every
        iteration", NeurIPS 2024. Departures: gradients are those of the output head, preconditioned
        and sketched, not those of all LoRA layers; without `SlapSampler.set_target` the mean over
        the measured candidates of the pool stands in for the target.
    """

    def pick(self, view: PoolView, known: IntArray, sketch: FloatArray, count: int) -> IntArray:
        """Greedy maximisation of the expansion."""
        target = sketch.mean(axis=0) if view.target is None else view.target.astype(np.float64)
        gain = sketch @ target
        picked = np.zeros(count, np.int64)
        for place in range(count):
            best = picked[place] = np.argmax(gain)
            gain -= ETA * (sketch @ sketch[best])
            gain[best] = -np.inf
        return picked
