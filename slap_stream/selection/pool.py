"""The candidates that wait in a lane: a bounded pool for each stratum, and what was trained lately.

Both hold each candidate's design row, so that a refresh can predict it anew. Design rows are a pure
function of the sample id, so a checkpoint holds ids and small numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.kernels import Heads, heads_of, nearest_of_group
from slap_stream.core.saved import Saved
from slap_stream.core.sorting import first_of_each, place_in_group, sort_candidates
from slap_stream.selection.state import Lookup
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray, State

EMPTY = -1
# Columns that may hold NaN (not measured) or infinity (too far to be known).
NOT_FINITE = ("own_loss", "distance")


@dataclass(kw_only=True, slots=True)
class Columns:
    """What is kept of each pooled candidate, slot by slot; all of it is in a checkpoint.

    Attributes:
        sample_id: (capacity,) sample ids; -1 where a slot is free.
        occurrence: (capacity,) which copy of the sample each is.
        block: (capacity,) block that it was offered from.
        stratum: (capacity,) strata.
        offered_at: (capacity,) number of candidates that the lane was offered before.
        gumbel: (capacity,) noise of the candidate in this epoch.
        loss: (capacity,) current estimate of the loss.
        own_loss: (capacity,) the candidate's own probed loss, NaN if none.
        own_since: (capacity,) refresh that `own_loss` is from.
        rank: (capacity,) rank of the excess loss in the stratum.
        mismatch: (capacity,) probability that the target belongs to another prompt.
        outlier: (capacity,) probability that the target is noise, as the sample's losses tell.
        distance: (capacity,) distance of the unit embedding to the nearest one trained on lately;
            inf also where it is only known to be too far for a copy.
        nearest: (capacity,) sample that it is to; -1 if none is known.
        utility: (capacity,) utility u, as the policy makes it of these.
        worth: (capacity,) probability that the candidate is not dispensable.
    """

    sample_id: IntArray
    occurrence: IntArray
    block: IntArray
    stratum: IntArray
    offered_at: IntArray
    gumbel: FloatArray
    loss: FloatArray
    own_loss: FloatArray
    own_since: IntArray
    rank: FloatArray
    mismatch: FloatArray
    outlier: FloatArray
    distance: FloatArray
    nearest: IntArray
    utility: FloatArray
    worth: FloatArray

    @classmethod
    def free(cls, capacity: int) -> Columns:
        """Columns of so many slots, none of them in use."""
        whole, real = np.zeros(capacity, np.int64), np.zeros(capacity)
        made: dict[str, Any] = {
            f.name: (whole if f.type == "IntArray" else real).copy() for f in fields(cls)
        }
        columns = cls(**made)
        columns.sample_id[:] = EMPTY
        return columns

    def by_name(self) -> dict[str, NDArray[Any]]:
        """The arrays themselves, not copies, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Pool:
    """Bounded pools of a lane's candidates, one per stratum, in one set of arrays.

    Args:
        capacity: Candidates held at most.
        columns: Columns of a design row.
        dim: Dimensions of the unit embedding, the last columns of a design row; 0: it is not kept.
        metric_dim: Dimensions of the metric space.
        sketch_dim: Length of the gradient sketches that candidates carry; 0: they carry none.
        measurements: Names of other numbers that are measured of candidates.

    Attributes:
        x: (capacity, columns) float32 design rows.
        first_of_unit: Column in which the unit embedding begins.
        heads: Heads of the unit embeddings.
        z: (capacity, metric_dim) float32 unit vectors of the metric space.
        sketch: (capacity, sketch_dim) float32 measured gradient sketches, zero where none was.
        measured: By name, (capacity,) other numbers that were measured, 0 where none was.
        columns: What is kept of each candidate besides.
    """

    def __init__(
        self,
        *,
        capacity: int,
        columns: int,
        dim: int,
        metric_dim: int,
        sketch_dim: int = 0,
        measurements: Sequence[str] = (),
    ) -> None:
        self.capacity = capacity
        self.first_of_unit = columns - dim
        self.x: Float32Array = np.zeros((capacity, columns), np.float32)
        self.heads = heads_of(self.unit)
        self.z: Float32Array = np.zeros((capacity, metric_dim), np.float32)
        self.sketch: Float32Array = np.zeros((capacity, sketch_dim), np.float32)
        self.measured: dict[str, FloatArray] = {name: np.zeros(capacity) for name in measurements}
        self.columns = Columns.free(capacity)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.columns.sample_id != EMPTY))

    @property
    def unit(self) -> Float32Array:
        """(capacity, dim) unit embeddings, not a copy."""
        return self.x[:, self.first_of_unit :]

    def slots(self) -> IntArray:
        """(n,) slots in use, ascending."""
        return np.flatnonzero(self.columns.sample_id != EMPTY)

    def offer(self, x: Float32Array, **columns: NDArray[np.generic]) -> IntArray:
        """Take in candidates; columns that are not given become zero, `own_loss` NaN.

        Args:
            x: (n, columns) design rows.
            **columns: (n,) values by the names of `Columns`.

        Returns:
            (n,) the slots they were put in.

        Raises:
            ValueError: If there is no room; pruning comes first.
        """
        free = np.flatnonzero(self.columns.sample_id == EMPTY)
        if len(x) > len(free):
            raise ValueError(
                f"candidates offered must fit into {len(free)} free slots, got {len(x)}; prune "
                "first."
            )
        slots = free[: len(x)]
        self.x[slots] = x
        self.sketch[slots] = 0.0
        for column in self.measured.values():
            column[slots] = 0.0
        self.heads.put(slots, heads_of(x[:, self.first_of_unit :]))
        self.columns.own_loss[slots] = np.nan
        for name, values in self.columns.by_name().items():
            if name in columns:
                values[slots] = columns[name]
            elif name != "own_loss":
                values[slots] = 0
        return slots

    def measure(
        self,
        sample_id: IntArray,
        losses: FloatArray,
        sketches: Float32Array | None = None,
        measurements: Mapping[str, FloatArray] | None = None,
        *,
        since: int,
    ) -> None:
        """Note what was measured of samples on all their copies in the pool.

        Args:
            sample_id: (n,) sample ids, in the pool or not; the first of equal ones counts.
            losses: (n,) finite losses.
            sketches: (n, sketch_dim) gradient sketches; not finite ones count as not measured.
            measurements: (n,) other numbers, by name; not finite ones count as not measured.
            since: Refreshes before.
        """
        known, first = np.unique(sample_id, return_index=True)
        slots = self.slots()
        slots = slots[np.isin(self.columns.sample_id[slots], known)]
        at = first[np.searchsorted(known, self.columns.sample_id[slots])]
        self.columns.own_loss[slots] = losses[at]
        self.columns.own_since[slots] = since
        if sketches is not None and self.sketch.shape[1]:
            usable = np.all(np.isfinite(sketches), axis=1, keepdims=True)
            self.sketch[slots] = np.where(usable, sketches, 0.0)[at]
        for name, values in (measurements or {}).items():
            self.measured[name][slots] = np.where(np.isfinite(values), values, 0.0)[at]

    def remove(self, slots: IntArray) -> None:
        """Free these slots."""
        self.columns.sample_id[slots] = EMPTY

    def clear(self) -> None:
        """Free every slot."""
        self.columns.sample_id[:] = EMPTY

    def lowest(
        self, score: FloatArray, quota: IntArray | int, due: BoolArray, slots: IntArray
    ) -> IntArray:
        """Who leaves: candidates that are due first, then the lowest scores.

        Args:
            score: (n,) scores of the candidates in `slots`.
            quota: (num_strata,) how many leave each stratum, or how many over all strata.
            due: (n,) whether a candidate's time in the pool is over.
            slots: (n,) slots of the candidates to choose from.

        Returns:
            (sum of quota,) slots; the pool itself is not changed.
        """
        # Ties are broken by identity, not by slot, so that the result is the same after a resume.
        identity = self.columns.occurrence[slots], self.columns.sample_id[slots]
        if isinstance(quota, int):
            order = sort_candidates(score, *identity, group=(~due).astype(np.int64))
            lowest: IntArray = slots[order[:quota]]
            return lowest
        stratum = self.columns.stratum[slots]
        order = sort_candidates(score, *identity, group=2 * stratum + ~due)
        return slots[first_of_each(stratum[order], quota, order)]

    def state_dict(self) -> State:
        """All of the slots in use but what follows from sample ids, and which slots these are."""
        slots = self.slots()
        columns = {name: values[slots] for name, values in self.columns.by_name().items()}
        measured = {name: values[slots] for name, values in self.measured.items()}
        return {"slots": slots, "sketch": self.sketch[slots], "measured": measured, **columns}

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved candidates."""
        self.clear()
        slots = state.wholes("slots", None, below=self.capacity)
        if len(np.unique(slots)) != len(slots):
            raise state.refusal("slots", "all different", slots)
        below = {"stratum": lookup.num_strata}
        below |= dict.fromkeys(("sample_id", "nearest"), lookup.num_samples)
        for name, values in self.columns.by_name().items():
            if values.dtype == np.int64:
                least = EMPTY if name == "nearest" else 0
                most = below.get(name, 2**63)
                values[slots] = state.wholes(name, len(slots), least=least, below=most)
            elif name in NOT_FINITE:
                values[slots] = state.any_numbers(name, len(slots))
            else:
                values[slots] = state.numbers(name, len(slots))
        measured = state.part("measured")
        for name, values in self.measured.items():
            values[slots] = measured.numbers(name, len(slots))
        self.x[slots] = x = lookup.rows_of(self.columns.sample_id[slots])
        self.sketch[slots] = state.numbers32("sketch", len(slots), self.sketch.shape[1])
        self.heads.put(slots, heads_of(x[:, self.first_of_unit :]))


class RecentlyTrained:
    """The samples of each stratum that were trained on last, oldest overwritten first.

    Args:
        num_strata: Strata.
        per_stratum: Samples kept for each.
        columns: Columns of a design row.
        dim: Dimensions of the unit embedding, the last columns of a design row.
        metric_dim: Dimensions of the metric space.
    """

    def __init__(
        self, *, num_strata: int, per_stratum: int, columns: int, dim: int, metric_dim: int
    ) -> None:
        self._per_stratum = per_stratum
        self._first = columns - dim
        self.sample_id: IntArray = np.full((num_strata, per_stratum), EMPTY, np.int64)
        self.x: Float32Array = np.zeros((num_strata, per_stratum, columns), np.float32)
        self.z: Float32Array = np.zeros((num_strata, per_stratum, metric_dim), np.float32)
        self._heads = heads_of(np.zeros((num_strata * per_stratum, dim), np.float32))
        self.cursor: IntArray = np.zeros(num_strata, np.int64)

    def add(self, sample_id: IntArray, stratum: IntArray, x: Float32Array, z: Float32Array) -> None:
        """Remember (n,) samples in the order trained on: design rows and metric vectors."""
        order = np.argsort(stratum, kind="stable")
        count = np.bincount(stratum, minlength=len(self.cursor))
        place = np.empty_like(stratum)
        place[order] = place_in_group(stratum[order])
        # Of more samples than there are places only the last are written.
        place -= np.maximum(0, count - self._per_stratum)[stratum]
        kept = place >= 0
        if not kept.all():
            stratum, place, sample_id = stratum[kept], place[kept], sample_id[kept]
            x, z = x[kept], z[kept]
        at = stratum, (self.cursor[stratum] + place) % self._per_stratum
        self.sample_id[at], self.x[at], self.z[at] = sample_id, x, z
        self._heads.put(at[0] * self._per_stratum + at[1], heads_of(x[:, self._first :]))
        written = np.minimum(count, self._per_stratum)
        self.cursor = (self.cursor + written) % self._per_stratum

    def project(self, onto: Callable[[Float32Array], Float32Array]) -> None:
        """Renew all metric vectors; `onto` maps (n, columns) rows to (n, metric_dim)."""
        used = self.sample_id != EMPTY
        self.z[used] = onto(self.x[used])

    def nearest(self, z: Float32Array, stratum: IntArray, sample_id: IntArray) -> FloatArray:
        """(n,) distance to the nearest other sample of the stratum trained on lately.

        A sample's own earlier visit does not count: in the next pass it is no copy of itself.

        Args:
            z: (n, metric_dim) unit vectors of the metric space.
            stratum: (n,) strata.
            sample_id: (n,) sample ids.

        Returns:
            (n,) distances; inf where no other sample was trained on.
        """
        return self._nearest(self.z, z, np.arange(len(z)), stratum, sample_id)

    def nearest_embedding(
        self,
        x: Float32Array,
        at: IntArray,
        stratum: IntArray,
        sample_id: IntArray,
        *,
        within: float = np.inf,
        heads: Heads | None = None,
        found: IntArray | None = None,
    ) -> FloatArray:
        """The same between unit embeddings: those in rows `at` (n,) of `x` (rows, columns).

        The metric space says what teaches alike; only the embeddings tell copies apart from what
        is merely of the same kind. Distances beyond `within` may be given as inf, which is quicker
        with the heads of `x`. `found` (n,) is given the nearest samples, -1 where there is none.
        """
        return self._nearest(
            self.x, x, at, stratum, sample_id, self._first, within, heads, self._heads, found
        )

    def nearest_of_all(self, unit: Float32Array, sample_id: IntArray) -> FloatArray:
        """(n,) distance of (n, dim) unit embeddings to the nearest other one, whatever its stratum;
        inf where no other sample was trained on."""
        used = self.sample_id != EMPTY
        cosine = unit @ self.x[used][:, self._first :].T
        cosine = np.where(sample_id[:, None] == self.sample_id[used], -np.inf, cosine)
        best = cosine.max(axis=1, initial=-np.inf).astype(np.float64)
        distance: FloatArray = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * best))
        return distance

    def _nearest(
        self,
        known: Float32Array,
        vectors: Float32Array,
        at: IntArray,
        stratum: IntArray,
        sample_id: IntArray,
        first: int = 0,
        within: float = np.inf,
        heads: Heads | None = None,
        known_heads: Heads | None = None,
        found: IntArray | None = None,
    ) -> FloatArray:
        per = self._per_stratum
        return nearest_of_group(
            vectors,
            at,
            sample_id,
            stratum,
            known.reshape(-1, known.shape[2]),  # (strata * per_stratum, columns)
            self.sample_id.reshape(-1),
            np.arange(0, len(self.sample_id) * per + 1, per),
            first=first,
            within=within,
            heads=heads,
            known_heads=known_heads,
            found=found,
        )

    def state_dict(self) -> State:
        """Sample ids and cursors."""
        return {"sample_id": self.sample_id.copy(), "cursor": self.cursor.copy()}

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved ids."""
        self.sample_id = state.wholes(
            "sample_id", *self.sample_id.shape, least=EMPTY, below=lookup.num_samples
        )
        self.cursor = state.wholes("cursor", len(self.cursor), below=self._per_stratum)
        used = self.sample_id != EMPTY
        self.x[used] = x = lookup.rows_of(self.sample_id[used])
        self._heads.put(np.flatnonzero(used), heads_of(x[:, self._first :]))


class SketchQueue:
    """Gradient sketches of the samples chosen last, the oldest overwritten first.

    Args:
        length: Sketches held at most; may be 0.
        sketch_dim: Length of a sketch.
    """

    def __init__(self, *, length: int, sketch_dim: int) -> None:
        self._length, self._dim = length, sketch_dim
        self.sketch: Float32Array = np.zeros((0, sketch_dim), np.float32)

    def add(self, sketch: Float32Array) -> None:
        """Append (n, sketch_dim) sketches; zero ones, which were not measured, are left out."""
        if self._length:
            held = np.concatenate([self.sketch, sketch[np.any(sketch != 0.0, axis=1)]])
            self.sketch = held[-self._length :]

    def state_dict(self) -> State:
        """The sketches, oldest first, and how many: fewer would look whole."""
        return {"held": len(self.sketch), "sketch": self.sketch}

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved sketches."""
        held = state.whole("held", most=self._length)
        self.sketch = state.numbers32("sketch", held, self._dim)
