"""What the current model is predicted to learn from a sample, and which samples teach alike.

A few candidates are probed and all trained ones report their loss; a ridge regression carries both
to every other candidate through its embedding and feature columns. Gradient sketches teach a
linear map from the same columns to a small metric space in which inner products follow those of
preconditioned gradients.

Everything here is a sum over samples (`Moments`), so lanes and ranks can be added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
from threadpoolctl import ThreadpoolController

from slap_stream.kernels import mid_ranks, widen_halves
from slap_stream.types import Float32Array, FloatArray, IntArray, Rows, State

# Columns of a design row that come before the store's feature columns.
INTERCEPT, LOG_LENGTH = 0, 1
NUM_OWN_COLUMNS = 2
# Moments that are symmetric matrices.
SYMMETRIC = ("gram", "sketch_gram")
# Ridge penalties tried, relative to the number of samples (columns are scaled to unit power).
PENALTIES = np.logspace(-5, 0.5, 23)
# With fewer sketches than this for each dimension, principal components of the embeddings serve.
SKETCHES_PER_DIMENSION = 2
# Samples of other strata that a stratum's rank is shrunk towards.
RANK_SHRINKAGE = 8.0

_blas = ThreadpoolController().select(user_api="blas").lib_controllers


@contextmanager
def single_threaded() -> Iterator[None]:
    """Context in which BLAS uses one thread: its sums then do not depend on the machine's cores.

    Entered at every batch: threadpoolctl's own context costs several times as much, above all when
    its code is not in the caches.
    """
    before = [library.get_num_threads() for library in _blas]
    several = [(library, count) for library, count in zip(_blas, before, strict=True) if count != 1]
    for library, _ in several:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, count in several:
            library.set_num_threads(count)


def design_rows(rows: Rows) -> Float32Array:
    """(n, 2 + num_features + dim) float32: intercept, log length, feature columns, embedding.

    Values that are not finite become zero: one bad cell must not spoil a regression over all.
    """
    return checked_rows(rows)[0]


def checked_rows(rows: Rows) -> tuple[Float32Array, int]:
    """Design rows, and how many of them held a value that is not finite."""
    num_features, dim = rows.feature.shape[1], rows.embedding.shape[1]
    table = np.empty((len(rows), NUM_OWN_COLUMNS + num_features + dim), np.float32)
    half = rows.embedding.dtype == np.float16
    table[:, INTERCEPT] = 1.0
    table[:, LOG_LENGTH] = np.log1p(np.maximum(rows.length, 0))
    table[:, NUM_OWN_COLUMNS : NUM_OWN_COLUMNS + num_features] = rows.feature
    table[:, -dim:] = widen_halves(rows.embedding) if half else rows.embedding
    fine = np.isfinite(table)
    if fine.all():
        return table, 0
    table[~fine] = 0.0
    return table, int(np.count_nonzero(~fine.all(axis=1)))


@dataclass(kw_only=True, slots=True)
class Moments:
    """Sums over samples, all float64; adding two of them adds their samples.

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

    def add_losses(self, x: Float32Array, losses: FloatArray) -> None:
        """Add samples with design rows x (n, columns) and finite losses (n,)."""
        wide = x.astype(np.float64)
        with single_threaded():
            self.gram += wide.T @ wide
            self.cross += wide.T @ losses
        self.square += np.sum(losses**2)
        self.count += float(len(losses))

    def add_sketches(self, x: Float32Array, sketches: Float32Array) -> None:
        """Add finite, non-zero gradient sketches (n, sketch_dim) of samples with rows x."""
        wide = x.astype(np.float64)
        unit = sketches.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        with single_threaded():
            self.sketch_gram += wide.T @ wide
            self.sketch_cross += wide.T @ unit
        self.sketch_count += float(len(unit))

    def add(self, other: Moments, *, forgetting: float = 1.0) -> None:
        """Add another's samples after scaling the own ones by `forgetting`."""
        for field in fields(self):
            mine = getattr(self, field.name)
            setattr(self, field.name, mine * forgetting + getattr(other, field.name))

    def to_dict(self) -> State:
        """Plain arrays by name; of the symmetric ones the upper triangle, row by row."""
        upper = np.triu_indices(len(self.cross))
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return state | {name: state[name][upper] for name in SYMMETRIC}

    @classmethod
    def from_dict(cls, state: State) -> Moments:
        """Inverse of `to_dict`; nested lists are accepted."""
        parts = {f.name: np.array(state[f.name], np.float64) for f in fields(cls)}
        columns = len(parts["cross"])
        upper = np.triu_indices(columns)
        for name in SYMMETRIC:
            whole = np.empty((columns, columns))
            whole[upper] = whole.T[upper] = parts[name]
            parts[name] = whole
        return cls(**parts)


class LearnabilityModel:
    """Loss and metric predicted from a design row.

    Args:
        columns: Columns of a design row.
        dim: Embedding dimensions; the last columns.
        metric_dim: Dimensions of the metric space, at most.
        sketch_dim: Length of a sketch.
        warmup_losses: Losses needed before anything is predicted.
        length_columns: Design columns that say how long a sample and its target are.
        reference_column: Design column that holds a reference model's loss, if there is one.

    Attributes:
        coefficient: (columns,) float32; x times it is the predicted loss.
        excess: (columns,) float32; x times it is the predicted loss beyond what the length alone
            explains (beyond the reference model's, where there is one).
        metric: (columns, metric_dim) float32; x times it, scaled to unit length, is z.
        noise: Standard deviation of the loss around its prediction.
        fitted: Whether enough losses were seen.
        metric_from_sketches: Whether gradients made the metric; otherwise principal components.
    """

    def __init__(
        self,
        *,
        columns: int,
        dim: int,
        metric_dim: int,
        sketch_dim: int,
        warmup_losses: int,
        length_columns: Sequence[int] = (INTERCEPT, LOG_LENGTH),
        reference_column: int | None = None,
    ) -> None:
        self._dim = dim
        self._metric_dim = min(metric_dim, dim, sketch_dim)
        self._warmup_losses = warmup_losses
        self._length_columns = tuple(length_columns)
        self._reference_column = reference_column
        self.moments = Moments.zeros(columns=columns, sketch_dim=sketch_dim)
        self.coefficient: Float32Array = np.zeros(columns, np.float32)
        self.excess: Float32Array = np.zeros(columns, np.float32)
        self.metric: Float32Array = np.zeros((columns, self._metric_dim), np.float32)
        self.noise = 0.0
        self.fitted = False
        self.metric_from_sketches = False
        # Derived from the moments of the last refresh; solved again after a resume.
        self._spectrum: tuple[FloatArray, FloatArray, FloatArray, float] | None = None

    @property
    def readout(self) -> Float32Array:
        """(columns, 2 + metric_dim): predicted loss, excess, metric, for one pass over the rows."""
        return np.concatenate([self.coefficient[:, None], self.excess[:, None], self.metric], 1)

    def refresh(self, lanes: Sequence[Moments], forgetting: float) -> None:
        """Take in the lanes' new samples, in lane order, and solve again.

        Without any new loss everything stays as it is.
        """
        total = Moments.from_dict(lanes[0].to_dict())
        for lane in lanes[1:]:
            total.add(lane)
        if not float(total.count):
            # Forgetting for nothing would end at sums of zero, which nothing can be solved from.
            return
        self.moments.add(total, forgetting=forgetting)
        if not self.fitted and float(self.moments.count) < self._warmup_losses:
            return
        self._spectrum = None
        with single_threaded():
            self._fit_loss()
            self._fit_metric()
        self.fitted = True

    def variance(self, x: Float32Array) -> FloatArray:
        """(n,) predictive variance of the loss, up to the noise; ones until fitted."""
        if not self.fitted:
            return np.ones(len(x))
        with single_threaded():
            scale, values, vectors, penalty = self._solve_spectrum()
            rotated = (x * scale) @ vectors
        result: FloatArray = np.sum(rotated**2 / (values + penalty), axis=1)
        return result

    def _solve_spectrum(self) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """Column scales, eigenvalues and eigenvectors of the scaled Gram matrix, ridge penalty.

        Columns that never varied get scale zero and so no weight. The penalty is chosen by
        generalized cross-validation (Golub, Heath and Wahba, 1979), which needs only the moments.
        """
        if self._spectrum is not None:
            return self._spectrum
        m = self.moments
        count = float(m.count)
        scale = _inverse_rms(m.gram, count)
        values, vectors = np.linalg.eigh(m.gram * scale[:, None] * scale)
        values = np.maximum(values, 0.0)
        mean = m.cross[INTERCEPT] / count
        # Losses around their mean, so that the penalty does not pull the level towards zero.
        target = vectors.T @ ((m.cross - m.gram[INTERCEPT] * mean) * scale)
        power = float(m.square) - count * mean**2
        best, penalty = np.inf, float(PENALTIES[-1] * count)
        for relative in PENALTIES:
            trial = relative * count
            rest = power - np.sum(target**2 * (values + 2 * trial) / (values + trial) ** 2)
            free = count - np.sum(values / (values + trial))
            if free > 1.0 and max(rest, 0.0) / free**2 < best:
                best, penalty = max(rest, 0.0) / free**2, float(trial)
        self.noise = float(np.sqrt(best * max(1.0, count))) if np.isfinite(best) else 0.0
        self._spectrum = scale, values, vectors, penalty
        return self._spectrum

    def _fit_loss(self) -> None:
        m = self.moments
        scale, values, vectors, penalty = self._solve_spectrum()
        mean = m.cross[INTERCEPT] / float(m.count)
        target = vectors.T @ ((m.cross - m.gram[INTERCEPT] * mean) * scale)
        coefficient = scale * (vectors @ (target / (values + penalty)))
        coefficient[INTERCEPT] += mean
        excess = coefficient.copy()
        if self._reference_column is None:
            # What the length columns explain of the prediction: the ridge has shrunk their own
            # weights, and other columns have taken over part of them.
            shape = list(self._length_columns)
            explained = np.linalg.pinv(m.gram[np.ix_(shape, shape)]) @ m.gram[shape]
            excess[shape] -= explained @ coefficient
        else:
            excess[self._reference_column] -= 1.0
        self.coefficient = coefficient.astype(np.float32)
        self.excess = excess.astype(np.float32)

    def _fit_metric(self) -> None:
        """Principal directions of the predicted sketches, or of the embeddings without sketches.

        With sketches, W is the ridge solution from centred rows to centred unit sketches and the
        metric is W Q, Q the leading right singular vectors of (covariance)^(1/2) W: inner products
        of x W Q then are those of predicted sketches, in as few dimensions as possible.
        """
        m = self.moments
        enough = float(m.sketch_count) >= SKETCHES_PER_DIMENSION * self._metric_dim
        gram = m.sketch_gram if enough else m.gram
        count = float(m.sketch_count if enough else m.count)
        mean = gram[INTERCEPT] / count
        covariance = gram / count - np.outer(mean, mean)
        if enough:
            scale = _inverse_rms(covariance, 1.0)
            cross = m.sketch_cross / count
            cross = (cross - np.outer(mean, cross[INTERCEPT])) * scale[:, None]
            values, vectors = np.linalg.eigh(covariance * scale[:, None] * scale)
            values = np.maximum(values, 0.0)
            # As much shrinkage as if each dimension had been seen once.
            shrunk = values + self._metric_dim / count
            rotated = vectors.T @ cross
            root = np.sqrt(values)[:, None] * rotated / shrunk[:, None]
            power, left = np.linalg.eigh(root @ root.T)
            left, power = left[:, -self._metric_dim :], power[-self._metric_dim :]
            usable = power > 1e-12 * max(float(power[-1]), 1e-300)
            right = (root.T @ left) / np.sqrt(np.where(usable, power, 1.0)) * usable
            metric = scale[:, None] * (vectors @ ((rotated @ right) / shrunk[:, None]))
        else:
            tail = slice(len(covariance) - self._dim, None)
            _, vectors = np.linalg.eigh(covariance[tail, tail])
            metric = np.zeros((len(covariance), self._metric_dim))
            metric[tail] = vectors[:, -self._metric_dim :]
        metric[INTERCEPT] -= mean @ metric
        self.metric = metric.astype(np.float32)
        self.metric_from_sketches = enough

    def state_dict(self) -> State:
        """Sums and what was solved from them, so that a resumed run need not solve again."""
        return {
            "moments": self.moments.to_dict(),
            "coefficient": self.coefficient,
            "excess": self.excess,
            "metric": self.metric,
            "noise": self.noise,
            "fitted": self.fitted,
            "metric_from_sketches": self.metric_from_sketches,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a saved state; the caller has checked the shapes' causes."""
        self.moments = Moments.from_dict(state["moments"])
        self._spectrum = None
        self.coefficient = np.asarray(state["coefficient"], np.float32)
        self.excess = np.asarray(state["excess"], np.float32)
        self.metric = np.asarray(state["metric"], np.float32).reshape(self.metric.shape)
        self.noise = float(state["noise"])
        self.fitted = bool(state["fitted"])
        self.metric_from_sketches = bool(state["metric_from_sketches"])


class RankTable:
    """Ranks of values inside their stratum, against a window of candidates offered lately.

    The pool itself would be the wrong yardstick: what is clearly good or bad has already left it.

    Args:
        values: (n,) values of the window.
        stratum: (n,) their strata.
    """

    def __init__(self, values: FloatArray, stratum: IntArray) -> None:
        self.values = values
        self.stratum = stratum
        self._all = np.sort(values)
        self._sorted = values[np.lexsort((values, stratum))]
        self._size = np.bincount(stratum, minlength=1)

    def rank(self, values: FloatArray, stratum: IntArray) -> FloatArray:
        """(n,) ranks in [0, 1]; those of a thin stratum are shrunk towards the rank among all."""
        if not len(self._all):
            return np.full(len(values), 0.5)
        everyone = np.zeros(len(values), np.int64)
        overall = mid_ranks(self._all, np.array([0, len(self._all)]), everyone, values)
        # Strata beyond those of the window are as empty as the one after the last.
        known = np.minimum(stratum, len(self._size))
        size = np.append(self._size, 0)
        own = mid_ranks(self._sorted, np.append(0, np.cumsum(size)), known, values)
        weighed = own * size[known] + overall * RANK_SHRINKAGE
        shrunk: FloatArray = weighed / (size[known] + RANK_SHRINKAGE)
        return shrunk


def _inverse_rms(gram: FloatArray, count: float) -> FloatArray:
    power = np.maximum(np.diag(gram), 0.0) / count
    # A column that hardly varies carries rounding errors only.
    dead = power <= 1e-12 * max(float(power.max(initial=0.0)), 1e-300)
    return np.where(dead, 0.0, 1.0 / np.sqrt(np.where(dead, 1.0, power)))
