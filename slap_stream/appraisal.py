"""What a lane's candidates look like to the model: loss, rank, neighbours, evidence of corruption.

Ranks, typical distances and robust scales are taken over a window of the candidates offered lately
and are renewed at refreshes only, so a candidate is judged by one yardstick until the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slap_stream.kernels import project, unit_rows
from slap_stream.learnability import NUM_OWN_COLUMNS, LearnabilityModel, RankTable
from slap_stream.types import Float32Array, FloatArray, IntArray, State

WINDOW = 1024
# Feature columns in which corrupted samples stand out, and the direction in which they do.
SUSPECT_COLUMNS = {"prompt_target_cosine": -1.0, "target_given_prompt": 1.0}
# Scale of the median absolute deviation that makes it a standard deviation for normal data.
MAD_TO_STD = 1.4826
# Strata with fewer candidates in the window are judged by the scale over all.
MIN_FOR_SCALE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Appraisal:
    """Judgement of n candidates.

    Attributes:
        loss: (n,) loss, own where known, else predicted.
        excess: (n,) loss beyond what the length explains.
        rank: (n,) rank of the excess inside the stratum, in [0, 1].
        evidence: (n,) evidence of corruption, in standard deviations.
        z: (n, metric_dim) float32 unit vectors of the metric space.
    """

    loss: FloatArray
    excess: FloatArray
    rank: FloatArray
    evidence: FloatArray
    z: Float32Array


class Appraiser:
    """Judges candidates by the shared model and by the lane's window.

    Args:
        model: The model shared by all lanes.
        feature_names: Names of the store's feature columns.
        columns: Columns of a design row.
        dim: Dimensions of the embedding, the last columns of a design row.

    Attributes:
        typical: Typical distance to the nearest neighbour, in the metric space.
        apart: Typical distance of two candidates of a stratum, between their unit embeddings.
    """

    def __init__(
        self, model: LearnabilityModel, feature_names: Sequence[str], *, columns: int, dim: int
    ) -> None:
        self._model = model
        self._dim = dim
        found = [name for name in SUSPECT_COLUMNS if name in feature_names]
        self._suspects = [NUM_OWN_COLUMNS + list(feature_names).index(name) for name in found]
        self._signs = np.array([SUSPECT_COLUMNS[name] for name in found])
        self._outliers = OutlierTable(np.zeros((0, len(found))), np.zeros(0, np.int64))
        self._ids: IntArray = np.zeros(0, np.int64)
        self._x: Float32Array = np.zeros((0, columns), np.float32)
        self._stratum: IntArray = np.zeros(0, np.int64)
        self._ranks = RankTable(np.zeros(0), np.zeros(0, np.int64))
        self._readout = model.readout
        self.typical = self.apart = 1.0

    def watch(self, sample_id: IntArray, x: Float32Array, stratum: IntArray) -> None:
        """Move the window over (n,) candidates that were just offered."""
        self._ids = np.concatenate([self._ids, sample_id])[-WINDOW:]
        self._x = np.concatenate([self._x, x])[-WINDOW:]
        self._stratum = np.concatenate([self._stratum, stratum])[-WINDOW:]

    def refresh(self) -> None:
        """Renew the yardsticks from the window and the model as they now are."""
        self._readout = self._model.readout
        if not len(self._ids):
            return
        _, excess, z = self._read(self._x)
        self._ranks = RankTable(excess, self._stratum)
        self.typical = _typical_distance(z, self._stratum, np.min)
        unit = unit_rows(self._x[:, -self._dim :])
        self.apart = _typical_distance(unit, self._stratum, np.median)
        self._outliers = OutlierTable(self._suspicion(self._x), self._stratum)

    def appraise(self, x: Float32Array, stratum: IntArray, own_loss: FloatArray) -> Appraisal:
        """Judge candidates.

        Args:
            x: (n, columns) design rows.
            stratum: (n,) strata.
            own_loss: (n,) losses that were measured lately, NaN where none was.
        """
        predicted, excess, z = self._read(x)
        known = np.isfinite(own_loss)
        surprise = np.where(known, own_loss - predicted, 0.0)
        evidence = np.maximum(0.0, surprise / max(self._model.noise, 1e-6))
        deviation = self._outliers.deviation(self._suspicion(x), stratum)
        evidence = evidence + np.maximum(0.0, deviation).sum(axis=1)
        excess = excess + surprise
        return Appraisal(
            loss=np.where(known, own_loss, predicted),
            excess=excess,
            rank=self._ranks.rank(excess, stratum),
            evidence=evidence / np.sqrt(1.0 + len(self._suspects)),
            z=z,
        )

    def project(self, x: Float32Array) -> Float32Array:
        """(n, metric_dim) unit vectors of the metric space."""
        return self._read(x)[2]

    def _suspicion(self, x: Float32Array) -> FloatArray:
        """(n, columns that tell) values that are the larger the more suspect a sample is."""
        values: FloatArray = x[:, self._suspects].astype(np.float64) * self._signs
        return values

    def _read(self, x: Float32Array) -> tuple[FloatArray, FloatArray, Float32Array]:
        out = project(x, self._readout)
        z = out[:, 2:]
        return out[:, 0].astype(np.float64), out[:, 1].astype(np.float64), unit_rows(z)

    def state_dict(self) -> State:
        """Window and yardsticks."""
        return {
            "sample_id": self._ids,
            "stratum": self._stratum,
            "rank_values": self._ranks.values,
            "rank_stratum": self._ranks.stratum,
            "outlier_values": self._outliers.values,
            "outlier_stratum": self._outliers.stratum,
            "typical": self.typical,
            "apart": self.apart,
        }

    def load_state_dict(self, state: State, rows_of: Callable[[IntArray], Float32Array]) -> None:
        """Take over a saved window; the model must have been loaded before."""
        self._ids = np.asarray(state["sample_id"], np.int64)
        self._x = rows_of(self._ids)
        self._stratum = np.asarray(state["stratum"], np.int64)
        self._ranks = RankTable(
            np.asarray(state["rank_values"], np.float64),
            np.asarray(state["rank_stratum"], np.int64),
        )
        self._outliers = OutlierTable(
            np.asarray(state["outlier_values"], np.float64).reshape(
                len(state["outlier_stratum"]), len(self._suspects)
            ),
            np.asarray(state["outlier_stratum"], np.int64),
        )
        self.typical, self.apart = float(state["typical"]), float(state["apart"])
        self._readout = self._model.readout


class OutlierTable:
    """How unusual values are in their stratum: sources differ in what is usual.

    Args:
        values: (n, columns) values of a window of candidates.
        stratum: (n,) their strata.
    """

    def __init__(self, values: FloatArray, stratum: IntArray) -> None:
        self.values = values
        self.stratum = stratum
        self._overall = _centre_and_scale(values)
        self._own = {
            int(name): _centre_and_scale(values[stratum == name])
            for name, size in zip(*np.unique(stratum, return_counts=True), strict=True)
            if size >= MIN_FOR_SCALE
        }

    def deviation(self, values: FloatArray, stratum: IntArray) -> FloatArray:
        """(n, columns) deviations from the stratum's median, in robust standard deviations.

        A column that does not vary in a stratum says nothing there: its deviation is zero.
        """
        result = np.zeros(values.shape)
        for name in np.unique(stratum):
            centre, scale = self._own.get(int(name), self._overall)
            inside = stratum == name
            result[inside] = (values[inside] - centre) / scale
        return result


def _centre_and_scale(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    if not len(values):
        return np.zeros(values.shape[1]), np.full(values.shape[1], np.inf)
    centre = np.median(values, axis=0)
    scale = MAD_TO_STD * np.median(np.abs(values - centre), axis=0)
    return centre, np.where(scale > 0, scale, np.inf)


def _typical_distance(
    vectors: Float32Array, stratum: IntArray, which: Callable[..., FloatArray]
) -> float:
    """Median over candidates of their least or median distance to the others of their stratum.

    Args:
        vectors: (n, dim) unit vectors.
        stratum: (n,) strata.
        which: `np.min` or `np.median`.

    Returns:
        The distance; 1 if no stratum has two candidates.
    """
    found = []
    for name in np.unique(stratum):
        inside = vectors[stratum == name]
        if len(inside) > 1:
            distance = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * (inside @ inside.T)))
            others = distance[~np.eye(len(inside), dtype=bool)].reshape(len(inside), -1)
            found.append(which(others, axis=1))
    median = float(np.median(np.concatenate(found))) if found else 1.0
    return max(median, 1e-3)
