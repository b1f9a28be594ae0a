"""DivBS: the batch that represents the pool, its members orthogonal to each other."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.policies.base import PoolView, SketchPolicy
from slap_stream.types import FloatArray, IntArray

# What is left of the mean gradient below this share of it is rounding.
NOTHING_LEFT = 1e-9


class DivBS(SketchPolicy):
    """Each round takes the gradient most aligned with what the batch does not represent yet.

    That is the pool's mean gradient without its projection on the span of the gradients taken
    before; the gradient itself counts, not its direction only.

    Reference: Hong et al., "Diversified batch selection for training acceleration", ICML 2024
        (arXiv:2406.04872), the streamlined greedy algorithm on last-layer gradients. Departures:
        gradients are preconditioned and sketched; the best is taken, where the authors' code draws
        in proportion to the alignment. As there, what is left to fill is drawn at random once
        nothing is left to represent.
    """

    def pick(self, view: PoolView, known: IntArray, sketch: FloatArray, count: int) -> IntArray:
        """Greedy, projecting off what the batch spans."""
        left = sketch.mean(axis=0)
        enough = NOTHING_LEFT * np.linalg.norm(left)
        span = np.zeros((count, sketch.shape[1]))
        free = np.ones(len(sketch), bool)
        picked: list[int] = []
        while len(picked) < count and np.linalg.norm(left) > enough:
            best = int(np.argmax(np.where(free, np.abs(sketch @ left), -np.inf)))
            fresh = sketch[best] - span.T @ (span @ sketch[best])
            length = np.linalg.norm(fresh)
            if length > NOTHING_LEFT * np.linalg.norm(sketch[best]):
                span[len(picked)] = fresh / length
                left = left - span[len(picked)] * (span[len(picked)] @ left)
            free[best] = False
            picked.append(best)
        rest = np.flatnonzero(free)
        rest = rest[np.argsort(-view.gumbel[known[rest]], kind="stable")]
        return np.concatenate([np.array(picked, np.int64), rest[: count - len(picked)]])
