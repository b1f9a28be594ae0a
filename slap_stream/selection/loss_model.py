"""A regression from embeddings and columns to losses, and a metric in which samples teach alike.

A few candidates are probed and all trained ones report their loss; a ridge regression carries both
to every other candidate through its embedding and feature columns. Gradient sketches teach a
linear map from the same columns to a small metric space in which inner products follow those of
preconditioned gradients.

Everything is solved from sums over samples (`Moments`), so lanes and ranks can be added in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from slap_stream.core.kernels import unit_rows, weigh, widen_halves
from slap_stream.core.linear import (
    inverse_of_triangle,
    leading_directions,
    power_after,
    single_threaded,
)
from slap_stream.core.rng import Purpose, generator
from slap_stream.core.saved import Saved
from slap_stream.selection.batch_kernels import mid_ranks
from slap_stream.selection.moments import Moments
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray, Rows, State

# Columns of a design row that come before the store's feature columns.
INTERCEPT, LOG_LENGTH = 0, 1
NUM_OWN_COLUMNS = 2
# Ridge penalties tried, relative to the number of samples (columns are scaled to unit power).
PENALTIES = np.logspace(-5, 0.5, 23)
# With fewer sketches than this for each dimension, principal components of the embeddings serve.
SKETCHES_PER_DIMENSION = 2
# Samples of other strata that a stratum's rank is shrunk towards.
RANK_SHRINKAGE = 8.0
# Ridge penalty and metric are solved anew when so many times the samples are behind them, and else
# at every so many refreshes: an eigenproblem each, and they move slowly.
SOLVE_GROWTH, SOLVE_EVERY = 1.25, 8
# Share of a column's mean square below which its variance is no more than rounding.
LEAST_VARIANCE = 1e-5
# Directions beyond the metric's that make its own more exact, and multiplications that find them.
SPARE_DIRECTIONS, DIRECTION_ROUNDS = 16, 4


def design_rows(rows: Rows) -> Float32Array:
    """(n, 2 + num_features + dim) float32: intercept, log length, feature columns, embedding.

    Embeddings are scaled to unit length. Values that are not finite become zero: one bad cell must
    not spoil a regression over all.
    """
    return checked_rows(rows)[0]


def checked_rows(rows: Rows) -> tuple[Float32Array, int]:
    """Design rows, and how many of them held a value that is not finite."""
    num_features, dim = rows.feature.shape[1], rows.embedding.shape[1]
    table = np.empty((len(rows), NUM_OWN_COLUMNS + num_features + dim), np.float32)
    table[:, INTERCEPT] = 1.0
    table[:, LOG_LENGTH] = np.log1p(np.maximum(rows.length, 0))
    features = table[:, NUM_OWN_COLUMNS : NUM_OWN_COLUMNS + num_features]
    features[:] = rows.feature
    half = rows.embedding.dtype == np.float16
    embedding = widen_halves(rows.embedding) if half else np.array(rows.embedding, np.float32)
    spoilt = _clear_spoilt(features) | _clear_spoilt(embedding)
    table[:, -dim:] = unit_rows(embedding)
    return table, int(np.count_nonzero(spoilt))


def _clear_spoilt(values: Float32Array) -> BoolArray:
    """Set what is not finite to zero, in place; (n,) rows that held such values."""
    fine = np.isfinite(values)
    if fine.all():
        return np.zeros(len(values), bool)
    values[~fine] = 0.0
    spoilt: BoolArray = np.logical_not(np.all(fine, axis=1, keepdims=True))[:, 0]
    return spoilt


@dataclass(kw_only=True, slots=True)
class Renewal:
    """When something that moves slowly is solved anew: while the samples behind it grow fast, and
    else at every `SOLVE_EVERY`-th refresh.

    Attributes:
        weight: Samples, after decay, that it was solved from last.
        age: Refreshes since.
    """

    weight: float = 0.0
    age: int = 0

    def due(self, weight: float) -> bool:
        """Whether it is due at this refresh, which has so much weight; if so the count restarts."""
        self.age += 1
        if self.age < SOLVE_EVERY and weight < SOLVE_GROWTH * self.weight:
            return False
        self.weight, self.age = weight, 0
        return True


# What refreshes solve for.
_SOLVED = ("coefficient", "excess", "metric", "noise", "fitted", "metric_from_sketches")


class LossModel:
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
        metric: (columns, metric_dim) float32; x times it, scaled to unit length, is z. Another
            array whenever it has changed, which it does not at every refresh.
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
        self._metric_dim, self._sketch_dim = min(metric_dim, dim, sketch_dim), sketch_dim
        self._warmup_losses = warmup_losses
        self._length_columns, self._reference_column = tuple(length_columns), reference_column
        self._moments: Moments | None = Moments.zeros(columns=columns, sketch_dim=sketch_dim)
        # Those before the last refresh, for their memory.
        self._spare: Moments | None = None
        self.coefficient: Float32Array = np.zeros(columns, np.float32)
        self.excess: Float32Array = np.zeros(columns, np.float32)
        self.metric: Float32Array = np.zeros((columns, self._metric_dim), np.float32)
        self.noise = 0.0
        self.fitted = False
        self.metric_from_sketches = False
        self._penalty = float(PENALTIES[-1])
        self._penalty_renewal, self._metric_renewal = Renewal(), Renewal()
        # (columns, columns) upper triangular: rows times it have the predictive variance as squared
        # length. Follows from moments and penalty; made again after a resume.
        self._whitening: Float32Array | None = None

    @property
    def moments(self) -> Moments:
        """Sums over the samples so far, of the model that solves."""
        if self._moments is None:
            raise RuntimeError(
                "a model must have its sums to solve from or to be saved, got one that follows "
                "another rank's; ask that of the loader, on all ranks alike."
            )
        return self._moments

    @property
    def prediction(self) -> Float32Array:
        """(2, columns): weights of the predicted loss and of its excess."""
        return np.stack([self.coefficient, self.excess])

    def refresh(self, new: Moments, decay: float) -> None:
        """Take in new samples, of all lanes, and solve again.

        Losses are solved for each time, penalty and metric when they are due. Without any new loss
        everything stays as it is.
        """
        if not float(new.count):
            # Forgetting for nothing would end at sums of zero, which nothing can be solved from.
            return
        before = self.moments
        after = before.plus(new, decay=decay, into=self._spare)
        self._moments, self._spare = after, before
        try:
            self._solve()
        except np.linalg.LinAlgError:
            # Whoever tries it again brings the same samples.
            self._moments, self._spare = before, after
            raise

    def _solve(self) -> None:
        m = self.moments
        if not self.fitted and float(m.count) < self._warmup_losses:
            return
        enough = float(m.sketch_count) >= SKETCHES_PER_DIMENSION * self._metric_dim
        if enough != self.metric_from_sketches:
            self._metric_renewal = Renewal()
        with single_threaded():
            if self._penalty_renewal.due(float(m.count)):
                self._penalty = self._choose_penalty()
            self._fit_loss()
            if self._metric_renewal.due(float(m.sketch_count if enough else m.count)):
                fit = self._metric_of_sketches if enough else self._metric_of_embeddings
                self.metric = fit().astype(np.float32)
                self.metric_from_sketches = enough
        self.fitted = True

    def solution(self) -> State:
        """What a model that follows has to know; only reads."""
        if self.fitted:
            self._made_whitening()
        return {**self._solved(), "whitening": self._whitening}

    def follow(self, solution: State) -> None:
        """Take over what another rank has solved, who has the sums from now on."""
        self._moments = self._spare = None
        self._take_solution(solution)
        self._whitening = solution["whitening"]

    def _solved(self) -> State:
        return {name: getattr(self, name) for name in _SOLVED}

    def _take_solution(self, state: State) -> None:
        for name in _SOLVED:
            # A metric that is as it was stays the same array.
            if not np.array_equal(state[name], getattr(self, name)):
                setattr(self, name, state[name])

    def predict(self, x: Float32Array) -> FloatArray | None:
        """(n,) losses of samples with (n, columns) design rows; None until fitted."""
        return weigh(x, self.prediction[:1])[:, 0].astype(np.float64) if self.fitted else None

    def variance(self, x: Float32Array) -> FloatArray:
        """(n,) predictive variance of the loss, up to the noise; ones until fitted."""
        if not self.fitted:
            return np.ones(len(x))
        with single_threaded():
            return power_after(x, self._made_whitening())

    def _made_whitening(self) -> Float32Array:
        if self._whitening is None:
            with single_threaded():
                self._factorise(*self._scaled()[:2])
            assert self._whitening is not None
        return self._whitening

    def _scaled(self) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """Column scales, the Gram matrix and the products with the loss in these scales, and the
        sum of squared losses.

        Losses are taken around their mean, so that the penalty does not pull the level towards
        zero. Columns that never varied get scale zero and so no weight.
        """
        m = self.moments
        count = float(m.count)
        scale = _inverse_rms(m.gram, count)
        mean = m.cross[INTERCEPT] / count
        target = (m.cross - m.gram[INTERCEPT] * mean) * scale
        return scale, m.gram * scale[:, None] * scale, target, float(m.square) - count * mean**2

    def _choose_penalty(self) -> float:
        """Ridge penalty relative to the number of samples, by generalized cross-validation (Golub,
        Heath and Wahba, 1979), which needs only the moments."""
        count = float(self.moments.count)
        _, gram, target, power = self._scaled()
        values, vectors = np.linalg.eigh(gram)
        values, turned = np.maximum(values, 0.0), vectors.T @ target
        best, penalty = np.inf, float(PENALTIES[-1])
        for relative in PENALTIES:
            trial = relative * count
            rest = power - np.sum(turned**2 * (values + 2 * trial) / (values + trial) ** 2)
            free = count - np.sum(values / (values + trial))
            if free > 1.0 and max(rest, 0.0) / free**2 < best:
                best, penalty = max(rest, 0.0) / free**2, float(relative)
        return penalty

    def _factorise(self, scale: FloatArray, gram: FloatArray) -> FloatArray:
        """Inverse of the lower Cholesky factor of the scaled Gram matrix with the penalty on its
        diagonal; kept with the scales, as what makes the predictive variance.

        There is a factor: the least penalty is several times the rounding of the sums.
        """
        ridged = gram + self._penalty * float(self.moments.count) * np.eye(len(gram))
        inverse = inverse_of_triangle(np.linalg.cholesky(ridged))
        self._whitening = (inverse * scale).T.astype(np.float32)
        return inverse

    def _fit_loss(self) -> None:
        m = self.moments
        count = float(m.count)
        scale, gram, target, power = self._scaled()
        inverse = self._factorise(scale, gram)
        penalty, solved = self._penalty * count, inverse.T @ (inverse @ target)
        rest = power - float(solved @ target) - penalty * float(solved @ solved)
        free = count - len(target) + penalty * float(np.sum(inverse**2))
        self.noise = float(np.sqrt(max(rest, 0.0) * count) / free) if free > 1.0 else 0.0
        coefficient = scale * solved
        coefficient[INTERCEPT] += m.cross[INTERCEPT] / count
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

    def _metric_of_sketches(self) -> FloatArray:
        """(columns, metric_dim): principal directions of the predicted sketches.

        W is the ridge solution from centred rows to centred unit sketches, S the rows' covariance,
        and the metric is W Q, Q the leading eigenvectors of W^T S W: inner products of x W Q then
        are those of predicted sketches, in as few dimensions as possible.
        """
        m = self.moments
        count = float(m.sketch_count)
        mean, covariance = _centred(m.sketch_gram, count)
        scale = _inverse_rms(covariance, 1.0)
        # What is left of a column that is all but constant is the rounding of the sums.
        scale[np.diag(covariance) <= LEAST_VARIANCE * (mean**2 + np.diag(covariance))] = 0.0
        cross = m.sketch_cross / count
        cross = (cross - np.outer(mean, cross[INTERCEPT])) * scale[:, None]
        covariance *= scale[:, None] * scale
        shrunk = covariance.copy()
        # As much shrinkage as if each dimension had been seen once.
        shrunk[np.diag_indices_from(shrunk)] += self._metric_dim / count
        inverse = inverse_of_triangle(np.linalg.cholesky(shrunk))
        w = inverse.T @ (inverse @ cross)
        wanted = self._metric_dim
        spare = min(SPARE_DIRECTIONS, cross.shape[1] - wanted)
        # The same at every refresh and on every rank.
        start = generator(0, Purpose.METRIC).normal(size=(cross.shape[1], wanted + spare))
        if self.metric_from_sketches:
            # On from where the last solution ended: directions move little, and are the more exact.
            start[:, :wanted] = w.T @ (covariance @ (self.metric * _inverse(scale)[:, None]))
        basis = leading_directions(
            lambda q: w.T @ (covariance @ (w @ q)), start, rounds=DIRECTION_ROUNDS
        )
        reduced = w @ basis
        power, turn = np.linalg.eigh(reduced.T @ (covariance @ reduced))
        usable = power > 1e-12 * max(float(power[-1]), 1e-300)
        metric: FloatArray = scale[:, None] * (reduced @ (turn * usable))[:, -wanted:]
        metric[INTERCEPT] -= mean @ metric
        return metric

    def _metric_of_embeddings(self) -> FloatArray:
        """(columns, metric_dim): principal directions of the embeddings."""
        mean, covariance = _centred(self.moments.gram, float(self.moments.count))
        tail = slice(len(covariance) - self._dim, None)
        _, vectors = np.linalg.eigh(covariance[tail, tail])
        metric = np.zeros((len(covariance), self._metric_dim))
        metric[tail] = vectors[:, -self._metric_dim :]
        metric[INTERCEPT] -= mean @ metric
        return metric

    def state_dict(self) -> State:
        """Sums and what was solved from them, so that a resumed run need not solve again.

        A model that follows has no sums: None stands for them.
        """
        return {
            "moments": None if self._moments is None else self._moments.to_dict(),
            **self._solved(),
            "penalty": self._penalty,
            "penalty_renewal": asdict(self._penalty_renewal),
            "metric_renewal": asdict(self._metric_renewal),
        }

    def load_state_dict(self, state: Saved) -> None:
        """Take over a saved state, of a model that has its sums."""
        columns = len(self.coefficient)
        self._moments = Moments.from_saved(
            state.part("moments"), columns=columns, sketch_dim=self._sketch_dim
        )
        self._whitening = None
        self._take_solution(
            {
                "coefficient": state.numbers32("coefficient", columns),
                "excess": state.numbers32("excess", columns),
                "metric": state.numbers32("metric", *self.metric.shape),
                "noise": state.number("noise", least=0.0),
                "fitted": state.flag("fitted"),
                "metric_from_sketches": state.flag("metric_from_sketches"),
            }
        )
        self._penalty = state.number("penalty", least=float(PENALTIES[0]))
        self._penalty_renewal, self._metric_renewal = (
            Renewal(weight=part.number("weight", least=0.0), age=part.whole("age"))
            for part in map(state.part, ("penalty_renewal", "metric_renewal"))
        )


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


def _centred(gram: FloatArray, count: float) -> tuple[FloatArray, FloatArray]:
    """Column means and covariance, from sums of products whose first column is ones."""
    mean = gram[INTERCEPT] / count
    return mean, gram / count - np.outer(mean, mean)


def _inverse(scale: FloatArray) -> FloatArray:
    """One over each, zero staying zero."""
    dead = scale == 0.0
    return np.where(dead, 0.0, 1.0 / np.where(dead, 1.0, scale))


def _inverse_rms(gram: FloatArray, count: float) -> FloatArray:
    power = np.maximum(np.diag(gram), 0.0) / count
    # A column that hardly varies carries rounding errors only.
    dead = power <= 1e-12 * max(float(power.max(initial=0.0)), 1e-300)
    return np.where(dead, 0.0, 1.0 / np.sqrt(np.where(dead, 1.0, power)))
