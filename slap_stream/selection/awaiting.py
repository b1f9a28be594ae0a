"""Open questions: samples whose losses were asked for and have not come back yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
        source: (n,) sources.
        open: (n,) whether the loss is still awaited.
        weight: (n,) weight of each loss in the batch's.
        answered: Whether nothing is open any more.
    """

    step: int
    sample_id: IntArray
    x: Float32Array
    source: IntArray
    open: BoolArray
    weight: FloatArray
    answered: bool = field(init=False)

    def __post_init__(self) -> None:
        self.answered = not self.open.any()


class Match(NamedTuple):
    """Answers to one question.

    Attributes:
        lane: Place of the lane that has asked.
        asked: The question.
        of: Which of the answers they are.
        at: Which of the question's samples.
    """

    lane: int
    asked: Asked
    of: IntArray | slice
    at: IntArray | slice

    def close(self) -> tuple[IntArray, Float32Array, IntArray]:
        """Have them answered; their (m,) sample ids, (m, columns) design rows and (m,) sources."""
        asked, at = self.asked, self.at
        asked.open[at] = False
        asked.answered = not asked.open.any()
        return asked.sample_id[at], asked.x[at], asked.source[at]


class Awaiting:
    """The last questions that were asked; older ones are forgotten.

    Args:
        depth: Questions remembered.
    """

    def __init__(self, depth: int) -> None:
        self.depth = self._usual_depth = depth
        self._asked: deque[Asked] = deque(maxlen=depth)

    def ask(
        self,
        step: int,
        sample_id: IntArray,
        x: Float32Array,
        source: IntArray,
        weight: FloatArray | None = None,
    ) -> None:
        """Remember that losses of (n,) samples with (n, columns) rows are awaited.

        Args:
            step: Batches composed in the run before.
            sample_id: (n,) sample ids.
            x: (n, columns) design rows.
            source: (n,) sources.
            weight: (n,) weights of the losses; None: ones.
        """
        count = len(sample_id)
        self._asked.append(
            Asked(
                step=step,
                sample_id=sample_id,
                x=x,
                source=source,
                open=np.ones(count, bool),
                weight=np.ones(count) if weight is None else weight,
            )
        )

    def last(self) -> tuple[IntArray, Float32Array, IntArray] | None:
        """(n,) ids, (n, columns) rows and (n,) sources asked for last; None before the first."""
        if not self._asked:
            return None
        asked = self._asked[-1]
        return asked.sample_id, asked.x, asked.source

    def last_whole(self, count: int) -> tuple[IntArray, Float32Array, IntArray] | None:
        """(count,) ids, (count, columns) rows and (count,) sources of the last whole batch.

        A batch of which nothing could be used has a second question of its step, about what took
        its place, and is not taken. If there is no other, ids of what was asked for last repeat.
        """
        stood_in = {asked.step for asked in self._asked if len(asked.sample_id) != count}
        for asked in reversed(self._asked):
            if len(asked.sample_id) == count and asked.step not in stood_in:
                return asked.sample_id, asked.x, asked.source
        if not self._asked:
            return None
        asked = self._asked[-1]
        at = np.resize(np.arange(len(asked.sample_id)), count)
        return asked.sample_id[at], asked.x[at], asked.source[at]

    def latest(self, count: int) -> list[Asked]:
        """The `count` questions that were asked last, in the order asked."""
        return list(self._asked)[len(self._asked) - count :]

    def all(self) -> list[Asked]:
        """All that are remembered, oldest first."""
        return list(self._asked)

    def still_open(self) -> list[Asked]:
        """Questions of which something is open, oldest first; as a rule a few."""
        return [asked for asked in self._asked if not asked.answered]

    def state_dict(self) -> State:
        """Ids, sources, steps, what is open, and weights, flattened."""
        sizes = [len(asked.sample_id) for asked in self._asked]
        joined = [asked.sample_id for asked in self._asked]
        sources = [asked.source for asked in self._asked]
        open_ = [asked.open for asked in self._asked]
        weights = [asked.weight for asked in self._asked]
        return {
            "sizes": np.asarray(sizes, np.int64),
            "steps": np.asarray([asked.step for asked in self._asked], np.int64),
            "sample_id": np.concatenate(joined) if joined else np.zeros(0, np.int64),
            "source": np.concatenate(sources) if sources else np.zeros(0, np.int64),
            "open": np.concatenate(open_) if open_ else np.zeros(0, bool),
            "weight": np.concatenate(weights) if weights else np.zeros(0),
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Take over saved questions."""
        sizes = state.wholes("sizes", None)
        steps = state.wholes("steps", len(sizes))
        ids = state.wholes("sample_id", int(sizes.sum()), below=lookup.num_samples)
        source = state.wholes("source", len(ids), below=lookup.num_strata)
        open_, weight = state.flags("open", len(ids)), state.numbers("weight", len(ids), least=0.0)
        x, cuts = lookup.rows_of(ids), np.cumsum(sizes)[:-1]
        columns = (np.split(column, cuts) for column in (ids, x, source, open_, weight))
        # All of them, if they were remembered for longer: with a longer lookahead, of which batches
        # are still to be delivered.
        self.depth = max(self._usual_depth, len(sizes))
        self._asked = deque(maxlen=self.depth)
        if len(sizes):
            for step, *parts in zip(steps.tolist(), *columns, strict=True):
                names, rows, sources, is_open, weights = parts
                self._asked.append(
                    Asked(
                        step=step,
                        sample_id=names,
                        x=rows,
                        source=sources,
                        open=is_open,
                        weight=weights,
                    )
                )


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
    known = np.zeros(len(wanted), bool)
    matches = np.zeros(len(wanted), np.int64)
    inside = np.flatnonzero(place < len(ordered))
    found = inside[ordered[place[inside]] == asked[inside]]
    known[by_id[found]] = True
    matches[by_id[found]] = order[place[found]]
    return matches, known


def find_questions(ids: IntArray, awaiting: Sequence[Awaiting], what: str) -> list[Match]:
    """Find whose questions (n,) ids answer: the oldest open ones over all lanes.

    Args:
        ids: (n,) sample ids of the answers.
        awaiting: Open questions of each lane.
        what: Verb and what its ids must be, for the message.

    Returns:
        Matches by lane and question; nothing is closed yet.

    Raises:
        FeedbackError: If an id was not asked for lately, or was answered already.
    """
    in_turn = _asked_exactly(ids, awaiting)
    if in_turn is not None:
        return in_turn
    asked = [(lane, each) for lane, one in enumerate(awaiting) for each in one.still_open()]
    at = [np.flatnonzero(each.open) for _, each in asked]
    question = np.repeat(np.arange(len(at)), np.array([len(part) for part in at], np.int64))
    steps = np.array([each.step for _, each in asked], np.int64)[question]
    none = np.zeros(0, np.int64)
    position = np.concatenate([none, *at])
    names = np.concatenate(
        [none, *(each.sample_id[part] for (_, each), part in zip(asked, at, strict=True))]
    )
    index, known = match_oldest(ids, names, steps)
    if not known.all():
        wrong = ids[~known]
        raise FeedbackError(
            f"{what} must be of late and not answered yet, got {len(wrong)} others, first "
            f"{wrong[:5].tolist()}; the last {awaiting[0].depth} are remembered."
        )
    matches = []
    for q in np.unique(question[index]).tolist():
        lane, each = asked[q]
        mine = np.flatnonzero(question[index] == q)
        matches.append(Match(lane, each, mine, position[index[mine]]))
    return matches


def _asked_exactly(ids: IntArray, awaiting: Sequence[Awaiting]) -> list[Match] | None:
    """Matches with the oldest question of each lane, if (n,) ids are just those that they ask for,
    in order.

    As a rule they are, a batch being fed back as it was given out, and need no search.
    """
    matches: list[Match] = []
    start = 0
    for lane, one in enumerate(awaiting):
        asked = next(iter(one.still_open()), None)
        # Of questions of different steps the older one would have to be answered first.
        if (
            asked is None
            or not asked.open.all()
            or (matches and asked.step != matches[0].asked.step)
        ):
            return None
        stop = start + len(asked.sample_id)
        matches.append(Match(lane, asked, slice(start, stop), slice(None)))
        start = stop
    wanted = np.concatenate([match.asked.sample_id for match in matches])
    return matches if np.array_equal(ids, wanted) else None


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
