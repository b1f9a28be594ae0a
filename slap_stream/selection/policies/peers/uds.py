"""UDS: utility and diversity of each candidate, from its logits and from what was chosen before."""

from __future__ import annotations

import numpy as np

from slap_stream.selection.policies.base import PoolView, SketchPolicy
from slap_stream.types import FloatArray, IntArray


class Uds(SketchPolicy):
    """The highest sums of utility and diversity, each in units of its spread over the candidates.

    Utility is the nuclear norm of the candidate's logits (supervised tokens x vocabulary): large
    where they are confident and varied. Diversity is the mean distance to a queue of the samples
    chosen last.

    Reference: "Utility-diversity aware online batch selection for LLM supervised fine-tuning"
        (UDS) and the authors' code. Departures: there the logits of prompt and padding count too;
        distances are between random projections of the logits, here between gradient sketches;
        and diversity has a weight of 0.0025 in the units of that projection, here both spreads
        count alike.
    """

    needs = frozenset({"sketches", "chosen_sketches"})
    measurements = ("nuclear_norm",)

    def pick(self, view: PoolView, known: IntArray, sketch: FloatArray, count: int) -> IntArray:
        """The highest scores; the batch's own members do not count against each other."""
        score = in_spreads(view.measurement("nuclear_norm")[known])
        chosen = view.chosen().astype(np.float64)
        if len(chosen):
            score = score + in_spreads(mean_distance(sketch, chosen))
        order: IntArray = np.argsort(-score, kind="stable")
        return order[:count]


def mean_distance(points: FloatArray, others: FloatArray) -> FloatArray:
    """(n,) mean distance of (n, dim) points to (m, dim) others; m must not be 0."""
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2.0 * points @ others.T
    mean: FloatArray = np.sqrt(np.maximum(0.0, squares)).mean(axis=1)
    return mean


def in_spreads(values: FloatArray) -> FloatArray:
    """(n,) values in standard deviations; zero where they do not differ."""
    spread = float(values.std())
    return values / spread if spread > 0.0 else np.zeros(len(values))
