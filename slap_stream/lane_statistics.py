"""What a lane tells the others at a refresh, as one flat vector of a fixed size.

Every number is a sum over samples. The sum over lanes is taken in lane order, number by number, so
it comes out the same however the lanes are spread over ranks and however the vector is cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slap_stream.types import FloatArray, State

MOMENTS = "moments"
COUNTS = ("centroid_sum", "centroid_count", "left_worth", "left_count")


class StatisticsLayout:
    """Where each part of a lane's statistics lies in the vector.

    Args:
        example: Any lane's statistics; the shapes are those of the run and never change.

    Attributes:
        size: Numbers in the vector; depends on embedding, feature, cluster and sketch dimensions,
            not on how many samples there are.
    """

    def __init__(self, example: State) -> None:
        self._shapes = {name: np.shape(part) for name, part in _parts(example).items()}
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.size = int(self._bounds[-1])

    def pack(self, statistics: State) -> FloatArray:
        """(size,) numbers of a lane's statistics; nested lists serve as arrays."""
        parts = _parts(statistics)
        vector: FloatArray = np.concatenate(
            [np.ravel(np.asarray(parts[name], np.float64)) for name in self._shapes]
        )
        return vector

    def unpack(self, vector: FloatArray) -> State:
        """Inverse of `pack`; without the lane's number, because the vector may be a sum."""
        parts = {
            name: vector[self._bounds[place] : self._bounds[place + 1]].reshape(shape).copy()
            for place, (name, shape) in enumerate(self._shapes.items())
        }
        counts = {name: parts.pop(name) for name in COUNTS}
        return {MOMENTS: parts, **counts}


def _parts(statistics: State) -> dict[str, Any]:
    return {**statistics[MOMENTS], **{name: statistics[name] for name in COUNTS}}


def sum_in_order(rows: FloatArray) -> FloatArray:
    """(size,) sum of (lanes, size) rows, first to last.

    NumPy's own sum may add in pairs, depending on the shape.
    """
    total: FloatArray = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total
