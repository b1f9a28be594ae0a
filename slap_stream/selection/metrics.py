"""Counts over the lanes of a rank, as flat numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slap_stream.selection.lane import Lane
from slap_stream.selection.schedule import LanePlan
from slap_stream.selection.withdrawal import unusable_samples


def count_lanes(lanes: Sequence[Lane]) -> dict[str, float]:
    """Counts of this epoch over these lanes, and how well losses were predicted lately.

    `batch_learnability` and `uniform_learnability` are there once two batches were compared.
    """
    unusable = unusable_samples(lanes)
    result = {
        "offered": float(sum(int(lane.progress.offered.sum()) for lane in lanes)),
        "trained": float(
            sum(int(lane.progress.trained.sum()) - lane.progress.unusable_trained for lane in lanes)
        ),
        "pruned": float(sum(int(lane.progress.pruned.sum()) for lane in lanes)),
        "pooled": float(sum(len(lane.pool) for lane in lanes)),
        "withdrawn": float(
            unusable + sum(lane.intake.withdrawn + lane.counters["withdrawn"] for lane in lanes)
        ),
        "samples_withdrawn": float(unusable),
        "nonfinite_rows": float(sum(lane.intake.nonfinite_rows for lane in lanes)),
    }
    for name in ("observed", "nonfinite", "repeats_in_batch", "batches_repeated"):
        result[name] = float(sum(lane.counters[name] for lane in lanes))
    memories = [lane.feedback.outliers for lane in lanes]
    result["outliers"] = float(sum(memory.found for memory in memories if memory is not None))
    total = sum((lane.feedback.agreement for lane in lanes), np.zeros(6))
    result["prediction_correlation"] = _correlation(*total.tolist())
    for name in ("batch_learnability", "uniform_learnability"):
        known = [lane.gauges[name] for lane in lanes if name in lane.gauges]
        if known:
            result[name] = float(np.mean(known))
    return result


def shards_needed(lanes: Sequence[Lane], plan: LanePlan) -> int:
    """Shards that these lanes need on disk at a time: of the two blocks that are pooled, and of
    those that batches composed ahead may still be of (or the next one, later on)."""
    config, shards = plan.config, 0
    for lane in lanes:
        order = lane.intake.order
        smallest = int(np.diff(order.block_start)[:-1].min(initial=order.num_candidates))
        batches = smallest * config.keep_least / plan.batch_size
        ahead = max(1, math.ceil((config.lookahead + config.length_grouping - 1) / batches))
        shards += (2 + ahead) * order.visits_per_block
    return min(shards, len(plan.table.sizes))


def _correlation(n: float, p: float, y: float, pp: float, yy: float, py: float) -> float:
    if n < 2:
        return 0.0
    spread = (pp - p * p / n) * (yy - y * y / n)
    return (py - p * y / n) / spread**0.5 if spread > 1e-12 else 0.0
