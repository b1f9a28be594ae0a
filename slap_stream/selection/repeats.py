"""Samples that an epoch offers more than once: two occurrences never share a batch.

A sample whose occurrences fell to several lanes takes turns between these, so that lanes need not
talk to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slap_stream.types import BoolArray, IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """Which batches a lane's samples may still enter.

    Attributes:
        lane: The lane.
        step: The next batch of the epoch.
        steps: Batches of the epoch.
        shared: Samples that lanes share, as {sample id: (first lane, how many lanes)}.
    """

    lane: int
    step: int
    steps: int
    shared: dict[int, tuple[int, int]]

    def left(self, sample_id: IntArray) -> IntArray:
        """(n,) batches, the next one included, that each sample may still enter."""
        left = np.full(len(sample_id), self.steps - self.step)
        for name, (first, lanes) in self.shared.items():
            mine = first + np.arange(self.step, self.steps) % lanes == self.lane
            left[sample_id == name] = np.count_nonzero(mine)
        return left

    def now(self, sample_id: IntArray) -> BoolArray:
        """(n,) whether each sample may enter the next batch."""
        now = np.ones(len(sample_id), bool)
        for name, (first, lanes) in self.shared.items():
            now[sample_id == name] = first + self.step % lanes == self.lane
        return now


def copy_number(sample_id: IntArray, occurrence: IntArray) -> IntArray:
    """(n,) how many earlier occurrences of the same sample are among these candidates."""
    order: IntArray = np.lexsort((occurrence, sample_id))
    ordered = sample_id[order]
    number = np.empty_like(order)
    number[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    return number


def pressing(
    sample_id: IntArray, number: IntArray, turns: Turns, batch_size: int
) -> tuple[BoolArray, int]:
    """Candidates of which some must enter the next batch for all later ones to be full.

    A sample with at least as many copies as batches left to it loses one for good with each batch
    that it is not in. The stock that may be lost so is what it can fill beyond what is wanted.

    Args:
        sample_id: (n,) every candidate at hand; none will follow.
        number: (n,) their copy numbers.
        turns: What is left of the epoch.
        batch_size: Samples in a batch.

    Returns:
        (n,) the pressing candidates, and how many of them must enter the next batch.
    """
    names, copies = np.unique(sample_id, return_counts=True)
    left = turns.left(names)
    slack = int(np.minimum(copies, left).sum()) - (turns.steps - turns.step) * batch_size
    tight = turns.now(names) & (copies >= left)
    candidates = tight[np.searchsorted(names, sample_id)] & (number == 0)
    return candidates, max(0, int(np.count_nonzero(tight)) - slack)
