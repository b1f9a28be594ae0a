"""Answers that come back to a lane: losses and sketches of what it gave out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np

from slap_stream.core.rng import Purpose, uniforms
from slap_stream.core.saved import Saved
from slap_stream.selection.awaiting import Awaiting
from slap_stream.selection.departures import WITHDRAWN, Departures
from slap_stream.selection.loss_model import LOG_LENGTH, LossModel
from slap_stream.selection.moments import Moments
from slap_stream.selection.outliers import Outliers
from slap_stream.selection.policies.base import Policy
from slap_stream.selection.pool import Pool
from slap_stream.selection.schedule import LanePlan, LaneProgress
from slap_stream.selection.scoring import Scorer
from slap_stream.selection.state import Lookup
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray, State


class Answers:
    """Finite losses and sketches since the last refresh.

    Ids and numbers are kept rather than sums: they are fewer, and the design rows follow from ids.
    """

    def __init__(self, *, columns: int, sketch_dim: int) -> None:
        self._columns = columns
        self._sketch_dim = sketch_dim
        self.clear()

    def __len__(self) -> int:
        return sum(len(ids) for ids in self._ids)

    def clear(self) -> None:
        """Forget them: a refresh has taken them in."""
        self._ids: list[IntArray] = []
        self._x: list[Float32Array] = []
        self._losses: list[FloatArray] = []
        self._sketched: list[BoolArray] = []
        self._sketches: list[Float32Array] = []

    def add(
        self,
        sample_id: IntArray,
        x: Float32Array,
        losses: FloatArray,
        sketches: Float32Array | None = None,
    ) -> None:
        """Add (n,) finite losses, with (n, sketch_dim) sketches if there are any.

        Sketches that are zero or not finite carry no direction and are left out.
        """
        sketched = np.zeros(len(sample_id), bool)
        if sketches is not None:
            sketched = np.isfinite(sketches).all(axis=1) & np.any(sketches != 0, axis=1)
            self._sketches.append(np.asarray(sketches[sketched], np.float32))
        self._ids.append(sample_id)
        self._x.append(x)
        self._losses.append(losses)
        self._sketched.append(sketched)

    def moments(self) -> Moments:
        """Sums over all of them, those without a sketch first, else in the order they came."""
        moments = Moments.zeros(columns=self._columns, sketch_dim=self._sketch_dim)
        if self._ids:
            sketched, losses = np.concatenate(self._sketched), np.concatenate(self._losses)
            plain, with_sketch = [], []
            for x, some in zip(self._x, self._sketched, strict=True):
                if some.any():
                    with_sketch.append(x[some])
                    x = x[~some]
                plain.append(x)
            moments.add_losses(plain, losses[~sketched])
            if with_sketch:
                sketches = np.concatenate(self._sketches)
                moments.add_sketched(with_sketch, losses[sketched], sketches)
        return moments

    def state_dict(self) -> State:
        """Ids, losses and sketches."""
        none = np.zeros((0, self._sketch_dim), np.float32)
        return {
            "sample_id": np.concatenate([np.zeros(0, np.int64), *self._ids]),
            "losses": np.concatenate([np.zeros(0), *self._losses]),
            "sketched": np.concatenate([np.zeros(0, bool), *self._sketched]),
            "sketches": np.concatenate([none, *self._sketches]),
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved answers."""
        self.clear()
        ids = state.wholes("sample_id", None, below=lookup.num_samples)
        losses, sketched = state.numbers("losses", len(ids)), state.flags("sketched", len(ids))
        sketches = state.numbers32("sketches", int(sketched.sum()), self._sketch_dim)
        if len(ids):
            self._ids, self._x, self._losses = [ids], [lookup.rows_of(ids)], [losses]
            self._sketched = [sketched]
            self._sketches = [sketches] if len(sketches) else []


logger = logging.getLogger(__name__)

# Losses of trained samples that are learnt from between two refreshes, over all lanes, on average:
# ten refreshes of them, and of what was probed, are many for each column of a design row.
TRAINED_PER_REFRESH = 1024
# What is told of candidates that are withdrawn for their losses.
NOT_FINITE = "its loss was not finite"
# What is counted of a lane over the run.
COUNTERS = ("observed", "nonfinite", "withdrawn", "repeats_in_batch", "batches_repeated")


class LaneFeedback:
    """Takes in answers, and tells the pool what was measured of its candidates.

    Args:
        plan: What all lanes have in common.
        policy: Rule that picks a batch; where it uses no losses, nothing is learnt from them.
        model: Shared model.
        pool: The lane's pool.
        scorer: Who counts the lane's refreshes.
        outliers: Who remembers losses that stand out; None if nobody asks.
        progress: How far the lane is.

    Attributes:
        departures: Who is told of candidates that are withdrawn; None until somebody wants to be.
        awaiting_trained: Open questions about what was composed into batches.
        awaiting_probed: Open questions about what was to be probed.
        answers: Finite losses and sketches since the last refresh.
        agreement: (6,) sums over observed samples of 1, p, y, p p, y y and p y, p being the loss
            that was predicted for y.
        counters: Losses observed and not finite, and candidates withdrawn for the latter.
    """

    def __init__(
        self,
        plan: LanePlan,
        policy: Policy,
        model: LossModel,
        pool: Pool,
        scorer: Scorer,
        outliers: Outliers | None,
        progress: LaneProgress,
    ) -> None:
        self._model, self._pool, self._scorer = model, pool, scorer
        self._progress = progress
        self.departures: Departures | None = None
        self.outliers = outliers
        self._seed = plan.config.seed
        trained = plan.batch_size * plan.num_lanes * plan.config.probe_every
        self._share = min(1.0, TRAINED_PER_REFRESH / trained)
        self._learns = policy.learns_losses
        self.awaiting_trained, self.awaiting_probed = Awaiting(plan.patience), Awaiting(2)
        self.answers = Answers(columns=plan.columns, sketch_dim=plan.config.advanced.sketch_dim)
        self.agreement = np.zeros(6)
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))

    def take_probed(
        self,
        ids: IntArray,
        x: Float32Array,
        source: IntArray,
        losses: FloatArray,
        sketches: Float32Array | None,
        measurements: Mapping[str, FloatArray],
    ) -> None:
        """Take in what the probe measured of (n,) samples of (n,) sources with design rows x
        (n, columns)."""
        fine = self._finite(ids, losses)
        ids, losses = ids[fine], losses[fine]
        if self.outliers is not None:
            self.outliers.observe(ids, x[fine], losses, source[fine], self._model.predict(x[fine]))
        sketches = None if sketches is None else sketches[fine]
        measured = {name: values[fine] for name, values in measurements.items()}
        if self._learns:
            self.answers.add(ids, x[fine], losses, sketches)
        self._pool.measure(ids, losses, sketches, measured, since=self._scorer.refreshes)

    def take_trained(
        self, ids: IntArray, x: Float32Array, source: IntArray, losses: FloatArray
    ) -> None:
        """Take in the losses of (n,) samples that were trained on, of (n,) sources and with rows x
        (n, columns).

        Where there are more than are needed, some are drawn to be learnt from.
        """
        fine = self._finite(ids, losses)
        if not fine.all():
            ids, x, source, losses = ids[fine], x[fine], source[fine], losses[fine]
        if not self._learns:
            return
        if self._share < 1.0:
            drawn = self._drawn(ids)
            self.answers.add(ids[drawn], x[drawn], losses[drawn])
        else:
            self.answers.add(ids, x, losses)
        p = self._model.predict(x)
        if self.outliers is not None:
            self.outliers.observe(ids, x, losses, source, p)
        if p is not None:
            sums = [len(p), p.sum(), losses.sum(), p @ p, losses @ losses, p @ losses]
            self.agreement += np.asarray(sums, np.float64)

    def latest_lengths(self, count: int) -> Float32Array:
        """(count, batch) log lengths of the samples of the `count` batches composed last."""
        return np.stack([a.x[:, LOG_LENGTH] for a in self.awaiting_trained.latest(count)])

    def _drawn(self, ids: IntArray) -> BoolArray:
        """(n,) who of (n,) samples is learnt from; does not depend on which come together."""
        refreshes = self._scorer.refreshes
        draws = uniforms(self._seed, Purpose.LOSSES, refreshes, ids, np.zeros_like(ids))
        return draws < self._share

    def _finite(self, ids: IntArray, losses: FloatArray) -> BoolArray:
        """(n,) finite losses; the others are counted and their samples withdrawn."""
        fine = np.isfinite(losses)
        self.counters["observed"] += int(np.count_nonzero(fine))
        if not fine.all():
            if not self.counters["nonfinite"]:
                logger.warning(
                    "losses that are not finite came back for %d of %d samples; they are counted "
                    "in nonfinite and left out.",
                    np.count_nonzero(~fine),
                    len(ids),
                )
            self.counters["nonfinite"] += int(np.count_nonzero(~fine))
            slots = self._pool.slots()
            gone = slots[np.isin(self._pool.columns.sample_id[slots], ids[~fine])]
            self.counters["withdrawn"] += len(gone)
            if self.departures is not None:
                now = self._progress.epoch, self._progress.step
                self.departures.note(gone, WITHDRAWN, epoch=now[0], step=now[1], cause=NOT_FINITE)
            self._pool.remove(gone)
        return fine

    def refresh(self, decay: float) -> None:
        """The model has taken the answers in."""
        self.answers.clear()
        if self.outliers is not None:
            self.outliers.refresh()
        self.agreement *= decay

    def state_dict(self) -> State:
        """Questions, answers, and what is counted of them."""
        return {
            "agreement": self.agreement.copy(),
            "counters": dict(self.counters),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved state."""
        self.agreement, counters = state.numbers("agreement", 6), state.part("counters")
        self.counters = Counter({name: counters.whole(name) for name in COUNTERS})
        for name, part in self._parts().items():
            part.load_state_dict(state.part(name), lookup)

    def _parts(self) -> dict[str, Awaiting | Answers | Outliers]:
        parts: dict[str, Awaiting | Answers | Outliers] = {
            "awaiting_trained": self.awaiting_trained,
            "awaiting_probed": self.awaiting_probed,
            "answers": self.answers,
        }
        return parts if self.outliers is None else {**parts, "outliers": self.outliers}
