"""What a lane tells the others at a refresh, as one flat vector of a fixed size.

Every number is a sum over samples. The sum over lanes is taken in lane order, number by number, so
it comes out the same however the lanes are spread over ranks and however the vector is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slap_stream.types import FloatArray, State

MOMENTS = "moments"
# Gram matrices: the triangle below the diagonal is the one above it, and is not sent.
SYMMETRIC = ("gram", "sketch_gram")


class StatisticsLayout:
    """Where each part of a lane's statistics lies in the vector.

    Args:
        example: Any lane's statistics; the shapes are those of the run and never change.

    Attributes:
        size: Numbers in the vector; depends on embedding, feature, cluster and sketch dimensions,
            not on how many samples there are.
    """

    def __init__(self, example: State) -> None:
        parts = _parts(example)
        self._shapes = {name: np.shape(part) for name, part in parts.items()}
        self._triangle = {
            name: np.triu_indices(self._shapes[name][0]) for name in SYMMETRIC if name in parts
        }
        sizes = [len(self._flat(name, part)) for name, part in parts.items()]
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.size = int(self._bounds[-1])

    def pack(self, statistics: State) -> FloatArray:
        """(size,) numbers of a lane's statistics; nested lists serve as arrays."""
        parts = _parts(statistics)
        vector: FloatArray = np.concatenate(
            [self._flat(name, parts[name]) for name in self._shapes]
        )
        return vector

    def unpack(self, vector: FloatArray) -> State:
        """Inverse of `pack`; without the lane's number, because the vector may be a sum."""
        found: State = {MOMENTS: {}}
        for place, (name, shape) in enumerate(self._shapes.items()):
            numbers = vector[self._bounds[place] : self._bounds[place + 1]]
            if name in self._triangle:
                rows, columns = self._triangle[name]
                part = np.empty(shape)
                part[rows, columns] = part[columns, rows] = numbers
            else:
                part = numbers.reshape(shape).copy()
            home = found[MOMENTS] if name not in _OWN else found
            home[name] = part
        return found

    def _flat(self, name: str, part: Any) -> FloatArray:
        table = np.asarray(part, np.float64)
        if name in self._triangle:
            return table[self._triangle[name]]
        return table.ravel()


_OWN = ("centroid_sum", "centroid_count", "left_worth", "left_count")


def _parts(statistics: State) -> dict[str, Any]:
    moments: Mapping[str, Any] = statistics[MOMENTS]
    return {**moments, **{name: statistics[name] for name in _OWN}}


def sum_in_order(rows: FloatArray) -> FloatArray:
    """(size,) sum of (lanes, size) rows, first to last.

    NumPy's own sum may add in pairs, depending on the shape.
    """
    total: FloatArray = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total
