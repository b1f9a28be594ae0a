"""Obvious twins of what the package does cleverly; imports nothing of it.

Plain loops over plain numbers, written to be read rather than to be fast. Where a twin must agree
bit for bit it adds up in the order that the docstring of the original promises.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def project(rows: Array, matrix: Array) -> Array:
    """Rows times matrix in float32, each sum in the order of the inner dimension."""
    out = np.zeros((len(rows), matrix.shape[1]), np.float32)
    for i in range(len(rows)):
        for j in range(matrix.shape[1]):
            total = np.float32(0.0)
            for k in range(matrix.shape[0]):
                total = np.float32(total + np.float32(rows[i, k] * matrix[k, j]))
            out[i, j] = total
    return out


def weigh(rows: Array, weights: Array) -> Array:
    """Inner products of each row with each weight vector, in float64."""
    return np.array([[float(np.dot(row, weight)) for weight in weights] for row in rows])


def unit_rows(rows: Array) -> Array:
    """Rows over their lengths; rows without a positive length become zero."""
    out = np.zeros(rows.shape)
    for i, row in enumerate(rows.tolist()):
        length = math.sqrt(sum(value * value for value in row))
        if length > 0.0:
            out[i] = [value / length for value in row]
    return out


def fill_largest(deficit: Array, stock: Array, slots: int) -> list[int]:
    """Slot by slot to whoever is owed most and still has stock; ties go to the lower index."""
    given = [0] * len(deficit)
    for _ in range(slots):
        able = [k for k in range(len(deficit)) if given[k] < stock[k]]
        best = max(able, key=lambda k: (deficit[k] - given[k], -k))
        given[best] += 1
    return given


def gain(
    i: int,
    chosen: Sequence[int],
    batch_size: int,
    score: Array,
    gram: Array,
    distance: Array,
    *,
    curvature: float,
    diversity: float,
    typical: float,
    cap: float,
) -> float:
    """What adding candidate i to the chosen ones is counted as."""
    shared = 0.0
    nearest = float(distance[i])
    for j in chosen:
        cosine = float(gram[j, i])
        shared += max(0.0, cosine)
        nearest = min(nearest, math.sqrt(max(0.0, 2.0 - 2.0 * cosine)))
    return (
        float(score[i]) - curvature / batch_size * shared + diversity * min(nearest / typical, cap)
    )


def compose_greedily(
    score: Array, gram: Array, distance: Array, stratum: Array, quota: Array, **weights: float
) -> list[int]:
    """Round by round the candidate with the largest gain; ties go to the lower position."""
    left = quota.tolist()
    chosen: list[int] = []
    for _ in range(int(quota.sum())):
        able = [i for i in range(len(score)) if i not in chosen and left[stratum[i]]]
        gains = {
            i: gain(i, chosen, int(quota.sum()), score, gram, distance, **weights) for i in able
        }
        best = max(able, key=lambda i: (gains[i], -i))
        chosen.append(best)
        left[stratum[best]] -= 1
    return chosen


def learnability(
    batch: Sequence[int],
    score: Array,
    gram: Array,
    distance: Array,
    *,
    curvature: float,
    diversity: float,
    typical: float,
    cap: float,
) -> float:
    """U(S) of the design, term by term."""
    total = 0.0
    for i in batch:
        nearest = float(distance[i])
        for j in batch:
            if i != j:
                cosine = float(gram[i, j])
                nearest = min(nearest, math.sqrt(max(0.0, 2.0 - 2.0 * cosine)))
        total += float(score[i]) + diversity * min(nearest / typical, cap)
    for i, j in combinations(batch, 2):
        total -= curvature * max(0.0, float(gram[i, j])) / len(batch)
    return total


def batches_of(stratum: Array, quota: Array) -> list[tuple[int, ...]]:
    """Every set of positions that fills the quotas exactly."""
    return [
        batch
        for batch in combinations(range(len(stratum)), int(quota.sum()))
        if np.array_equal(np.bincount(stratum[list(batch)], minlength=len(quota)), quota)
    ]


def farthest_points(squared: Array, nearest: Array, count: int) -> list[int]:
    """Round by round the point farthest from all taken; ties go to the lower position."""
    taken: list[int] = []
    for _ in range(count):
        able = [i for i in range(len(nearest)) if i not in taken]
        far = {i: min([float(nearest[i]), *(float(squared[j, i]) for j in taken)]) for i in able}
        taken.append(max(able, key=lambda i: (far[i], -i)))
    return taken


def splitmix64(value: int) -> int:
    """One step of SplitMix64 in Python's unbounded integers."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def rank(
    value: float, name: int, values: Sequence[float], stratum: Sequence[int], shrinkage: float
) -> float:
    """Mid-rank inside the stratum, shrunk towards the mid-rank among all."""
    if not len(values):
        return 0.5

    def mid_rank(others: list[float]) -> float:
        below = sum(other < value for other in others)
        equal = sum(other == value for other in others)
        return (below + equal / 2) / len(others)

    own = [other for other, label in zip(values, stratum, strict=True) if label == name]
    overall = mid_rank(list(values))
    if not own:
        return overall
    return (mid_rank(own) * len(own) + overall * shrinkage) / (len(own) + shrinkage)


def match_oldest(
    wanted: Sequence[int], ids: Sequence[int], steps: Sequence[int]
) -> list[int | None]:
    """For each answer the oldest question of its id that no earlier answer took."""
    taken: set[int] = set()
    found: list[int | None] = []
    for name in wanted:
        open_ = [i for i in range(len(ids)) if ids[i] == name and i not in taken]
        oldest = min(open_, key=lambda i: (steps[i], i), default=None)
        if oldest is not None:
            taken.add(oldest)
        found.append(oldest)
    return found


def copy_number(sample_id: Sequence[int], occurrence: Sequence[int]) -> list[int]:
    """How many earlier occurrences of the same sample there are."""
    pairs = list(zip(sample_id, occurrence, strict=True))
    return [sum(a == c and b < d for a, b in pairs) for c, d in pairs]


def ridge(x: Array, y: Array, penalties: Array) -> tuple[Array, float]:
    """Ridge regression with the penalty that minimises generalized cross-validation.

    Columns are scaled to unit mean square, targets are taken around their mean, penalties are
    relative to the number of samples.

    Returns:
        The coefficients of the scaled-back columns (the intercept, column 0, holds the mean), and
        the standard deviation of the error that cross-validation expects.
    """
    count = len(x)
    power = (x**2).mean(axis=0)
    scale = np.where(power > 0, 1 / np.sqrt(np.where(power > 0, power, 1.0)), 0.0)
    scaled, target = x * scale, y - y.mean()
    best = (np.inf, np.zeros(x.shape[1]))
    for relative in penalties:
        inverse = np.linalg.inv(scaled.T @ scaled + relative * count * np.eye(x.shape[1]))
        hat = scaled @ inverse @ scaled.T
        free = count - np.trace(hat)
        score = ((target - hat @ target) ** 2).sum() / free**2
        if free > 1.0 and score < best[0]:
            best = score, scale * (inverse @ scaled.T @ target)
    coefficient = best[1].copy()
    coefficient[0] += y.mean()
    return coefficient, math.sqrt(best[0] * count)


def metric(x: Array, sketches: Array, metric_dim: int) -> Array:
    """(columns, metric_dim) map whose inner products follow those of the predicted sketches.

    Rows and unit sketches are centred, columns scaled to unit variance, the ridge penalty is
    metric_dim over the number of samples; column 0 is the intercept and counts for nothing.
    """
    unit = sketches / np.linalg.norm(sketches, axis=1, keepdims=True)
    unit = unit - unit.mean(axis=0)
    spread = x[:, 1:].std(axis=0)
    rows = (x[:, 1:] - x[:, 1:].mean(axis=0)) / spread
    penalty = metric_dim * np.eye(rows.shape[1])
    weights = np.linalg.inv(rows.T @ rows + penalty) @ rows.T @ unit
    _, _, right = np.linalg.svd(rows @ weights, full_matrices=False)
    return np.vstack([np.zeros(metric_dim), (weights @ right[:metric_dim].T) / spread[:, None]])


def along_arc(
    place: Sequence[float], offered_at: Sequence[int], begin: float, length: float
) -> tuple[list[int], list[int]]:
    """Places on an arc of a circle of circumference 1 as offered, and the others going on from its
    end."""
    far = [(p - begin) % 1.0 for p in place]
    on = [i for i in range(len(far)) if far[i] <= length]
    off = [i for i in range(len(far)) if far[i] > length]
    return sorted(on, key=lambda i: offered_at[i]), sorted(off, key=lambda i: far[i])


def farthest_from(unit: Array, known: Array, count: int, *, first: int) -> list[int]:
    """k-centre greedy: always the point whose nearest known or chosen one is farthest."""
    chosen: list[int] = []
    while len(chosen) < count:
        centres = [*known, *(unit[i] for i in chosen)]
        rest = [i for i in range(len(unit)) if i not in chosen]
        if not centres:
            chosen.append(first)
            continue
        chosen.append(
            max(rest, key=lambda i: min(float(np.linalg.norm(unit[i] - c)) for c in centres))
        )
    return chosen


def greats(sketch: Array, target: Array, count: int, *, eta: float) -> list[int]:
    """Greedy for the gain on the target less what is shared with what was chosen before."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [i for i in range(len(sketch)) if i not in chosen]
        gain = {
            i: sketch[i] @ target - eta * sum(sketch[i] @ sketch[j] for j in chosen) for i in rest
        }
        chosen.append(max(rest, key=lambda i: gain[i]))
    return chosen


def divbs(sketch: Array, count: int) -> tuple[list[int], float]:
    """Greedy for alignment with what the chosen do not span of the mean, by least squares.

    Also returns how close two candidates came in a round, relative to the best alignment.
    """
    chosen: list[int] = []
    mean, closest = sketch.mean(axis=0), 1.0
    for _ in range(count):
        left = mean
        if chosen:
            basis = sketch[chosen].T
            left = mean - basis @ np.linalg.lstsq(basis, mean, rcond=None)[0]
        rest = [i for i in range(len(sketch)) if i not in chosen]
        aligned = sorted(((abs(sketch[i] @ left), -i) for i in rest), reverse=True)
        if len(aligned) > 1:
            closest = min(closest, 1.0 - aligned[1][0] / aligned[0][0])
        chosen.append(-aligned[0][1])
    return chosen, closest


def uds(norms: Array, sketch: Array, queue: Array, count: int) -> list[int]:
    """The highest nuclear norms plus mean distances to the queue, each over its spread."""
    score = [0.0] * len(norms)
    terms = [list(norms)]
    if len(queue):
        terms.append([float(np.mean([np.linalg.norm(s - q) for q in queue])) for s in sketch])
    for values in terms:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        if spread > 0.0:
            score = [total + value / spread for total, value in zip(score, values, strict=True)]
    return sorted(range(len(score)), key=lambda i: -score[i])[:count]


def nearest_of_group(
    vectors: Array, at: Array, sample_id: Array, group: Array, known: Array, known_id: Array,
    start: Array,
) -> Array:  # fmt: skip
    """Distance to the nearest known vector of the group and of another sample."""
    result = []
    for row, mine, name in zip(at, sample_id, group, strict=True):
        others = [j for j in range(start[name], start[name + 1]) if known_id[j] not in (mine, -1)]
        gaps = [float(np.linalg.norm(vectors[row].astype(float) - known[j])) for j in others]
        result.append(min(gaps, default=math.inf))
    return np.array(result)


def mid_ranks(ordered: Array, start: Array, group: Array, values: Array) -> list[float]:
    """Share of the group below, ties counting half."""
    result = []
    for value, name in zip(values.tolist(), group, strict=True):
        inside = ordered[start[name] : start[name + 1]].tolist()
        score = sum((other < value) + (other == value) / 2 for other in inside)
        result.append(score / len(inside) if inside else 0.0)
    return result


def sum_by_group(rows: Array, group: Array, num_groups: int) -> Array:
    """Sums of the rows, group by group."""
    out = np.zeros((num_groups, rows.shape[1]))
    for row, name in zip(rows.astype(float), group, strict=True):
        out[name] += row
    return out


def shared_and_nearest(gram: Array) -> tuple[list[float], list[float]]:
    """Mean of the positive parts of each row, and its largest entry off the diagonal."""
    rows = gram.astype(float).tolist()
    shared = [sum(max(value, 0.0) for value in row) / len(row) for row in rows]
    nearest = [max([-1.0, *row[:i], *row[i + 1 :]]) for i, row in enumerate(rows)]
    return shared, nearest


def spread(
    values: list[float], row: list[int], column: list[int], shape: tuple[int, int]
) -> tuple[list[list[float]], list[list[float]]]:
    """Centre and scale of each group, shrunk towards its row, and that towards all."""

    def of(some: list[float], centre: float, scale: float) -> tuple[float, float]:
        if not some:
            return centre, scale
        weight = len(some) / (len(some) + 16.0)
        middle = weight * statistics.median(some) + (1.0 - weight) * centre
        away = max(1e-3, 1.4826 * statistics.median(abs(v - middle) for v in some))
        return middle, away**weight * scale ** (1.0 - weight)

    middle = statistics.median(values)
    overall = middle, max(1e-3, 1.4826 * statistics.median(abs(v - middle) for v in values))
    centres, scales = [], []
    for r in range(shape[0]):
        of_row = of([v for v, at in zip(values, row, strict=True) if at == r], *overall)
        cells = [
            of(
                [v for v, a, b in zip(values, row, column, strict=True) if (a, b) == (r, c)],
                *of_row,
            )
            for c in range(shape[1])
        ]
        centres.append([centre for centre, _ in cells])
        held = [at for at, in_row in zip(column, row, strict=True) if in_row == r]
        scales.append(
            [
                scale * (1 + 4 / (1.5 * 2**c) if held.count(c) > 0.1 * len(held) else 1)
                for c, (_, scale) in enumerate(cells)
            ]
        )
    return centres, scales
