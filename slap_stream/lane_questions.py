"""Questions that a rank's lanes ask of the model, and answers, each to the lane that has asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from slap_stream.errors import FeedbackError
from slap_stream.feedback import check_feedback, check_sketches, find_questions, weights_of
from slap_stream.lane import Lane
from slap_stream.types import FloatArray, IntArray


def take_trained(lanes: Sequence[Lane], ids: ArrayLike, losses: ArrayLike) -> None:
    """Hand the losses of (n,) samples that were trained on to the lanes that composed them.

    Raises:
        FeedbackError: If shapes differ, or an id was not yielded lately or already observed.
    """
    ids, values = check_feedback(ids, losses)
    awaiting = [lane.feedback.awaiting_trained for lane in lanes]
    owner, question, position = find_questions(ids, awaiting, "observe: ids of yielded batches")
    for index in np.unique(owner):
        lane, mine = lanes[index], owner == index
        x = lane.feedback.awaiting_trained.answer(question[mine], position[mine])
        lane.feedback.take_trained(ids[mine], x, values[mine])


def take_probed(
    lanes: Sequence[Lane],
    ids: ArrayLike,
    losses: ArrayLike,
    sketches: ArrayLike | None,
    nuclear_norms: ArrayLike | None,
    *,
    sketch_dim: int,
) -> None:
    """Hand what the probe measured of (n,) samples to the lanes that asked for it.

    Raises:
        FeedbackError: If shapes differ or an id was not given by `choose_probes`.
    """
    ids, values = check_feedback(ids, losses)
    rows = None if sketches is None else check_sketches(sketches, (len(ids), sketch_dim))
    norms = None if nuclear_norms is None else check_feedback(ids, nuclear_norms)[1]
    awaiting = [lane.feedback.awaiting_probed for lane in lanes]
    owner, question, position = find_questions(ids, awaiting, "update: ids to be probed")
    for index in np.unique(owner):
        lane, mine = lanes[index], owner == index
        x = lane.feedback.awaiting_probed.answer(question[mine], position[mine])
        parts = (None if part is None else part[mine] for part in (rows, norms))
        lane.feedback.take_probed(ids[mine], x, values[mine], *parts)


def loss_weights(lanes: Sequence[Lane], ids: ArrayLike) -> FloatArray:
    """(n,) weights of the losses of (n,) samples that are trained on now.

    Raises:
        FeedbackError: If an id was not yielded lately or was already observed.
    """
    return weights_of(ids, [lane.feedback.awaiting_trained for lane in lanes])


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
