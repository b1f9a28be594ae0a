"""Compiled inner loops; the only module that imports numba.

Kernels fill arrays that their wrappers allocate, draw no random numbers and see no Python objects.
Each has an obvious twin in `tests/reference.py`. A row's result does not depend on which rows it is
computed with, which is what makes a resumed run equal to an unbroken one bit by bit: sums are added
up in the order that is written, but for `_dot`, whose order is the compiler's and always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from slap_stream.types import Float32Array, FloatArray, IntArray


def njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one way this package compiles: cached on disk, without the interpreter lock."""
    compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return compiled


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _dot(left: Any, right: Any) -> Any:
    # In vectors, which a sum in the order written forbids: an eighth of the time.
    total = np.float32(0.0)
    for k in range(left.shape[0]):
        total += left[k] * right[k]
    return total


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
    whole = matrix.shape[0] // 8 * 8
    # A tile of rows at a time, so that `out` stays in the cache while eight terms are added to
    # each number on the way through registers; the order of the terms is that of k throughout.
    for first in range(0, rows.shape[0], 64):
        last = min(first + 64, rows.shape[0])
        for k in range(0, whole, 8):
            for i in range(first, last):
                w0, w1, w2, w3 = rows[i, k], rows[i, k + 1], rows[i, k + 2], rows[i, k + 3]
                w4, w5, w6, w7 = rows[i, k + 4], rows[i, k + 5], rows[i, k + 6], rows[i, k + 7]
                for j in range(matrix.shape[1]):
                    total = out[i, j] + w0 * matrix[k, j]
                    total += w1 * matrix[k + 1, j]
                    total += w2 * matrix[k + 2, j]
                    total += w3 * matrix[k + 3, j]
                    total += w4 * matrix[k + 4, j]
                    total += w5 * matrix[k + 5, j]
                    total += w6 * matrix[k + 6, j]
                    out[i, j] = total + w7 * matrix[k + 7, j]
        for i in range(first, last):
            for k in range(whole, matrix.shape[0]):
                weight = rows[i, k]
                for j in range(matrix.shape[1]):
                    out[i, j] += weight * matrix[k, j]


def widen_halves(values: NDArray[np.float16]) -> Float32Array:
    """(n, dim) half floats as float32, exactly; a tenth of the time that NumPy takes."""
    out = np.empty(values.shape, np.float32)
    _widen_halves(np.ascontiguousarray(values).view(np.uint16), out.view(np.uint32), out)
    return out


@njit
def _widen_halves(halves: Any, bits: Any, out: Any) -> None:
    for i in range(halves.shape[0]):
        # Sign, then exponent and fraction where float32 has them; its exponents begin 112 lower.
        for j in range(halves.shape[1]):
            half = np.uint32(halves[i, j])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            bits[i, j] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        largest = np.uint16(0)
        for j in range(halves.shape[1]):
            out[i, j] *= np.float32(2.0**112)
            largest = max(largest, halves[i, j] & np.uint16(0x7FFF))
        if largest >= 0x7C00:
            for j in range(halves.shape[1]):
                if (halves[i, j] & np.uint16(0x7FFF)) == 0x7C00:
                    out[i, j] *= np.float32(np.inf)
                elif (halves[i, j] & np.uint16(0x7FFF)) > 0x7C00:
                    out[i, j] = np.float32(np.nan)


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
    power = np.zeros(rows.shape[0], np.float64)
    _row_powers(rows, power)
    for i in range(rows.shape[0]):
        if power[i] > 0.0:
            scale = 1.0 / float(np.sqrt(power[i]))
            for j in range(rows.shape[1]):
                out[i, j] = np.float32(rows[i, j] * scale)


@njit
def _row_powers(rows: Any, out: Any) -> None:
    whole = rows.shape[0] // 4 * 4
    # Four rows abreast: each sum waits for its last term, so one alone leaves the adder idle.
    for i in range(0, whole, 4):
        p0 = p1 = p2 = p3 = 0.0
        for j in range(rows.shape[1]):
            p0 += float(rows[i, j]) * float(rows[i, j])
            p1 += float(rows[i + 1, j]) * float(rows[i + 1, j])
            p2 += float(rows[i + 2, j]) * float(rows[i + 2, j])
            p3 += float(rows[i + 3, j]) * float(rows[i + 3, j])
        out[i], out[i + 1], out[i + 2], out[i + 3] = p0, p1, p2, p3
    for i in range(whole, rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i] += float(rows[i, j]) * float(rows[i, j])


def nearest_of_group(
    vectors: Float32Array,
    at: IntArray,
    sample_id: IntArray,
    group: IntArray,
    known: Float32Array,
    known_id: IntArray,
    start: IntArray,
    *,
    within: float = np.inf,
) -> FloatArray:
    """Distance of unit vectors to the nearest known one of their group and of another sample.

    Args:
        vectors: (rows, dim) float32 unit vectors.
        at: (n,) rows that are asked about.
        sample_id: (n,) samples of these.
        group: (n,) groups of these.
        known: (m, dim) float32 unit vectors, group by group.
        known_id: (m,) their samples; negative ones are left out.
        start: (num_groups + 1,) where each group's vectors begin in `known`.
        within: Distances from here on need not be told apart, which is quicker.

    Returns:
        (n,) distances; inf where there is no other sample, and in place of some beyond `within`.
    """
    if not len(at) == len(sample_id) == len(group):
        raise ValueError(
            "at, sample_id and group must have the same (n,) shape, got "
            f"{at.shape}, {sample_id.shape} and {group.shape}."
        )
    if vectors.shape[1:] != known.shape[1:] or known.shape[:1] != known_id.shape:
        raise ValueError(
            "vectors, known and known_id must be (rows, dim), (m, dim) and (m,), got "
            f"{vectors.shape}, {known.shape} and {known_id.shape}."
        )
    out = np.full(len(at), np.inf)
    _nearest_of_group(
        np.ascontiguousarray(vectors, np.float32),
        np.ascontiguousarray(at, np.int64),
        np.ascontiguousarray(sample_id, np.int64),
        np.ascontiguousarray(group, np.int64),
        np.ascontiguousarray(known, np.float32),
        np.ascontiguousarray(known_id, np.int64),
        np.ascontiguousarray(start, np.int64),
        # What the product of two unit vectors is at that distance.
        max(-np.inf, 1.0 - 0.5 * within * within),
        out,
    )
    return out


@njit
def _nearest_of_group(
    vectors: Any,
    at: Any,
    sample_id: Any,
    group: Any,
    known: Any,
    known_id: Any,
    start: Any,
    least: float,
    out: Any,
) -> None:
    # A third of the dimensions and the lengths of the rest bound a product from above; most pairs
    # need not be looked at further, and most of the vectors not be fetched from memory.
    head = known.shape[1] // 48 * 16 if least > -1.0 else 0
    rest = np.zeros(known.shape[0], np.float64)
    for j in range(known.shape[0] if head else 0):
        rest[j] = _rest(known[j, :head])
    for i in range(at.shape[0]):
        first, last = start[group[i]], start[group[i] + 1]
        vector = vectors[at[i]]
        own_rest = _rest(vector[:head]) if head and first < last else 0.0
        best = -np.inf
        for j in range(first, last):
            if known_id[j] < 0 or known_id[j] == sample_id[i]:
                continue
            if head:
                bound = float(_dot(vector[:head], known[j, :head])) + own_rest * rest[j]
                # With some room for rounding.
                if bound < max(best, least) - 1e-4:
                    continue
            best = max(best, float(_dot(vector, known[j])))
        out[i] = np.sqrt(max(0.0, 2.0 - 2.0 * best))


@njit
def _rest(head: Any) -> float:
    """Length of what is left of a unit vector without its head."""
    return float(np.sqrt(max(0.0, 1.0 - float(_dot(head, head)))))


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


def sum_units_by_group(rows: Float32Array, group: IntArray, num_groups: int) -> FloatArray:
    """Sum rows of each group after scaling them to unit length; zero rows add nothing.

    Args:
        rows: (n, dim) float32.
        group: (n,) groups.
        num_groups: How many groups there are.

    Returns:
        (num_groups, dim) float64 sums, added up in the order given.
    """
    out = np.zeros((num_groups, rows.shape[1]))
    _sum_units_by_group(
        np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(group, np.int64), out
    )
    return out


@njit
def _sum_units_by_group(rows: Any, group: Any, out: Any) -> None:
    power = np.zeros(rows.shape[0], np.float64)
    _row_powers(rows, power)
    for i in range(rows.shape[0]):
        length = max(float(np.sqrt(power[i])), 1e-12)
        total = out[group[i]]
        for j in range(rows.shape[1]):
            total[j] += float(rows[i, j]) / length


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
    # Several plain loops, over those that are out of question too: the first two are then vectors.
    for slot in range(slots):
        for i in range(n):
            gain[i] = score[i] - curvature * shared[i] / slots + apart[i]
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
