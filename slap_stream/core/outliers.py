"""Outliers: whose value lies above what its group explains, and how sure that is.

Values are centred and scaled by the median and the median absolute deviation of their group. What
is merely scattered lies as often below the centre as above it; so of the values above, as many are
held to be scatter as lie as far below, and only the rest are outliers. Where both tails are alike
nothing is an outlier, however long they are; and a handful of values is never evidence, because
more are assumed to lie below than were seen.

Reference: counting the opposite tail is how knockoffs bound false discoveries (Barber and Candes,
    "Controlling the false discovery rate via knockoffs", Annals of Statistics 2015); taken bin by
    bin it is a local rate (Efron, "Large-scale simultaneous hypothesis testing", JASA 2004).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slap_stream.types import FloatArray, IntArray

# Values of a wider group that a group's centre and scale are shrunk towards.
SHRINKAGE = 16.0
# Median absolute deviations times this are standard deviations, if values are normal.
_NORMAL = 1.4826
LEAST_SCALE = 1e-3
# Edges of the bins, in scales above (or below) the centre. Nearer ones are never outliers.
EDGES = np.array([1.5, 2.0, 2.5, 3.0, 4.0, 6.0, np.inf])


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where the values of each group lie, and how far apart.

    Attributes:
        centre: (rows, columns) centres by group.
        scale: (rows, columns) scales by group.
    """

    centre: FloatArray
    scale: FloatArray

    @classmethod
    def of(
        cls, values: FloatArray, row: IntArray, column: IntArray, *, shape: tuple[int, int]
    ) -> Spread:
        """Centres and scales of (n,) values; thin groups are shrunk towards their row, thin rows
        towards all.

        Args:
            values: (n,) finite values.
            row: (n,) row of each value's group, in [0, shape[0]).
            column: (n,) its column, in [0, shape[1]).
            shape: Rows and columns.
        """
        if not len(values):
            return cls(centre=np.zeros(shape), scale=np.ones(shape))
        middle = float(np.median(values))
        overall = middle, _deviation(values, middle)
        centre, scale = np.full(shape, overall[0]), np.full(shape, overall[1])
        for r, mine in _groups(row):
            of_row = _shrunk(values[mine], *overall)
            centre[r], scale[r] = of_row
            for c, some in _groups(column[mine]):
                centre[r, c], scale[r, c] = _shrunk(values[mine[some]], *of_row)
        return cls(centre=centre, scale=scale)

    def standardised(self, values: FloatArray, row: IntArray, column: IntArray) -> FloatArray:
        """(n,) how many scales above its group's centre each value lies."""
        found: FloatArray = (values - self.centre[row, column]) / self.scale[row, column]
        return found


def _groups(label: IntArray) -> list[tuple[int, IntArray]]:
    """Each label with the positions that have it."""
    order = np.argsort(label, kind="stable")
    names, first = np.unique(label[order], return_index=True)
    return [*zip(names.tolist(), np.split(order, first[1:]), strict=True)]


def _shrunk(values: FloatArray, centre: float, scale: float) -> tuple[float, float]:
    """Centre and scale of a group's values, shrunk towards those of a wider one."""
    weight = len(values) / (len(values) + SHRINKAGE)
    middle = weight * float(np.median(values)) + (1.0 - weight) * centre
    # Of scales that differ tenfold the middle is in between, not next to the larger one.
    return middle, float(_deviation(values, middle) ** weight * scale ** (1.0 - weight))


def _deviation(values: FloatArray, middle: float) -> float:
    return max(LEAST_SCALE, _NORMAL * float(np.median(np.abs(values - middle))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """How sure it is that a standardised value is more than scatter.

    Attributes:
        sureness: (bins,) probability of being an outlier, by bin of `EDGES`; it never falls.
    """

    sureness: FloatArray

    @classmethod
    def of(cls, values: FloatArray) -> Mirror:
        """From (n,) standardised values, those to be judged among them."""
        bins = len(EDGES) - 1
        above = np.bincount(_bin(values) + 1, minlength=bins + 1)[1:]
        below = np.bincount(_bin(-values) + 1, minlength=bins + 1)[1:]
        # As many as lie below, one more, and the error of the count.
        scatter = np.minimum(1.0, (below + 1.0 + np.sqrt(below)) / np.maximum(above, 1))
        return cls(sureness=1.0 - np.minimum.accumulate(scatter))

    def probability(self, values: FloatArray) -> FloatArray:
        """(n,) probability that each of (n,) standardised values is an outlier; 0 for NaN."""
        found: FloatArray = np.append(self.sureness, 0.0)[_bin(values)]
        return found


def _bin(values: FloatArray) -> IntArray:
    """(n,) bin of each value; -1 if it is below all of them or NaN."""
    place = np.searchsorted(EDGES, np.nan_to_num(values, nan=-np.inf), side="right") - 1
    return np.minimum(place, len(EDGES) - 2)
