"""Candidates that turn out to be of no use, when they are read: out of batches and out of pools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slap_stream.selection.awaiting import Match
from slap_stream.selection.departures import WITHDRAWN
from slap_stream.selection.lane import Lane
from slap_stream.types import IntArray


def unusable_samples(lanes: Sequence[Lane]) -> int:
    """Candidates of these lanes that were withdrawn this epoch because they cannot be used."""
    return sum(lane.progress.unusable_trained + lane.progress.unusable_pooled for lane in lanes)


def composed_around(lane: Lane, ids: IntArray) -> list[IntArray]:
    """What else a lane composed lately, the nearest before these samples first, then what came
    after them; only reads.

    Args:
        lane: The lane.
        ids: (n,) samples that it composed lately.

    Returns:
        Sample ids of a batch each.
    """
    asked = lane.feedback.awaiting_trained.all()
    holding = [at for at, each in enumerate(asked) if np.isin(each.sample_id, ids).any()]
    first = holding[0] if holding else len(asked)
    order = [*range(first)[::-1], *range(first + 1, len(asked))]
    others = [np.setdiff1d(asked[at].sample_id, ids) for at in order]
    return [each for each in others if len(each)]


def withdraw_composed(
    lane: Lane, ids: IntArray, again: IntArray | None = None
) -> list[tuple[int, int, int]]:
    """Samples of a composed batch cannot be used: their losses are not awaited any more.

    What was withdrawn already stays so, and is not counted again: an interrupt may have come after.

    Args:
        lane: The lane that composed them.
        ids: (n,) its samples in one batch.
        again: (m,) samples that are trained on once more in their place.

    Returns:
        Of each that was withdrawn now: sample id, epoch, and batches of the epoch composed before
        it was.
    """
    epoch, before = lane.progress.epoch, lane.batches_of_earlier_epochs
    found = []
    for asked in lane.feedback.awaiting_trained.still_open():
        at = np.flatnonzero(asked.open & np.isin(asked.sample_id, ids))
        if len(at):
            Match(0, asked, at, at).close()
            lane.progress.unusable_trained += len(at)
            gone = asked.sample_id[at].tolist()
            found += [(sample_id, epoch, asked.step - before) for sample_id in gone]
            # A later batch may hold another occurrence.
            ids = np.setdiff1d(ids, asked.sample_id[at])
            if again is not None:
                _ask_again(lane, again, asked.step)
                again = None
    return found


def _ask_again(lane: Lane, ids: IntArray, step: int) -> None:
    """Await the losses of samples that were composed before, as if in the batch of this step."""
    awaiting = lane.feedback.awaiting_trained
    known = awaiting.all()
    names = np.concatenate([asked.sample_id for asked in known])
    rows = np.concatenate([asked.x for asked in known])
    sources = np.concatenate([asked.source for asked in known])
    # Of repeated ids any will do: their rows are the same.
    order = np.argsort(names, kind="stable")
    at = order[np.searchsorted(names[order], ids)]
    awaiting.ask(step, ids, rows[at], sources[at])


def lane_probing(lanes: Sequence[Lane], ids: IntArray) -> int:
    """Place of the lane that has asked for these (n,) samples to be probed; 0 if none has."""
    for place, lane in enumerate(lanes):
        last = lane.feedback.awaiting_probed.last()
        if last is not None and np.isin(ids, last[0]).all():
            return place
    return 0


def withdraw_pooled(lane: Lane, ids: IntArray) -> list[tuple[int, int, int]]:
    """Candidates that wait in the pool cannot be used: they leave it.

    Args:
        lane: The lane whose pool it is.
        ids: (n,) sample ids; those of other lanes do not matter.

    Returns:
        As `withdraw_composed`.
    """
    slots = lane.pool.slots()
    gone = slots[np.isin(lane.pool.columns.sample_id[slots], ids)]
    epoch, step = lane.progress.epoch, lane.progress.step
    if lane.departures is not None:
        lane.departures.note(gone, WITHDRAWN, epoch=epoch, step=step)
    left = lane.pool.columns.sample_id[gone].tolist()
    lane.pool.remove(gone)
    lane.progress.unusable_pooled += len(gone)
    return [(sample_id, epoch, step) for sample_id in left]
