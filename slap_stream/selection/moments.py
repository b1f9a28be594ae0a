"""Sums over samples that regression and metric are solved from; lanes and ranks add theirs up."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from slap_stream.core.kernels import unit_rows
from slap_stream.core.linear import row_chunks, single_threaded
from slap_stream.core.saved import Saved
from slap_stream.types import Float32Array, FloatArray, IntArray, State

# Moments that are symmetric matrices.
SYMMETRIC = ("gram", "sketch_gram")
Parts = Float32Array | Sequence[Float32Array]


@dataclass(kw_only=True, slots=True)
class Moments:
    """Sums over samples, all float64; adding two of them adds their samples.

    Products of two columns are added up in float32 over 256 rows at a time, and in float64 from
    there: 1e-6 of a sum, well below the least ridge penalty, in 60 % of the time.

    Attributes:
        gram: (columns, columns) sum of x x^T over samples with a loss.
        cross: (columns,) sum of x * loss.
        square: () sum of loss squared.
        count: () samples with a loss.
        sketch_gram: (columns, columns) sum of x x^T over samples with a sketch.
        sketch_cross: (columns, sketch_dim) sum of x times the sketch, scaled to unit length:
            a long sample's larger gradient is not more of a direction.
        sketch_count: () samples with a sketch.
    """

    gram: FloatArray
    cross: FloatArray
    square: FloatArray
    count: FloatArray
    sketch_gram: FloatArray
    sketch_cross: FloatArray
    sketch_count: FloatArray

    @classmethod
    def zeros(cls, *, columns: int, sketch_dim: int) -> Moments:
        """No samples yet."""
        return cls(
            gram=np.zeros((columns, columns)),
            cross=np.zeros(columns),
            square=np.zeros(()),
            count=np.zeros(()),
            sketch_gram=np.zeros((columns, columns)),
            sketch_cross=np.zeros((columns, sketch_dim)),
            sketch_count=np.zeros(()),
        )

    def add_losses(self, x: Parts, losses: FloatArray) -> None:
        """Add samples that have a loss and no sketch.

        Args:
            x: (n, columns) design rows, in one part or several.
            losses: (n,) finite losses.
        """
        self.gram += self._add(x, losses)

    def add_sketched(self, x: Parts, losses: FloatArray, sketches: Float32Array) -> None:
        """Add samples that have a sketch as well.

        Args:
            x: (n, columns) design rows, in one part or several.
            losses: (n,) finite losses.
            sketches: (n, sketch_dim) finite gradient sketches, none of them zero.
        """
        gram = self._add(x, losses)
        self.gram += gram
        self.sketch_gram += gram
        self.sketch_count += float(len(sketches))
        unit = unit_rows(sketches)
        with single_threaded():
            for start, rows in _chunks(x):
                self.sketch_cross += rows.T @ unit[start : start + len(rows)]

    def _add(self, x: Parts, losses: FloatArray) -> FloatArray:
        """Add losses to all sums but (columns, columns) that of products, which is returned."""
        gram = np.zeros_like(self.gram)
        with single_threaded():
            for start, rows in _chunks(x):
                gram += rows.T @ rows
                self.cross += losses[start : start + len(rows)] @ rows.astype(np.float64)
        self.square += np.sum(losses**2)
        self.count += float(len(losses))
        return gram

    def plus(self, other: Moments, *, decay: float = 1.0, into: Moments | None = None) -> Moments:
        """Another's samples added to the own ones, which are scaled by `decay`; changes neither.

        Args:
            other: The other.
            decay: Factor on the own ones.
            into: Moments that are not needed any more: fresh memory takes several times as long.
        """
        total = copy.deepcopy(self) if into is None else into
        for field in fields(self):
            part = getattr(total, field.name)
            np.multiply(getattr(self, field.name), decay, out=part)
            part += getattr(other, field.name)
        return total

    def to_dict(self) -> State:
        """Plain arrays by name; of the symmetric ones the upper triangle, row by row."""
        upper = _upper(len(self.cross))
        state = {field.name: getattr(self, field.name).copy() for field in fields(self)}
        return state | {name: np.take(state[name], upper) for name in SYMMETRIC}

    @classmethod
    def from_saved(cls, state: Saved, *, columns: int, sketch_dim: int) -> Moments:
        """What `to_dict` gave, of a checkpoint."""
        like = cls.zeros(columns=columns, sketch_dim=sketch_dim).to_dict()
        # Counts and sums of squares have no axes, and are never negative.
        return cls.from_dict(
            {
                name: state.numbers(name, *part.shape, least=-np.inf if part.ndim else 0.0)
                for name, part in like.items()
            }
        )

    @classmethod
    def from_dict(cls, state: State) -> Moments:
        """Inverse of `to_dict`; nested lists are accepted, and entries of other names."""
        parts = {f.name: np.array(state[f.name], np.float64) for f in fields(cls)}
        place = _place_in_triangle(len(parts["cross"]))
        return cls(**parts | {name: parts[name][place] for name in SYMMETRIC})


def _chunks(x: Parts) -> Iterator[tuple[int, Float32Array]]:
    """Where each chunk of rows begins, and its rows."""
    start = 0
    for rows in row_chunks([x] if isinstance(x, np.ndarray) else x):
        yield start, rows
        start += len(rows)


@lru_cache(maxsize=4)
def _upper(columns: int) -> IntArray:
    """Where the numbers of the upper triangle lie in a (columns, columns) matrix."""
    rows, cols = np.triu_indices(columns)
    return rows * columns + cols


@lru_cache(maxsize=4)
def _place_in_triangle(columns: int) -> IntArray:
    """(columns, columns) where each number of a symmetric matrix lies in its upper triangle."""
    upper = np.triu_indices(columns)
    place = np.empty((columns, columns), np.int64)
    place[upper] = place.T[upper] = np.arange(len(upper[0]))
    return place
