"""Compiled loops over rows, and the decorator that compiles; the only importer of numba.

Kernels, these and those of `selection.batch_kernels`, fill arrays that their wrappers allocate,
draw no random numbers and see no Python objects. Each has a twin in `tests/reference.py`. A
row's result does not depend on which rows it is computed with, which is what makes a resumed run
equal to an unbroken one bit by bit: sums are added up in the order that is written, but for `_dot`
and `_power`, whose order is the compiler's and always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from slap_stream.types import Float32Array, FloatArray, IntArray


def njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one way this package compiles: cached on disk, without the interpreter lock."""
    compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return compiled


def njit_vectors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a sum that may be added up in vectors: an eighth of the time."""
    options = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract"}}
    compiled: Callable[..., Any] = numba.njit(**options)(function)
    return compiled


@njit_vectors
def _dot(left: Any, right: Any) -> Any:
    total = np.float32(0.0)
    for k in range(left.shape[0]):
        total += left[k] * right[k]
    return total


@njit_vectors
def _power(row: Any) -> Any:
    total = np.float64(0.0)
    for k in range(row.shape[0]):
        total += np.float64(row[k]) * np.float64(row[k])
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


def weigh(rows: Float32Array, weights: Float32Array) -> Float32Array:
    """Inner products of rows with a few weight vectors, each row on its own.

    Args:
        rows: (n, columns) float32.
        weights: (m, columns) float32; `project` is quicker for many.

    Returns:
        (n, m) float32; row i is bit for bit the same whatever the other rows are.
    """
    if rows.ndim != 2 or weights.ndim != 2 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"rows and weights must be (n, columns) and (m, columns), got {rows.shape} and "
            f"{weights.shape}."
        )
    out = np.empty((rows.shape[0], weights.shape[0]), np.float32)
    _weigh(np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(weights, np.float32), out)
    return out


@njit
def _weigh(rows: Any, weights: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        for j in range(weights.shape[0]):
            out[i, j] = _dot(rows[i], weights[j])


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
    for i in range(rows.shape[0]):
        power = _power(rows[i])
        if power > 0.0:
            scale = 1.0 / np.sqrt(power)
            for j in range(rows.shape[1]):
                out[i, j] = np.float32(rows[i, j] * scale)


def sum_by_group(rows: Float32Array, group: IntArray, num_groups: int) -> FloatArray:
    """Sum rows of each group.

    Args:
        rows: (n, dim) float32.
        group: (n,) groups.
        num_groups: How many groups there are.

    Returns:
        (num_groups, dim) float64 sums, added up in the order given.
    """
    out = np.zeros((num_groups, rows.shape[1]))
    _sum_by_group(
        np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(group, np.int64), out
    )
    return out


@njit
def _sum_by_group(rows: Any, group: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        total = out[group[i]]
        for j in range(rows.shape[1]):
            total[j] += np.float64(rows[i, j])


class Heads(NamedTuple):
    """The first dimensions of unit vectors once more, in one piece, and how much they leave.

    A third of the dimensions and the lengths of the rest bound a product from above: most pairs
    need not be looked at further, and most of the vectors not be fetched from memory.

    Attributes:
        head: (n, head_dim) float32.
        rest: (n,) length of the vector without its head.
    """

    head: Float32Array
    rest: FloatArray

    def put(self, at: Any, other: Heads) -> None:
        """Write (m,) others over those at (m,) places."""
        self.head[at], self.rest[at] = other.head, other.rest


def heads_of(unit: Float32Array) -> Heads:
    """Heads of (n, dim) float32 unit vectors, each from its vector alone."""
    head = np.ascontiguousarray(unit[:, : unit.shape[1] // 48 * 16], np.float32)
    rest = np.empty(len(head))
    _rests(head, rest)
    return Heads(head, rest)


@njit
def _rests(head: Any, out: Any) -> None:
    for i in range(head.shape[0]):
        out[i] = np.sqrt(max(0.0, 1.0 - float(_dot(head[i], head[i]))))


def nearest_of_group(
    vectors: Float32Array,
    at: IntArray,
    sample_id: IntArray,
    group: IntArray,
    known: Float32Array,
    known_id: IntArray,
    start: IntArray,
    *,
    first: int = 0,
    within: float = np.inf,
    heads: Heads | None = None,
    known_heads: Heads | None = None,
    found: IntArray | None = None,
) -> FloatArray:
    """Distance of unit vectors to the nearest known one of their group and of another sample.

    Args:
        vectors: (rows, first + dim) float32, of which the last columns are unit vectors.
        at: (n,) rows that are asked about.
        sample_id: (n,) samples of these.
        group: (n,) groups of these.
        known: (m, first + dim) float32, likewise, group by group.
        known_id: (m,) their samples; negative ones are left out.
        start: (num_groups + 1,) where each group's vectors begin in `known`.
        first: Columns before the unit vectors; they are left out.
        within: Distances from here on need not be told apart, which is quicker with heads.
        heads: Of the (rows,) vectors.
        known_heads: Of the (m,) known ones.
        found: (n,) int64, is given the nearest samples themselves; -1 where the distance is inf.

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
            "vectors, known and known_id must be (rows, columns), (m, columns) and (m,), got "
            f"{vectors.shape}, {known.shape} and {known_id.shape}."
        )
    if heads is None or known_heads is None:
        heads = known_heads = Heads(np.zeros((0, 0), np.float32), np.zeros(0))
    elif len(heads.head) != len(vectors) or len(known_heads.head) != len(known):
        raise ValueError(
            f"heads and known_heads must be those of the {len(vectors)} vectors and {len(known)} "
            f"known, got {len(heads.head)} and {len(known_heads.head)}."
        )
    out = np.full(len(at), np.inf)
    found = np.empty(len(at), np.int64) if found is None else found
    if found.shape != out.shape or found.dtype != np.int64:
        raise ValueError(f"found must be {out.shape} int64, got {found.shape} {found.dtype}.")
    _nearest_of_group(
        np.ascontiguousarray(vectors, np.float32),
        np.ascontiguousarray(at, np.int64),
        np.ascontiguousarray(sample_id, np.int64),
        np.ascontiguousarray(group, np.int64),
        np.ascontiguousarray(known, np.float32),
        np.ascontiguousarray(known_id, np.int64),
        np.ascontiguousarray(start, np.int64),
        heads.head,
        heads.rest,
        known_heads.head,
        known_heads.rest,
        first,
        # What the product of two unit vectors is at that distance.
        max(-np.inf, 1.0 - 0.5 * within * within),
        out,
        found,
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
    head: Any,
    rest: Any,
    known_head: Any,
    known_rest: Any,
    first: int,
    least: float,
    out: Any,
    found: Any,
) -> None:
    bounded = known_head.shape[1] > 0
    for i in range(at.shape[0]):
        row = at[i]
        best, nearest = -np.inf, -1
        for j in range(start[group[i]], start[group[i] + 1]):
            if known_id[j] < 0 or known_id[j] == sample_id[i]:
                continue
            if bounded:
                bound = float(_dot(head[row], known_head[j])) + rest[row] * known_rest[j]
                # With some room for rounding.
                if bound < max(best, least) - 1e-4:
                    continue
            product = float(_dot(vectors[row, first:], known[j, first:]))
            if product > best:
                best, nearest = product, known_id[j]
        found[i] = nearest
        out[i] = np.sqrt(max(0.0, 2.0 - 2.0 * best))
