"""What a lane's candidates look like to the model: loss, rank, place in the metric space.

Ranks and typical distances are taken over a window of the candidates offered lately
and are renewed at refreshes only, so a candidate is judged by one yardstick until the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slap_stream.evidence import MISMATCH_COLUMN
from slap_stream.kernels import nearest_of_group, project, unit_rows, weigh
from slap_stream.learnability import NUM_OWN_COLUMNS, LearnabilityModel, RankTable
from slap_stream.types import Float32Array, FloatArray, IntArray, State

WINDOW = 1024
# Quantile of the distances to nearest neighbours that is taken for that of candidates without a
# copy: copies would have to be nine in ten to be taken for what is usual.
NOT_COPIED = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Appraisal:
    """Judgement of n candidates.

    Attributes:
        loss: (n,) loss, own where known, else predicted.
        excess: (n,) loss beyond what the length explains.
        rank: (n,) rank of the excess inside the stratum, in [0, 1].
        mismatch: (n,) probability that the target belongs to another prompt.
    """

    loss: FloatArray
    excess: FloatArray
    rank: FloatArray
    mismatch: FloatArray


class Appraiser:
    """Judges candidates by the shared model and by the lane's window.

    Args:
        model: The model shared by all lanes.
        feature_names: Names of the store's feature columns.
        columns: Columns of a design row.
        dim: Dimensions of the embedding, the last columns of a design row.

    Attributes:
        typical: Typical distance to the nearest neighbour, in the metric space.
        apart: Distance to the nearest neighbour, between unit embeddings, of candidates that are
            no copies.
    """

    def __init__(
        self, model: LearnabilityModel, feature_names: Sequence[str], *, columns: int, dim: int
    ) -> None:
        self._model = model
        self._dim = dim
        self._mismatch: int | None = None
        if MISMATCH_COLUMN in feature_names:
            self._mismatch = NUM_OWN_COLUMNS + list(feature_names).index(MISMATCH_COLUMN)
        self._window = _Window(columns)
        self._ranks = RankTable(np.zeros(0), np.zeros(0, np.int64))
        self._prediction, self._metric = model.prediction, model.metric
        self.typical = self.apart = 1.0

    def watch(self, sample_id: IntArray, x: Float32Array, stratum: IntArray) -> None:
        """Move the window over (n,) candidates that were just offered."""
        self._window.add(sample_id, x, stratum)

    def refresh(self) -> None:
        """Renew the yardsticks from the window and the model as they now are."""
        self._prediction, self._metric = self._model.prediction, self._model.metric
        ids, x, stratum = self._window.joined()
        if not len(ids):
            return
        self._ranks = RankTable(self._predict(x)[1], stratum)
        self.typical = _neighbour_distance(self.project(x), stratum, 0.5)
        self.apart = _neighbour_distance(x, stratum, NOT_COPIED, first=x.shape[1] - self._dim)

    def appraise(self, x: Float32Array, stratum: IntArray, own_loss: FloatArray) -> Appraisal:
        """Judge candidates.

        Args:
            x: (n, columns) design rows.
            stratum: (n,) strata.
            own_loss: (n,) losses that were measured lately, NaN where none was.
        """
        predicted, excess = self._predict(x)
        known = np.isfinite(own_loss)
        surprise = np.where(known, own_loss - predicted, 0.0)
        excess = excess + surprise
        return Appraisal(
            loss=np.where(known, own_loss, predicted),
            excess=excess,
            rank=self._ranks.rank(excess, stratum),
            mismatch=self._mismatches(x),
        )

    def project(self, x: Float32Array) -> Float32Array:
        """(n, metric_dim) unit vectors of the metric space."""
        return unit_rows(project(x, self._metric))

    def _mismatches(self, x: Float32Array) -> FloatArray:
        """(n,) the store's column of that name; zeros without one."""
        if self._mismatch is None:
            return np.zeros(len(x))
        column: FloatArray = np.clip(x[:, self._mismatch].astype(np.float64), 0.0, 1.0)
        return column

    def _predict(self, x: Float32Array) -> tuple[FloatArray, FloatArray]:
        """(n,) losses and (n,) excesses, as far as the design rows tell."""
        out = weigh(x, self._prediction).astype(np.float64)
        return out[:, 0], out[:, 1]

    def state_dict(self) -> State:
        """Window and yardsticks."""
        ids, _, stratum = self._window.joined()
        return {
            "sample_id": ids,
            "stratum": stratum,
            "rank_values": self._ranks.values,
            "rank_stratum": self._ranks.stratum,
            "typical": self.typical,
            "apart": self.apart,
        }

    def load_state_dict(self, state: State, rows_of: Callable[[IntArray], Float32Array]) -> None:
        """Take over a saved window; the model must have been loaded before."""
        ids = np.asarray(state["sample_id"], np.int64)
        self._window.clear()
        self._window.add(ids, rows_of(ids), np.asarray(state["stratum"], np.int64))
        self._ranks = RankTable(
            np.asarray(state["rank_values"], np.float64),
            np.asarray(state["rank_stratum"], np.int64),
        )
        self.typical, self.apart = float(state["typical"]), float(state["apart"])
        self._prediction, self._metric = self._model.prediction, self._model.metric


class _Window:
    """The last `WINDOW` candidates offered, in parts as they came: joined only when asked for."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self.clear()

    def clear(self) -> None:
        self._parts: deque[tuple[IntArray, Float32Array, IntArray]] = deque()
        none = np.zeros(0, np.int64)
        self.add(none, np.zeros((0, self._columns), np.float32), none)

    def add(self, sample_id: IntArray, x: Float32Array, stratum: IntArray) -> None:
        self._parts.append((sample_id, x, stratum))
        held = sum(len(ids) for ids, _, _ in self._parts)
        while held - len(self._parts[0][0]) >= WINDOW:
            held -= len(self._parts.popleft()[0])

    def joined(self) -> tuple[IntArray, Float32Array, IntArray]:
        ids, x, stratum = (
            np.concatenate(parts)[-WINDOW:] for parts in zip(*self._parts, strict=True)
        )
        return ids, x, stratum


def _neighbour_distance(
    vectors: Float32Array, stratum: IntArray, quantile: float, *, first: int = 0
) -> float:
    """Quantile over candidates of their distance to the nearest other one of their stratum.

    Args:
        vectors: (n, first + dim) float32, of which the last columns are unit vectors.
        stratum: (n,) strata.
        quantile: In [0, 1].
        first: Columns before the unit vectors; they are left out.

    Returns:
        The distance; 1 if no stratum has two candidates.
    """
    order = np.argsort(stratum, kind="stable")
    here = np.arange(len(order))
    start = np.append(0, np.cumsum(np.bincount(stratum)))
    found = nearest_of_group(
        vectors, order, here, stratum[order], vectors[order], here, start, first=first
    )
    found = found[np.isfinite(found)]
    return max(float(np.quantile(found, quantile)), 1e-3) if len(found) else 1.0
