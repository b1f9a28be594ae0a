"""State that the lanes of a run share: loss model, strata, and the fraction that is kept.

All ranks have the same: it changes at refreshes only, by sums over all lanes. One of them solves
for regression and metric, and has the sums behind them; the others follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.saved import Saved
from slap_stream.selection.loss_model import (
    INTERCEPT,
    LOG_LENGTH,
    NUM_OWN_COLUMNS,
    LossModel,
)
from slap_stream.selection.moments import Moments
from slap_stream.selection.quota import Keep
from slap_stream.selection.schedule import LanePlan
from slap_stream.selection.state import Lookup
from slap_stream.selection.strata import Strata
from slap_stream.types import (
    MISMATCH_COLUMN,
    REFERENCE_COLUMN,
    RELEVANCE_COLUMN,
    Float32Array,
    FloatArray,
    State,
)


@dataclass(kw_only=True, slots=True)
class SinceRefresh:
    """What a lane has counted of its candidates since the last refresh.

    Attributes:
        clusters: Clusters of the embeddings.
        dim: Dimensions of the embeddings.
        centroid_sum: (clusters, dim) sums of the unit embeddings offered, by cluster.
        centroid_count: (clusters,) how many.
        left_worth: Sum of the worth of the candidates that left, trained on or pruned.
        left_count: How many.
    """

    clusters: int
    dim: int
    centroid_sum: FloatArray = field(init=False)
    centroid_count: FloatArray = field(init=False)
    left_worth: float = field(init=False)
    left_count: int = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A refresh has taken them in."""
        self.centroid_sum = np.zeros((self.clusters, self.dim))
        self.centroid_count = np.zeros(self.clusters)
        self.left_worth, self.left_count = 0.0, 0

    def state_dict(self) -> State:
        """The counts; only reads."""
        return {
            "centroid_sum": self.centroid_sum.copy(),
            "centroid_count": self.centroid_count.copy(),
            "left_worth": self.left_worth,
            "left_count": self.left_count,
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved counts."""
        self.centroid_sum = state.numbers("centroid_sum", self.clusters, self.dim)
        self.centroid_count = state.numbers("centroid_count", self.clusters, least=0.0)
        self.left_worth = state.number("left_worth", least=0.0)
        self.left_count = state.whole("left_count")


COUNTS = tuple(f.name for f in fields(SinceRefresh) if not f.init)
# What a lane's statistics hold, besides its number and its last step.
SUMS = (*(f.name for f in fields(Moments)), *COUNTS)


class StatisticsLayout:
    """Where each part of a lane's statistics lies in the vector.

    Args:
        example: Any lane's statistics; the shapes are those of the run and never change.

    Attributes:
        size: Numbers in the vector; depends on embedding, feature, cluster and sketch dimensions,
            not on how many samples there are.
    """

    def __init__(self, example: State) -> None:
        self._shapes = {name: np.shape(example[name]) for name in SUMS}
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.size = int(self._bounds[-1])

    def pack(self, statistics: State) -> FloatArray:
        """(size,) numbers of a lane's statistics; nested lists serve as arrays.

        Raises:
            KeyError: If a part is missing.
            ValueError: If one has another size.
        """
        parts = (
            np.reshape(np.asarray(statistics[name], np.float64), shape).ravel()
            for name, shape in self._shapes.items()
        )
        return np.concatenate([*parts])

    def unpack(self, vector: FloatArray) -> State:
        """Inverse of `pack`; without the lane's number, because the vector may be a sum."""
        return {
            name: vector[self._bounds[place] : self._bounds[place + 1]].reshape(shape).copy()
            for place, (name, shape) in enumerate(self._shapes.items())
        }


def sum_in_order(rows: FloatArray) -> FloatArray:
    """(size,) sum of (lanes, size) rows, first to last.

    NumPy's own sum may add in pairs, depending on the shape.
    """
    total: FloatArray = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


# Feature columns that, with the length of the whole sample, say how long its target is: a mean
# loss over few tokens is another thing than one over many.
LENGTH_FEATURES = ("target_share",)


class Shared:
    """Regression and metric, strata and keep, made for a run and refreshed together.

    Args:
        plan: How the run is cut.

    Attributes:
        model: Losses and gradients as predicted from embeddings and columns.
        strata: Who belongs to which stratum.
        keep: Fraction that is kept.
        seeded: Whether the strata have centroids.
    """

    def __init__(self, plan: LanePlan) -> None:
        config, store = plan.config, plan.store
        self._config: SlapConfig = config
        column_of = {
            name: NUM_OWN_COLUMNS + place for place, name in enumerate(store.feature_names)
        }
        self.model = LossModel(
            columns=plan.columns,
            dim=store.shape[1],
            metric_dim=config.advanced.metric_dim,
            sketch_dim=config.advanced.sketch_dim,
            warmup_losses=config.advanced.warmup_losses,
            length_columns=[INTERCEPT, LOG_LENGTH]
            + [column_of[name] for name in LENGTH_FEATURES if name in column_of],
            reference_column=column_of.get(REFERENCE_COLUMN),
        )
        self.strata = Strata(
            num_sources=len(store.source_names),
            num_clusters=config.advanced.num_clusters,
            pool_size=plan.pool_size,
            dim=store.shape[1],
        )
        self.keep = Keep(config)
        self._mismatch = column_of.get(MISMATCH_COLUMN)
        self._relevance = column_of.get(RELEVANCE_COLUMN)
        self.seeded = False

    def seed(self, x: Float32Array, *, weighs: bool) -> None:
        """Place the centroids, and say what is worth keeping as far as it is known beforehand.

        Args:
            x: (n, columns) design rows of lane 0's first block.
            weighs: Whether evidence against candidates is weighed at all.
        """
        self.strata.seed(x[:, -self.strata.centroids.shape[1] :], self._config.seed)
        if weighs:
            mismatch: Float32Array = np.zeros(len(x), np.float32)
            if self._mismatch is not None:
                mismatch = np.clip(x[:, self._mismatch], 0.0, 1.0)
            if self._relevance is None:
                self.keep.guess(1.0 - float(mismatch.mean()))
            else:
                relevance = np.clip(x[:, self._relevance].astype(np.float64), 0.0, 1.0)
                self.keep.aim(relevance, 1.0 - mismatch.astype(np.float64))
        self.seeded = True

    def learn(self, sums: State) -> None:
        """Take in statistics summed over all lanes, as `Lane.statistics` names them."""
        self.model.refresh(Moments.from_dict(sums), self._config.advanced.decay)
        self._take_counts(sums)

    def lesson(self, sums: State) -> State:
        """What others have to be told, who are to `follow`; only reads.

        Args:
            sums: That this has learnt from just now.
        """
        return {"solution": self.model.solution(), **{name: sums[name] for name in COUNTS}}

    def follow(self, lesson: State) -> None:
        """Take over what another rank has learnt."""
        self.model.follow(lesson["solution"])
        self._take_counts(lesson)

    def _take_counts(self, sums: State) -> None:
        decay = self._config.advanced.decay
        self.strata.move(sums["centroid_sum"], sums["centroid_count"], decay)
        self.keep.refresh(float(sums["left_worth"]), float(sums["left_count"]))

    def metrics(self) -> dict[str, float]:
        """Flat numbers, the same on every rank."""
        return {
            "keep": self.keep.value,
            "dispensable": self.keep.dispensable,
            "strata": float(self.strata.num_strata),
            "strata_by_source": float(self.strata.by_source),
            "fitted": float(self.model.fitted),
            "metric_from_sketches": float(self.model.metric_from_sketches),
            "loss_noise": self.model.noise,
        }

    def state_dict(self) -> State:
        """All of it; only reads."""
        return {
            "seeded": self.seeded,
            "model": self.model.state_dict(),
            "strata": self.strata.state_dict(),
            "keep": self.keep.state_dict(),
        }

    def load_state_dict(self, state: Saved) -> None:
        """Take over a saved state."""
        self.seeded = state.flag("seeded")
        self.model.load_state_dict(state.part("model"))
        self.strata.load_state_dict(state.part("strata"))
        self.keep.load_state_dict(state.part("keep"))
