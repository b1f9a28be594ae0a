"""Open questions: samples whose losses were asked for and have not come back yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from slap_stream.core.saved import Saved
from slap_stream.errors import FeedbackError
from slap_stream.selection.state import Lookup
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray, State


@dataclass(kw_only=True, slots=True)
class Asked:
    """Samples whose losses are awaited, in the order asked.

    Attributes:
        step: Batches composed in the run before; orders the questions.
        sample_id: (n,) sample ids.
        x: (n, columns) design rows.
        open: (n,) whether the loss is still awaited.
        weight: (n,) weight of each loss in the batch's.
    """

    step: int
    sample_id: IntArray
    x: Float32Array
    open: BoolArray
    weight: FloatArray


class Awaiting:
    """The last questions that were asked; older ones are forgotten.

    Args:
        depth: Questions remembered.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._asked: deque[Asked] = deque(maxlen=depth)
        # Questions at the left of which nothing is open any more; as a rule all but a few.
        self._closed = 0

    def ask(
        self,
        step: int,
        sample_id: IntArray,
        x: Float32Array,
        weight: FloatArray | None = None,
    ) -> None:
        """Remember that losses of (n,) samples with (n, columns) rows are awaited.

        Args:
            step: Batches composed in the run before.
            sample_id: (n,) sample ids.
            x: (n, columns) design rows.
            weight: (n,) weights of the losses; None: ones.
        """
        count = len(sample_id)
        if len(self._asked) == self.depth:
            self._closed = max(0, self._closed - 1)
        self._asked.append(
            Asked(
                step=step,
                sample_id=sample_id,
                x=x,
                open=np.ones(count, bool),
                weight=np.ones(count) if weight is None else weight,
            )
        )
        self._skip_closed()

    def last(self) -> tuple[IntArray, Float32Array] | None:
        """(n,) ids and (n, columns) rows asked for last; None before the first question."""
        return (self._asked[-1].sample_id, self._asked[-1].x) if self._asked else None

    def latest(self, count: int) -> list[Asked]:
        """The `count` questions that were asked last, in the order asked."""
        return list(self._asked)[len(self._asked) - count :]

    def oldest(self) -> Asked | None:
        """The first question of which something is open."""
        return self._asked[self._closed] if self._closed < len(self._asked) else None

    def close_oldest(self) -> Asked:
        """The first question of which something is open; all of it is answered now."""
        asked = self._asked[self._closed]
        asked.open[:] = False
        self._skip_closed()
        return asked

    def _skip_closed(self) -> None:
        while self._closed < len(self._asked) and not self._asked[self._closed].open.any():
            self._closed += 1

    def entries(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Every open question: ids, steps, index of the question, position in it; each (n,)."""
        ids, steps, questions, positions = [], [], [], []
        for index in range(self._closed, len(self._asked)):
            asked = self._asked[index]
            at = np.flatnonzero(asked.open)
            ids.append(asked.sample_id[at])
            steps.append(np.full(len(at), asked.step, np.int64))
            questions.append(np.full(len(at), index, np.int64))
            positions.append(at)
        if not ids:
            none = np.zeros(0, np.int64)
            return none, none, none, none
        return (
            np.concatenate(ids),
            np.concatenate(steps),
            np.concatenate(questions),
            np.concatenate(positions),
        )

    def answer(self, question: IntArray, position: IntArray) -> Float32Array:
        """Close (n,) questions.

        Returns:
            (n, columns) design rows of the samples, in the order given.
        """
        rows = np.zeros((len(question), self._asked[0].x.shape[1]), np.float32)
        for q in np.unique(question):
            mine = question == q
            rows[mine] = self._asked[q].x[position[mine]]
            self._asked[q].open[position[mine]] = False
        self._skip_closed()
        return rows

    def weights(self, question: IntArray, position: IntArray) -> FloatArray:
        """(n,) weights of the losses that (n,) open questions ask for."""
        weights = np.zeros(len(question))
        for q in np.unique(question):
            mine = question == q
            weights[mine] = self._asked[q].weight[position[mine]]
        return weights

    def state_dict(self) -> State:
        """Ids, steps, what is open, and weights, flattened."""
        sizes = [len(asked.sample_id) for asked in self._asked]
        joined = [asked.sample_id for asked in self._asked]
        open_ = [asked.open for asked in self._asked]
        weights = [asked.weight for asked in self._asked]
        return {
            "sizes": np.asarray(sizes, np.int64),
            "steps": np.asarray([asked.step for asked in self._asked], np.int64),
            "sample_id": np.concatenate(joined) if joined else np.zeros(0, np.int64),
            "open": np.concatenate(open_) if open_ else np.zeros(0, bool),
            "weight": np.concatenate(weights) if weights else np.zeros(0),
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved questions."""
        sizes = state.wholes("sizes", None)
        steps = state.wholes("steps", len(sizes))
        ids = state.wholes("sample_id", int(sizes.sum()), below=lookup.num_samples)
        open_, weight = state.flags("open", len(ids)), state.numbers("weight", len(ids), least=0.0)
        x, cuts = lookup.rows_of(ids), np.cumsum(sizes)[:-1]
        columns = (np.split(column, cuts) for column in (ids, x, open_, weight))
        # All of them, if they were remembered for longer: with a longer lookahead, of which batches
        # are still to be delivered.
        self.depth = max(self.depth, len(sizes))
        self._asked = deque(maxlen=self.depth)
        if len(sizes):
            for step, *parts in zip(steps.tolist(), *columns, strict=True):
                sample_id, rows, is_open, weights = parts
                self._asked.append(
                    Asked(step=step, sample_id=sample_id, x=rows, open=is_open, weight=weights)
                )
        self._closed = 0
        self._skip_closed()


def match_oldest(wanted: IntArray, ids: IntArray, steps: IntArray) -> tuple[IntArray, BoolArray]:
    """Find the oldest open question for each answer; repeated ids take one question each.

    Args:
        wanted: (n,) sample ids of the answers.
        ids: (m,) sample ids of the open questions.
        steps: (m,) when they were asked.

    Returns:
        (n,) indices of questions, and (n,) whether there was one; without one the index is 0.
    """
    order = np.lexsort((steps, ids))
    ordered = ids[order]
    by_id = np.argsort(wanted, kind="stable")
    asked = wanted[by_id]
    repeat = np.arange(len(asked)) - np.searchsorted(asked, asked, side="left")
    place = np.searchsorted(ordered, asked, side="left") + repeat
    inside = np.minimum(place, max(0, len(ordered) - 1))
    found = np.zeros(len(asked), bool)
    index = np.zeros(len(asked), np.int64)
    if len(ordered):
        found = (place < len(ordered)) & (ordered[inside] == asked)
        index = np.where(found, order[inside], 0)
    matches, known = np.empty_like(index), np.empty_like(found)
    matches[by_id], known[by_id] = index, found
    return matches, known


def find_questions(
    ids: IntArray, awaiting: Sequence[Awaiting], what: str
) -> tuple[IntArray, IntArray, IntArray]:
    """Find whose question each id answers: the oldest open one over all lanes.

    Args:
        ids: (n,) sample ids of the answers.
        awaiting: Open questions of each lane.
        what: Verb and what its ids must be, for the message.

    Returns:
        (n,) index of the lane, of its question, and position in that.

    Raises:
        FeedbackError: If an id was not asked for lately, or was answered already.
    """
    entries = [lane.entries() for lane in awaiting]
    owner = np.repeat(np.arange(len(entries)), [len(entry[0]) for entry in entries])
    names, steps, questions, positions = (
        np.concatenate([entry[part] for entry in entries]) for part in range(4)
    )
    index, known = match_oldest(ids, names, steps)
    if not known.all():
        wrong = ids[~known]
        raise FeedbackError(
            f"{what} must not be answered yet, got {len(wrong)} that were, or that were never "
            f"given out or too long ago, first {wrong[:5].tolist()}; the last "
            f"{awaiting[0].depth} batches are remembered."
        )
    return owner[index], questions[index], positions[index]


def check_feedback(ids: ArrayLike, losses: ArrayLike) -> tuple[IntArray, FloatArray]:
    """(n,) ids and (n,) losses as arrays.

    Raises:
        FeedbackError: If they are not (n,) whole numbers and (n,) losses.
    """
    names, values = np.asarray(ids), np.asarray(losses, np.float64)
    if not names.size:
        names = names.astype(np.int64)
    if names.ndim != 1 or names.shape != values.shape or names.dtype.kind not in "iu":
        raise FeedbackError(
            f"ids and losses must be (n,) whole numbers and (n,) losses, got {names.dtype} "
            f"{names.shape} and {values.shape}."
        )
    return names.astype(np.int64), values


def check_sketches(sketches: ArrayLike, shape: tuple[int, ...]) -> Float32Array:
    """Gradient sketches, of one sample or of n, as a float32 array of its own.

    Raises:
        FeedbackError: If their shape is not this.
    """
    rows = np.array(sketches, np.float32)
    if rows.shape != shape:
        wanted = "(n, sketch_dim)" if len(shape) == 2 else "(sketch_dim,)"
        raise FeedbackError(f"sketches must be {wanted} = {shape}, got {rows.shape}.")
    return rows


def check_measurements(
    measurements: Mapping[str, ArrayLike], count: int, wanted: Sequence[str]
) -> dict[str, FloatArray]:
    """The (count,) numbers of these names that a policy wants; others are left out.

    Raises:
        FeedbackError: If one is missing or has another shape.
    """
    columns = {}
    for name in wanted:
        if name not in measurements:
            raise FeedbackError(
                f"measurements must hold {', '.join(wanted)}, got "
                f"{', '.join(measurements) or 'none'}; the policy chooses by them."
            )
        columns[name] = np.array(measurements[name], np.float64)
        if columns[name].shape != (count,):
            raise FeedbackError(
                f"measurement {name} must be ({count},) numbers, one a sample, got "
                f"{columns[name].shape}."
            )
    return columns


def weights_of(ids: ArrayLike, awaiting: Sequence[Awaiting]) -> FloatArray:
    """(n,) weights of the losses that are awaited of (n,) ids, over all lanes.

    Raises:
        FeedbackError: If an id was not asked for lately, or was answered already.
    """
    names = np.asarray(ids)
    names, weights = check_feedback(names, np.ones(names.shape))
    owner, question, position = find_questions(
        names, awaiting, "loss_weights: ids of yielded batches"
    )
    for index in np.unique(owner):
        mine = owner == index
        weights[mine] = awaiting[index].weights(question[mine], position[mine])
    return weights
