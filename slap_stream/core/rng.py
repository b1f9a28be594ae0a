"""Counter-based random draws: a function of (seed, purpose, counters), never of history.

So a draw does not depend on lanes, ranks, workers or on what was drawn before, and nothing random
has to be saved in a checkpoint.

Reference: the mixing function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from slap_stream.types import FloatArray, IntArray


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a stream of numbers."""

    SHARDS_OF_RUN = 1
    VISITS_OF_EPOCH = 2
    SAMPLES_OF_SHARD = 3
    BLOCK = 4
    GUMBEL = 5
    CENTROIDS = 6
    PROBE = 7
    POLICY = 8
    BASELINE = 9
    SKETCH = 10
    CORPUS_PARTS = 11
    CORPUS_PLACES = 12
    SUBSET = 13
    METRIC = 14
    LOSSES = 15
    WORKERS = 16


def generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose, counters)."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence((seed, int(purpose), *counters)))
    )


def uniforms(
    seed: int, purpose: Purpose, epoch: int, first: IntArray, second: IntArray
) -> FloatArray:
    """One uniform number for each pair of counters.

    Args:
        seed: Seed of the run.
        purpose: What the draws are for.
        epoch: Epoch, a third counter.
        first: (n,) counters, such as sample ids.
        second: (n,) counters, such as occurrences.

    Returns:
        (n,) in the open interval (0, 1).
    """
    start = np.random.SeedSequence((seed, int(purpose), epoch)).generate_state(1, np.uint64)
    state = _mix(start ^ _mix(first.astype(np.uint64)))
    state = _mix(state ^ _mix(second.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    # 52 bits and a half: never exactly 0 or 1, so that logarithms of it are finite.
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbels(seed: int, epoch: int, sample_id: IntArray, occurrence: IntArray) -> FloatArray:
    """(n,) standard Gumbel noise of each candidate in an epoch."""
    noise: FloatArray = -np.log(
        -np.log(uniforms(seed, Purpose.GUMBEL, epoch, sample_id, occurrence))
    )
    return noise


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Wrap-around is the point; arrays do not warn about it, scalars would.
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
