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
# A group is usual from this share of its row's values on; where means over so few are usual, the
# scale is doubled.
USUAL, FEW = 0.1, 4.0
# Median absolute deviations times this are standard deviations, if values are normal.
_NORMAL = 1.4826
LEAST_SCALE = 1e-3
# Edges of the bins, in scales above (or below) the centre. Nearer ones are never outliers.
EDGES = np.array([1.5, 2.0, 2.5, 3.0, 4.0, 6.0, np.inf])


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where the values of each group lie, and how far apart; values are means over few or many.

    Columns are groups by how many: column c by 2 ** c to 2 ** (c + 1) - 1. Where a mean over a few
    is usual, it says more of which answer was given than of how well: of one-word answers the rare
    ones would stand out, which are as right as the others. So the scale is wider there. Where it is
    not usual, as a single word among long solutions, it stays.

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
        rows, columns = shape
        everyone = np.zeros(len(values), np.int64)
        all_of_them = _medians(values, everyone, 1)
        away = _medians(np.abs(values - all_of_them), everyone, 1)
        wider = all_of_them, np.maximum(LEAST_SCALE, _NORMAL * away)
        centre, scale = _shrunk(values, row, np.repeat(wider, rows, axis=1))
        wider = np.repeat(centre, columns), np.repeat(scale, columns)
        centre, scale = _shrunk(values, row * columns + column, np.stack(wider))
        count = np.bincount(row * columns + column, minlength=rows * columns).reshape(shape)
        usual = count > USUAL * count.sum(axis=1, keepdims=True)
        wider_by = np.where(usual, 1.0 + FEW / (1.5 * 2.0 ** np.arange(columns)), 1.0)
        return cls(centre=centre.reshape(shape), scale=scale.reshape(shape) * wider_by)

    def standardised(self, values: FloatArray, row: IntArray, column: IntArray) -> FloatArray:
        """(n,) how many scales above its group's centre each value lies."""
        found: FloatArray = (values - self.centre[row, column]) / self.scale[row, column]
        return found


def _shrunk(values: FloatArray, group: IntArray, wider: FloatArray) -> FloatArray:
    """(2, groups) centres and scales of (n,) values, shrunk towards (2, groups) wider ones."""
    groups = wider.shape[1]
    count = np.bincount(group, minlength=groups)
    weight, some = count / (count + SHRINKAGE), count > 0
    centre = np.where(some, weight * _medians(values, group, groups), 0.0)
    centre += (1.0 - weight) * wider[0]
    away = _NORMAL * _medians(np.abs(values - centre[group]), group, groups)
    away = np.maximum(LEAST_SCALE, np.where(some, away, 1.0))
    # Of scales that differ tenfold the middle is in between, not next to the larger one.
    return np.stack([centre, away**weight * wider[1] ** (1.0 - weight)])


def _medians(values: FloatArray, group: IntArray, groups: int) -> FloatArray:
    """(groups,) medians of (n,) values by group; 0 where a group has none."""
    ordered = values[np.lexsort((values, group))]
    count = np.bincount(group, minlength=groups)
    start, last = np.cumsum(count) - count, max(0, len(values) - 1)
    low = ordered[np.minimum(start + np.maximum(count - 1, 0) // 2, last)]
    high = ordered[np.minimum(start + count // 2, last)]
    medians: FloatArray = np.where(count > 0, (low + high) / 2.0, 0.0)
    return medians


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
