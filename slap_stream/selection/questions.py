"""Questions that a rank's lanes ask of the model, and answers, each to the lane that has asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slap_stream.errors import FeedbackError
from slap_stream.selection.awaiting import (
    Asked,
    Awaiting,
    check_feedback,
    check_measurements,
    check_sketches,
    find_questions,
    weights_of,
)
from slap_stream.selection.lane import Lane
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray


def take_trained(lanes: Sequence[Lane], ids: ArrayLike, losses: ArrayLike) -> None:
    """Hand the losses of (n,) samples that were trained on to the lanes that composed them.

    Raises:
        FeedbackError: If shapes differ, or an id was not yielded lately or already observed.
    """
    ids, values = check_feedback(ids, losses)
    awaiting = [lane.feedback.awaiting_trained for lane in lanes]
    for place, mine, x in close_questions(ids, awaiting, "observe: ids of yielded batches"):
        lanes[place].feedback.take_trained(ids[mine], x, values[mine])


def take_probed(
    lanes: Sequence[Lane],
    ids: ArrayLike,
    losses: ArrayLike,
    sketches: ArrayLike | None,
    measurements: Mapping[str, ArrayLike],
    *,
    sketch_dim: int,
    wanted: Sequence[str],
) -> None:
    """Hand what the probe measured of (n,) samples to the lanes that asked for it.

    Raises:
        FeedbackError: If shapes differ, a wanted measurement is missing, or an id was not given by
            `choose_probes`.
    """
    ids, values = check_feedback(ids, losses)
    rows = None if sketches is None else check_sketches(sketches, (len(ids), sketch_dim))
    measured = check_measurements(measurements, len(ids), wanted)
    awaiting = [lane.feedback.awaiting_probed for lane in lanes]
    for place, mine, x in close_questions(ids, awaiting, "update: ids to be probed"):
        lanes[place].feedback.take_probed(
            ids[mine],
            x,
            values[mine],
            None if rows is None else rows[mine],
            {name: column[mine] for name, column in measured.items()},
        )


def loss_weights(lanes: Sequence[Lane], ids: ArrayLike) -> FloatArray:
    """(n,) weights of the losses of (n,) samples that are trained on now.

    Raises:
        FeedbackError: If an id was not yielded lately or was already observed.
    """
    awaiting = [lane.feedback.awaiting_trained for lane in lanes]
    asked = _asked_exactly(np.asarray(ids), awaiting)
    if asked is not None:
        return np.concatenate([question.weight for question in asked])
    return weights_of(ids, awaiting)


def choose_probes(lanes: Sequence[Lane], count: int) -> IntArray:
    """(count,) sample ids to probe, lane by lane, equally many per lane.

    Raises:
        FeedbackError: If `count` is not a multiple of the lanes.
    """
    if count < 0 or count % len(lanes):
        raise FeedbackError(
            f"count must be a multiple of this rank's {len(lanes)} lanes, got {count!r}."
        )
    each = count // len(lanes)
    ids = [lane.probe_candidates(each) for lane in lanes if each]
    return np.concatenate(ids) if ids else np.zeros(0, np.int64)


def close_questions(
    ids: IntArray, awaiting: Sequence[Awaiting], what: str
) -> Iterator[tuple[int, slice | BoolArray, Float32Array]]:
    """Close the questions that (n,) ids answer, the oldest open ones over all lanes.

    Yields:
        Of each lane that has asked: its place, which of the answers are its, and their (m, columns)
        design rows.

    Raises:
        FeedbackError: If an id was not asked for lately, or was answered already.
    """
    if _asked_exactly(ids, awaiting) is not None:
        start = 0
        for place, lane in enumerate(awaiting):
            question = lane.close_oldest()
            mine = slice(start, start + len(question.sample_id))
            yield place, mine, question.x
            start = mine.stop
        return
    owner, question_of, position = find_questions(ids, awaiting, what)
    for place in np.unique(owner):
        theirs = owner == place
        x = awaiting[place].answer(question_of[theirs], position[theirs])
        yield int(place), theirs, x


def _asked_exactly(ids: NDArray[Any], awaiting: Sequence[Awaiting]) -> list[Asked] | None:
    """The oldest question of each lane, if (n,) ids are just those that they ask for, in order.

    As a rule they are, a batch being fed back as it was given out, and need no search.
    """
    asked: list[Asked] = []
    for lane in awaiting:
        question = lane.oldest()
        # Of questions of different steps the older one would have to be answered first.
        if (
            question is None
            or not question.open.all()
            or (asked and question.step != asked[0].step)
        ):
            return None
        asked.append(question)
    wanted = np.concatenate([question.sample_id for question in asked])
    return asked if np.array_equal(ids, wanted) else None
