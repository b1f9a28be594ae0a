"""Compiled inner loops; the only module that imports numba.

Kernels fill arrays that their wrappers allocate, draw no random numbers and see no Python objects.
Each has an obvious twin in `tests/reference.py`. No kernel reassociates floating-point sums: a
row's result does not depend on which rows it is computed with, which is what makes a resumed run
equal to an unbroken one bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from slap_stream.types import Float32Array, FloatArray, IntArray


def njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one way this package compiles: cached on disk, without the interpreter lock."""
    compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return compiled


def project(rows: Float32Array, matrix: Float32Array) -> Float32Array:
    """Multiply rows by a matrix, each row on its own.

    Args:
        rows: (n, inner) float32.
        matrix: (inner, outer) float32.

    Returns:
        (n, outer) float32; row i is bit for bit the same whatever the other rows are (BLAS does
        not promise that).
    """
    if rows.ndim != 2 or matrix.ndim != 2 or rows.shape[1] != matrix.shape[0]:
        raise ValueError(
            f"rows and matrix must be (n, inner) and (inner, outer), got {rows.shape} and "
            f"{matrix.shape}."
        )
    out = np.zeros((rows.shape[0], matrix.shape[1]), np.float32)
    _project(np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(matrix, np.float32), out)
    return out


@njit
def _project(rows: Any, matrix: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        for k in range(matrix.shape[0]):
            weight = rows[i, k]
            # The inner loop runs over columns, so it vectorises without reordering a sum.
            for j in range(matrix.shape[1]):
                out[i, j] += weight * matrix[k, j]


def unit_rows(rows: Float32Array) -> Float32Array:
    """Scale each row to unit length, on its own; a zero row stays zero.

    Args:
        rows: (n, dim) float32.

    Returns:
        (n, dim) float32, a new array.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows must be (n, dim), got {rows.shape}.")
    out = np.zeros(rows.shape, np.float32)
    _unit_rows(np.ascontiguousarray(rows, np.float32), out)
    return out


@njit
def _unit_rows(rows: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        power = 0.0
        for j in range(rows.shape[1]):
            value = float(rows[i, j])
            power += value * value
        if power > 0.0:
            scale = 1.0 / float(np.sqrt(power))
            for j in range(rows.shape[1]):
                out[i, j] = np.float32(rows[i, j] * scale)


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
    shared = np.zeros(score.shape[0], np.float64)
    taken = np.zeros(score.shape[0], np.bool_)
    for slot in range(out.shape[0]):
        best = -1
        best_gain = -np.inf
        for i in range(score.shape[0]):
            if taken[i] or quota[stratum[i]] == 0:
                continue
            gain = (
                score[i]
                - curvature * shared[i] / out.shape[0]
                + diversity * min(distance[i] / typical, cap)
            )
            if best < 0 or gain > best_gain:
                best = i
                best_gain = gain
        out[slot] = best
        taken[best] = True
        quota[stratum[best]] -= 1
        for i in range(score.shape[0]):
            cosine = float(gram[best, i])
            if cosine > 0.0:
                shared[i] += cosine
            apart = float(np.sqrt(max(0.0, 2.0 - 2.0 * cosine)))
            distance[i] = min(distance[i], apart)


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
