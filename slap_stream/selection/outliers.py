"""Candidates whose loss stands out: noise that no words show.

What the loss model cannot explain of a loss that was measured, in training or by the probe, is held
against what it cannot explain of others of the same source and length of target. Who lies far above
is taken for noise, as far as the lower tail is thinner than the upper one (`core.outliers`). What
is hard but right is not: where a kind of text is hard, its embedding says so, and the loss model
expects it.

Losses are remembered by sample id, for as many samples as there is room: a sample that is met again
is judged by the mean over its visits. So noise that training has begun to learn by heart is still
known, and what was hard at first and has become easy is free again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from slap_stream.core.outliers import Mirror, Spread
from slap_stream.core.saved import Saved
from slap_stream.selection.loss_model import LOG_LENGTH, LossModel
from slap_stream.selection.state import Lookup
from slap_stream.types import Float32Array, FloatArray, IntArray, State

# Samples remembered by a lane: 7 MB.
REMEMBERED = 2**18
# Residuals that centres and scales are taken from: the last ones, since the model moves on.
RECENT = 2_048
# Remembered samples that tails are counted over; more change little.
COUNTED = 4_096
# Groups of targets by length: 1, 2 to 3, 4 to 7, ... tokens.
LENGTHS = 12


@dataclass(kw_only=True, slots=True)
class _Residuals:
    """Residuals of n samples, in the order they came.

    Attributes:
        sample_id: (n,) sample ids.
        residual: (n,) loss beyond what the model predicts.
        source: (n,) sources.
        length: (n,) groups of target lengths.
    """

    sample_id: IntArray
    residual: FloatArray
    source: IntArray
    length: IntArray

    @classmethod
    def none(cls) -> _Residuals:
        whole = np.zeros(0, np.int64)
        return cls(sample_id=whole, residual=np.zeros(0), source=whole, length=whole)

    def __len__(self) -> int:
        return len(self.sample_id)

    def and_then(self, other: _Residuals, most: int | None = None) -> _Residuals:
        """These and others after them; of all of them the last `most`."""
        start = 0 if most is None else max(0, len(self) + len(other) - most)
        return _Residuals(
            **{
                f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)])[start:]
                for f in fields(self)
            }
        )

    def state_dict(self) -> State:
        return {f.name: getattr(self, f.name).copy() for f in fields(self)}

    @classmethod
    def from_saved(cls, state: Saved, lookup: Lookup, num_sources: int) -> _Residuals:
        ids = state.wholes("sample_id", None, below=lookup.num_samples)
        return cls(
            sample_id=ids,
            residual=state.numbers("residual", len(ids)),
            source=state.wholes("source", len(ids), below=num_sources),
            length=state.wholes("length", len(ids), below=LENGTHS),
        )


class Outliers:
    """Remembers how far the losses of a lane's samples stood out.

    State: residuals since the last refresh; the last ones before it; of each remembered sample the
    mean standardised residual, how many visits it is over, and the refresh of the last one.

    Args:
        model: Shared model.
        num_sources: Sources that are told apart.
        target_share: Design column with the part of a sample that is target, if there is one.

    Attributes:
        found: How many of the remembered samples are noise, as far as is known.
    """

    def __init__(self, model: LossModel, *, num_sources: int, target_share: int | None) -> None:
        self._model = model
        self._num_sources, self._target_share = num_sources, target_share
        self._refreshes = 0
        self._fresh = self._recent = _Residuals.none()
        # Losses of before the model could predict any.
        self._unexplained: list[tuple[IntArray, Float32Array, FloatArray, IntArray]] = []
        # Ascending, for binary search.
        self._ids: IntArray = np.zeros(0, np.int64)
        self._height: FloatArray = np.zeros(0)
        self._visits: IntArray = np.zeros(0, np.int64)
        self._when: IntArray = np.zeros(0, np.int64)
        self._count()

    def __len__(self) -> int:
        return len(self._ids)

    def observe(
        self,
        ids: IntArray,
        x: Float32Array,
        losses: FloatArray,
        source: IntArray,
        predicted: FloatArray | None,
    ) -> None:
        """Take in the finite losses of (n,) samples.

        Args:
            ids: (n,) sample ids.
            x: (n, columns) design rows.
            losses: (n,) losses.
            source: (n,) sources.
            predicted: (n,) losses as the model predicts them; None until it can.
        """
        if not len(ids):
            return
        if predicted is None:
            self._unexplained.append((ids, x, losses, source))
            return
        more = _Residuals(
            sample_id=ids, residual=losses - predicted, source=source, length=self._lengths(x)
        )
        self._fresh = self._fresh.and_then(more)

    def refresh(self) -> None:
        """Place the losses since the last refresh among others, the model having been refreshed."""
        self._refreshes += 1
        if not self._model.fitted:
            return
        waiting, self._unexplained = self._unexplained, []
        for ids, x, losses, source in waiting:
            self.observe(ids, x, losses, source, self._model.predict(x))
        fresh, self._fresh = self._fresh, _Residuals.none()
        if not len(fresh):
            return
        self._recent = self._recent.and_then(fresh, most=RECENT)
        recent = self._recent
        spread = Spread.of(
            recent.residual, recent.source, recent.length, shape=(self._num_sources, LENGTHS)
        )
        self._remember(
            fresh.sample_id, spread.standardised(fresh.residual, fresh.source, fresh.length)
        )
        self._count()

    def probability(self, ids: IntArray) -> FloatArray:
        """(n,) probability that each sample is noise, as its own losses tell; 0 where none was
        measured."""
        if not len(self._ids):
            return np.zeros(len(ids))
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return self._mirror.probability(
            np.where(self._ids[place] == ids, self._height[place], np.nan)
        )

    def _remember(self, ids: IntArray, height: FloatArray) -> None:
        """Add (n,) visits to the means of their samples, and forget whom there is no room for."""
        known, inverse = np.unique(ids, return_inverse=True)
        visits = np.bincount(inverse)
        sums = np.bincount(inverse, weights=height)
        place = np.searchsorted(self._ids, known)
        old = np.zeros(len(known), bool)
        inside = place < len(self._ids)
        old[inside] = self._ids[place[inside]] == known[inside]
        at = place[old]
        total = self._visits[at] + visits[old]
        self._height[at] = (self._height[at] * self._visits[at] + sums[old]) / total
        self._visits[at], self._when[at] = total, self._refreshes
        where, new = place[~old], ~old
        self._ids = np.insert(self._ids, where, known[new])
        self._height = np.insert(self._height, where, sums[new] / visits[new])
        self._visits = np.insert(self._visits, where, visits[new])
        self._when = np.insert(self._when, where, self._refreshes)
        if len(self._ids) > REMEMBERED:
            stay = np.sort(np.argsort(-self._when, kind="stable")[:REMEMBERED])
            self._ids, self._height = self._ids[stay], self._height[stay]
            self._visits, self._when = self._visits[stay], self._when[stay]

    def _count(self) -> None:
        """Count the tails over remembered samples, also those that are not trained on any more:
        else noise would come back as soon as none of it was seen."""
        some = self._height[:: -(-len(self._height) // COUNTED) or 1]
        self._mirror = Mirror.of(some)
        share = float(self._mirror.probability(some).mean()) if len(some) else 0.0
        self.found = share * len(self._height)

    def _lengths(self, x: Float32Array) -> IntArray:
        """(n,) groups of target lengths."""
        length = np.expm1(x[:, LOG_LENGTH].astype(np.float64))
        if self._target_share is not None:
            length = length * np.clip(x[:, self._target_share], 0.0, 1.0)
        group: IntArray = np.log2(np.maximum(length, 1.0)).astype(np.int64)
        return np.minimum(group, LENGTHS - 1)

    def state_dict(self) -> State:
        """All of it; only reads."""
        parts = [np.concatenate(column) for column in zip(*self._unexplained, strict=True)]
        none = np.zeros(0, np.int64)
        ids, _, losses, source = parts if parts else (none, none, np.zeros(0), none)
        return {
            "refreshes": self._refreshes,
            "fresh": self._fresh.state_dict(),
            "recent": self._recent.state_dict(),
            "unexplained": {"sample_id": ids, "losses": losses, "source": source},
            "sample_id": self._ids.copy(),
            "height": self._height.copy(),
            "visits": self._visits.copy(),
            "when": self._when.copy(),
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over a saved state."""
        self._refreshes = state.whole("refreshes")
        self._fresh, self._recent = (
            _Residuals.from_saved(state.part(name), lookup, self._num_sources)
            for name in ("fresh", "recent")
        )
        waiting = state.part("unexplained")
        ids = waiting.wholes("sample_id", None, below=lookup.num_samples)
        losses = waiting.numbers("losses", len(ids))
        source = waiting.wholes("source", len(ids), below=self._num_sources)
        self._unexplained = [(ids, lookup.rows_of(ids), losses, source)] if len(ids) else []
        self._ids = ids = state.wholes("sample_id", None, below=lookup.num_samples)
        if np.any(np.diff(ids) <= 0):
            raise state.refusal("sample_id", "ascending", ids[:5])
        self._height = state.numbers("height", len(ids))
        self._visits = state.wholes("visits", len(ids), least=1)
        self._when = state.wholes("when", len(ids))
        self._count()
