"""Compiled inner loops of composing a batch: slots of strata, ranks, greedy choice."""

from __future__ import annotations

from typing import Any

import numpy as np

from slap_stream.core.kernels import njit
from slap_stream.types import Float32Array, FloatArray, IntArray


def mid_ranks(
    ordered: FloatArray, start: IntArray, group: IntArray, values: FloatArray
) -> FloatArray:
    """Where values stand among the ordered ones of their group.

    Args:
        ordered: (m,) values, group by group, ascending inside each.
        start: (num_groups + 1,) where each group begins in `ordered`.
        group: (n,) groups.
        values: (n,) values.

    Returns:
        (n,) share of the group that is below, ties counting half; 0 where the group is empty.
    """
    out = np.zeros(len(values))
    _mid_ranks(
        np.ascontiguousarray(ordered, np.float64),
        np.ascontiguousarray(start, np.int64),
        np.ascontiguousarray(group, np.int64),
        np.ascontiguousarray(values, np.float64),
        out,
    )
    return out


@njit
def _mid_ranks(ordered: Any, start: Any, group: Any, values: Any, out: Any) -> None:
    for i in range(values.shape[0]):
        first, last = start[group[i]], start[group[i] + 1]
        if first == last:
            continue
        inside = ordered[first:last]
        below = np.searchsorted(inside, values[i], side="left")
        upto = np.searchsorted(inside, values[i], side="right")
        out[i] = (below + upto) / (2.0 * (last - first))


def shared_and_nearest(gram: Float32Array) -> tuple[FloatArray, FloatArray]:
    """What unit vectors share with each other, from their inner products.

    Args:
        gram: (n, n) float32 inner products, symmetric.

    Returns:
        (n,) mean of the positive parts of a vector's products, its own included, and (n,) its
        largest product with another, -1 if there is none.
    """
    shared, nearest = np.zeros(len(gram)), np.full(len(gram), np.float32(-1.0))
    _shared_and_nearest(np.ascontiguousarray(gram, np.float32), shared, nearest)
    return shared / max(1, len(gram)), nearest.astype(np.float64)


@njit
def _shared_and_nearest(gram: Any, shared: Any, nearest: Any) -> None:
    # Down the columns, which are the rows: sums in order, and yet in vectors.
    for i in range(gram.shape[0]):
        for j in range(gram.shape[0]):
            shared[j] += float(max(gram[i, j], np.float32(0.0)))
        for j in range(i):
            nearest[j] = max(nearest[j], gram[i, j])
        for j in range(i + 1, gram.shape[0]):
            nearest[j] = max(nearest[j], gram[i, j])


def fill_largest(deficit: FloatArray, stock: IntArray, slots: int) -> IntArray:
    """Hand out slots one by one, each to the largest deficit that still has stock.

    Args:
        deficit: (num_strata,) what each stratum is owed, in slots; may be negative.
        stock: (num_strata,) the most each can take.
        slots: How many to hand out, at most the sum of `stock`.

    Returns:
        (num_strata,) slots of each stratum, summing to `slots`; ties go to the lower index.

    Raises:
        ValueError: If there is less stock than slots.
    """
    if deficit.shape != stock.shape or deficit.ndim != 1:
        raise ValueError(
            f"deficit and stock must have the same (num_strata,) shape, got {deficit.shape} and "
            f"{stock.shape}."
        )
    if slots < 0 or int(stock.sum()) < slots:
        raise ValueError(f"slots must be in [0, {int(stock.sum())}], the stock, got {slots}.")
    out = np.zeros(len(deficit), np.int64)
    _fill_largest(
        np.ascontiguousarray(deficit, np.float64),
        np.ascontiguousarray(stock, np.int64),
        slots,
        out,
    )
    return out


@njit
def _fill_largest(deficit: Any, stock: Any, slots: int, out: Any) -> None:
    for _ in range(slots):
        best = -1
        best_deficit = -np.inf
        for k in range(deficit.shape[0]):
            owed = deficit[k] - out[k]
            if out[k] < stock[k] and (best < 0 or owed > best_deficit):
                best = k
                best_deficit = owed
        out[best] += 1


def compose_greedily(
    score: FloatArray,
    gram: Float32Array,
    distance: FloatArray,
    stratum: IntArray,
    quota: IntArray,
    *,
    curvature: float,
    diversity: float,
    typical: float,
    cap: float,
) -> IntArray:
    """Greedy maximisation of a batch's learnability under quotas.

    Each round adds the candidate i with the largest

        score_i - curvature * sum_{j in S} relu(gram_ij) / |batch| + diversity * min(rd_i(S), cap)

    where rd_i(S) is the smaller of `distance_i` and the distance to the nearest member of S, over
    `typical`. The last term is an upper bound of the true marginal: adding i may also bring a
    neighbour closer to members already chosen, which is not charged.

    Args:
        score: (n,) scores s of the shortlist.
        gram: (n, n) inner products of unit vectors of the metric space.
        distance: (n,) distance to the nearest sample trained on lately, inf if none.
        stratum: (n,) stratum of each.
        quota: (num_strata,) slots of each stratum; the batch size is their sum.
        curvature: Weight of shared directions, in units of score.
        diversity: Weight of the relative distance, in units of score.
        typical: Typical nearest-neighbour distance, positive.
        cap: Relative distances above this count as this.

    Returns:
        (batch,) positions in the shortlist, in the order chosen; ties go to the lower position.

    Raises:
        ValueError: If a stratum has fewer candidates than its quota.
    """
    have = np.bincount(stratum, minlength=len(quota))
    if np.any(have < quota):
        short = np.flatnonzero(have < quota)[:5].tolist()
        raise ValueError(
            f"quota must not exceed the shortlist's candidates of a stratum, got more in {short}."
        )
    out = np.full(int(quota.sum()), -1, np.int64)
    _compose_greedily(
        np.ascontiguousarray(score, np.float64),
        np.ascontiguousarray(gram, np.float32),
        np.ascontiguousarray(distance, np.float64).copy(),
        np.ascontiguousarray(stratum, np.int64),
        np.ascontiguousarray(quota, np.int64).copy(),
        float(curvature),
        float(diversity),
        float(typical),
        float(cap),
        out,
    )
    return out


@njit
def _compose_greedily(
    score: Any,
    gram: Any,
    distance: Any,
    stratum: Any,
    quota: Any,
    curvature: float,
    diversity: float,
    typical: float,
    cap: float,
    out: Any,
) -> None:
    n, slots = score.shape[0], out.shape[0]
    shared = np.zeros(n, np.float64)
    # The diversity's term and the largest cosine so far; both seldom change.
    apart = np.zeros(n, np.float64)
    nearest = np.full(n, np.float32(-np.inf))
    gain = np.zeros(n, np.float64)
    closed = np.zeros(n, np.bool_)
    for i in range(n):
        apart[i] = diversity * min(distance[i] / typical, cap)
        closed[i] = quota[stratum[i]] == 0
    weight = curvature / max(1, slots)
    # Several plain loops, over those that are out of question too: the first two are then vectors.
    for slot in range(slots):
        for i in range(n):
            gain[i] = score[i] - weight * shared[i] + apart[i]
        best = -1
        best_gain = -np.inf
        for i in range(n):
            if (gain[i] > best_gain or best < 0) and not closed[i]:
                best = i
                best_gain = gain[i]
        out[slot] = best
        closed[best] = True
        quota[stratum[best]] -= 1
        if quota[stratum[best]] == 0:
            for i in range(n):
                closed[i] |= stratum[i] == stratum[best]
        cosines = gram[best]
        for i in range(n):
            shared[i] += max(float(cosines[i]), 0.0)
        for i in range(n):
            if cosines[i] > nearest[i]:
                nearest[i] = cosines[i]
                chord = float(np.sqrt(max(0.0, 2.0 - 2.0 * float(cosines[i]))))
                distance[i] = min(distance[i], chord)
                apart[i] = diversity * min(distance[i] / typical, cap)


def farthest_points(squared: FloatArray, nearest: FloatArray, count: int) -> IntArray:
    """Farthest-point selection: each round takes the point farthest from all taken before.

    Args:
        squared: (n, n) squared distances.
        nearest: (n,) squared distance to what was taken earlier, inf if nothing was; updated in
            place.
        count: How many to take, at most n.

    Returns:
        (count,) positions in the order taken; ties go to the lower position.

    Raises:
        ValueError: If `count` is negative or larger than n.
    """
    if not 0 <= count <= len(nearest):
        raise ValueError(f"count must be in [0, {len(nearest)}], got {count}.")
    out = np.full(count, -1, np.int64)
    _farthest_points(np.ascontiguousarray(squared, np.float64), nearest, out)
    return out


@njit
def _farthest_points(squared: Any, nearest: Any, out: Any) -> None:
    taken = np.zeros(nearest.shape[0], np.bool_)
    for slot in range(out.shape[0]):
        best = -1
        for i in range(nearest.shape[0]):
            if not taken[i] and (best < 0 or nearest[i] > nearest[best]):
                best = i
        out[slot] = best
        taken[best] = True
        for i in range(nearest.shape[0]):
            nearest[i] = min(nearest[i], squared[best, i])
