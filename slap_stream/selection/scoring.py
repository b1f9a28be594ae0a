"""Scores of a lane's pooled candidates: predicted loss, rank, evidence that one can be spared.

They are renewed when candidates come, at refreshes, and when something like them has been trained
on. Evidence is a probability, of being a near-copy, of having another prompt's target, of a loss
that only noise has, or of being unrelated to a target set; all else is kept and drawn uniformly:
where nothing is shown, nothing is pruned for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slap_stream.core.kernels import heads_of, nearest_of_group, project, unit_rows, weigh
from slap_stream.core.saved import Saved
from slap_stream.selection.loss_model import NUM_OWN_COLUMNS, LossModel, RankTable
from slap_stream.selection.outliers import Outliers
from slap_stream.selection.policies.base import Policy
from slap_stream.selection.pool import EMPTY, Pool, RecentlyTrained
from slap_stream.selection.quota import Keep, raised
from slap_stream.selection.state import Lookup
from slap_stream.types import (
    MISMATCH_COLUMN,
    RELEVANCE_COLUMN,
    Float32Array,
    FloatArray,
    IntArray,
    State,
)

# A candidate whose embedding is this close to something trained on lately is a copy; from the
# second figure on it is none. In distances to the nearest neighbour of what has no copy: of copies
# with a word or two changed 89 to 94 % lie below 0.5, of other dialogues, translations and
# questions 0 to 1 %, of a set that repeats its examples under several templates about 10 %
# (hashing encoder). With 0.6 these would be 16 %, and hardly more copies.
SURE_COPY, NO_COPY = 0.3, 0.5
# What may show that a candidate can be spared, by name.
EVIDENCE = ("copy", "mismatch", "outlier", "unrelated")


def copy_likelihood(distance: FloatArray) -> FloatArray:
    """(n,) how likely a candidate is a near-copy of what was trained on lately.

    Args:
        distance: (n,) distance of the unit embedding to the nearest one trained on lately, over
            that of what has no copy to its nearest neighbour.
    """
    likelihood: FloatArray = np.clip((NO_COPY - distance) / (NO_COPY - SURE_COPY), 0.0, 1.0)
    return likelihood


def either(one: FloatArray, other: FloatArray) -> FloatArray:
    """(n,) probability that one of two independent things is so."""
    return 1.0 - (1.0 - one) * (1.0 - other)


WINDOW = 1024
# Quantile of the distances to nearest neighbours that is taken for that of candidates without a
# copy: copies would have to be nine in ten to be taken for what is usual.
NOT_COPIED = 0.9
# A yardstick is no shorter, however alike the candidates.
LEAST_DISTANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of n candidates.

    Attributes:
        loss: (n,) loss, own where known, else predicted.
        rank: (n,) rank inside the stratum of the loss beyond what the length explains, in [0, 1].
        mismatch: (n,) probability that the target belongs to another prompt.
    """

    loss: FloatArray
    rank: FloatArray
    mismatch: FloatArray


class Yardsticks:
    """Scores candidates by the shared model and by the lane's window.

    Args:
        model: The model shared by all lanes.
        keep: The fraction that is kept.
        feature_names: Names of the store's feature columns.
        columns: Columns of a design row.
        dim: Dimensions of the embedding, the last columns of a design row.

    Attributes:
        typical: Typical distance to the nearest neighbour, in the metric space.
        apart: Distance to the nearest neighbour, between unit embeddings, of candidates that are
            no copies.
    """

    def __init__(
        self, model: LossModel, keep: Keep, feature_names: Sequence[str], *, columns: int, dim: int
    ) -> None:
        self._model, self._keep = model, keep
        self._dim = dim
        place = {name: NUM_OWN_COLUMNS + at for at, name in enumerate(feature_names)}
        self._mismatch, self._relevance = place.get(MISMATCH_COLUMN), place.get(RELEVANCE_COLUMN)
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
        self.typical = neighbour_distance(self.project(x), stratum, 0.5)
        self.apart = neighbour_distance(x, stratum, NOT_COPIED, first=x.shape[1] - self._dim)

    def score(self, x: Float32Array, stratum: IntArray, own_loss: FloatArray) -> Scores:
        """Score candidates.

        Args:
            x: (n, columns) design rows.
            stratum: (n,) strata.
            own_loss: (n,) losses that were measured lately, NaN where none was.
        """
        predicted, excess = self._predict(x)
        known = np.isfinite(own_loss)
        surprise = np.where(known, own_loss - predicted, 0.0)
        return Scores(
            loss=np.where(known, own_loss, predicted),
            rank=self._ranks.rank(excess + surprise, stratum),
            mismatch=self._mismatches(x),
        )

    def project(self, x: Float32Array) -> Float32Array:
        """(n, metric_dim) unit vectors of the metric space."""
        return unit_rows(project(x, self._metric))

    def unrelated(self, x: Float32Array, at: IntArray) -> FloatArray:
        """(n,) probability of rows `at` of x not to be of the target set's kind; else zeros."""
        if self._relevance is None:
            return np.zeros(len(at))
        return 1.0 - raised(_probability(x[at, self._relevance]), self._keep.leniency)

    def _mismatches(self, x: Float32Array) -> FloatArray:
        """(n,) the store's column of that name; zeros without one."""
        return np.zeros(len(x)) if self._mismatch is None else _probability(x[:, self._mismatch])

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

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved window; the model must have been loaded before."""
        ids = state.wholes("sample_id", None, below=lookup.num_samples)
        stratum = state.wholes("stratum", len(ids), below=lookup.num_strata)
        values = state.numbers("rank_values", None)
        of_value = state.wholes("rank_stratum", len(values), below=lookup.num_strata)
        self._window.clear()
        self._window.add(ids, lookup.rows_of(ids), stratum)
        self._ranks = RankTable(values, of_value)
        self.typical, self.apart = (
            state.number(name, least=LEAST_DISTANCE) for name in ("typical", "apart")
        )
        self._prediction, self._metric = self._model.prediction, self._model.metric


def _probability(column: Float32Array) -> FloatArray:
    return np.clip(column.astype(np.float64), 0.0, 1.0)


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


def neighbour_distance(
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
    return max(float(np.quantile(found, quantile)), LEAST_DISTANCE) if len(found) else 1.0


# Refreshes after which a measured loss gives way to the prediction: the model has moved on.
FRESH_REFRESHES = 3
# Distances to what was trained on are known from the start up to that of a copy times this, so
# that they need not be looked for again when the yardstick grows a little.
REACH = 1.1


class Scorer:
    """Keeps the scores in a lane's pool up to date.

    Args:
        policy: Rule that picks a batch; says what it wants to be told.
        model: Shared model.
        pool: The lane's pool.
        recent: What the lane trained on lately.
        yardsticks: The lane's yardsticks.
        outliers: Who remembers losses that stand out; None if nobody asks.

    Attributes:
        refreshes: Refreshes so far.
        reach: Up to which distance those in the pool are known.
    """

    def __init__(
        self,
        policy: Policy,
        model: LossModel,
        pool: Pool,
        recent: RecentlyTrained,
        yardsticks: Yardsticks,
        outliers: Outliers | None,
    ) -> None:
        self._policy, self._model, self._outliers = policy, model, outliers
        self._pool, self._recent, self._yardsticks = pool, recent, yardsticks
        self._measured_for_good = policy.measures_all
        self._weighs_evidence = "evidence" in policy.needs
        self.refreshes = 0
        self.reach = REACH * self._copies_within
        self._metric: Float32Array | None = None

    @property
    def _copies_within(self) -> float:
        """Distance from which on a candidate is no copy."""
        return NO_COPY * self._yardsticks.apart

    @property
    def _model_counts(self) -> bool:
        return self._model.fitted and "losses" in self._policy.needs

    @property
    def _scores(self) -> bool:
        return not self._policy.needs.isdisjoint(("losses", "evidence"))

    def watch(self, ids: IntArray, x: Float32Array, stratum: IntArray) -> None:
        """Take the yardsticks from (n,) samples that were just offered, too."""
        if self._scores:
            self._yardsticks.watch(ids, x, stratum)

    def score(self, slots: IntArray, x: Float32Array) -> None:
        """Score candidates that have just come into the pool, by the model of the last refresh and
        by what was trained on.

        Args:
            slots: (n,) where they are.
            x: (n, columns) their design rows, which the pool holds too, but not in one piece.
        """
        self._pool.columns.worth[slots] = 1.0
        if not len(slots) or not (self._model_counts or self._weighs_evidence):
            return
        self._place(slots, x)
        self._look_for_copies(slots)
        self._predict(slots, x)

    def _predict(self, slots: IntArray, x: Float32Array) -> None:
        """Say what loss (n,) pooled candidates have and how it ranks, and so what they are worth.

        A loss of their own goes before the model's prediction, while it is fresh."""
        pool = self._pool
        stratum, own = pool.columns.stratum[slots], pool.columns.own_loss[slots]
        if not self._measured_for_good:
            age = self.refreshes - pool.columns.own_since[slots]
            own = np.where(age >= FRESH_REFRESHES, np.nan, own)
        scores = self._yardsticks.score(x, stratum, own)
        pool.columns.loss[slots] = scores.loss
        pool.columns.rank[slots] = scores.rank
        pool.columns.mismatch[slots] = scores.mismatch
        if self._outliers is not None:
            ids = pool.columns.sample_id[slots]
            pool.columns.outlier[slots] = self._outliers.probability(ids)
        self._weigh(slots)

    def _place(self, slots: IntArray, x: Float32Array) -> None:
        """Find the (n,) pooled candidates' places in the metric space."""
        if self._model_counts:
            self._pool.z[slots] = self._yardsticks.project(x)

    def _look_for_copies(self, slots: IntArray) -> None:
        """Compare (n,) pooled candidates with all that was trained on lately."""
        pool = self._pool
        pool.columns.distance[slots], found = np.inf, np.full(len(slots), EMPTY, np.int64)
        if self._weighs_evidence:
            pool.columns.distance[slots] = self._recent.nearest_embedding(
                pool.x,
                slots,
                pool.columns.stratum[slots],
                pool.columns.sample_id[slots],
                within=self.reach,
                heads=pool.heads,
                found=found,
            )
        pool.columns.nearest[slots] = found

    def evidence(self, slots: IntArray) -> dict[str, FloatArray]:
        """By name of `EVIDENCE`, how likely it is that (n,) pooled candidates can be spared for
        it; nothing where nobody asks."""
        if not self._weighs_evidence:
            return {}
        distance = self._pool.columns.distance[slots] / self._yardsticks.apart
        columns = self._pool.columns
        return {
            "copy": copy_likelihood(distance),
            "mismatch": columns.mismatch[slots],
            "outlier": columns.outlier[slots],
            "unrelated": self._yardsticks.unrelated(self._pool.x, slots),
        }

    def _weigh(self, slots: IntArray) -> None:
        """Renew the utility and the worth of (n,) candidates that have been scored."""
        pool = self._pool
        copy = copy_likelihood(pool.columns.distance[slots] / self._yardsticks.apart)
        noise = either(pool.columns.mismatch[slots], pool.columns.outlier[slots])
        rank, loss = pool.columns.rank[slots], pool.columns.loss[slots]
        utility = self._policy.utility(rank=rank, loss=loss, copy=copy, mismatch=noise)
        if self._weighs_evidence:
            unrelated = self._yardsticks.unrelated(pool.x, slots)
            utility = utility - self._policy.config.advanced.target_weight * unrelated
            pool.columns.worth[slots] = (1.0 - either(copy, noise)) * (1.0 - unrelated)
        pool.columns.utility[slots] = utility

    def bring_near(self, ids: IntArray, stratum: IntArray, x: Float32Array) -> None:
        """What waits in the pool may be a copy of what was just trained on.

        Args:
            ids: (n,) samples that were trained on and have left the pool.
            stratum: (n,) their strata.
            x: (n, columns) their design rows.
        """
        if not self._weighs_evidence:
            return
        pool, slots = self._pool, self._pool.slots()
        waiting, before = pool.columns.stratum[slots], pool.columns.distance[slots]
        order = np.argsort(stratum, kind="stable")
        counts = np.bincount(stratum, minlength=int(waiting.max(initial=0)) + 1)
        known, found = x[order], np.empty(len(slots), np.int64)
        near = nearest_of_group(
            pool.x,
            slots,
            pool.columns.sample_id[slots],
            waiting,
            known,
            ids[order],
            np.append(0, np.cumsum(counts)),
            first=pool.first_of_unit,
            within=self.reach,
            heads=pool.heads,
            known_heads=heads_of(known[:, pool.first_of_unit :]),
            found=found,
        )
        nearer = near < before
        pool.columns.distance[slots[nearer]] = near[nearer]
        pool.columns.nearest[slots[nearer]] = found[nearer]
        self._weigh(slots[nearer])

    def refresh(self) -> bool:
        """Score everything anew, model and strata having been refreshed; whether there was need.

        Places in the metric space change with the metric only. Distances to what was trained on
        have been kept up to date; they are looked for again if the yardstick has outgrown them.
        """
        self.refreshes += 1
        if not (self._model_counts or self._weighs_evidence):
            return False
        self._yardsticks.refresh()
        slots = self._pool.slots()
        if self._metric is not self._model.metric:
            self.project_again()
        known, self.reach = self.reach, min(self.reach, REACH * self._copies_within)
        if known < self._copies_within:
            self.reach = REACH * self._copies_within
            self._look_for_copies(slots)
        self._predict(slots, self._pool.x[slots])
        return True

    def project_again(self) -> None:
        """Renew all metric vectors, which a checkpoint does not hold."""
        self._metric = self._model.metric
        if self._model_counts:
            slots = self._pool.slots()
            self._place(slots, self._pool.x[slots])
            self._recent.project(self._yardsticks.project)

    def state_dict(self) -> State:
        """How often, and how far, candidates have been scored; their scores are the pool's."""
        return {"refreshes": self.refreshes, "reach": self.reach}

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved state; model, pool, yardsticks and what was trained on come before."""
        self.refreshes, self.reach = state.whole("refreshes"), state.number("reach", least=0.0)
        self.project_again()
