"""Which of the losses that come back are learnt from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from slap_stream import Advanced, SlapConfig, SlapSampler
from slap_stream.selection.feedback import TRAINED_PER_REFRESH
from tests.strategies import Array

BATCHES, PROBE_EVERY = 6, 16


def learnt_from(batch_size: int, cut: Callable[[Array], list[Array]], *, lanes: int = 1) -> Array:
    """(lanes,) losses that the sums of each lane hold, after batches fed back in pieces."""
    ids = np.arange(4000)
    sampler = SlapSampler(
        [1000] * 4,
        np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32),
        batch_size=batch_size,
        config=SlapConfig(
            num_lanes=lanes, probe_every=PROBE_EVERY, advanced=Advanced(pool_batches=2)
        ),
    )
    losses = 1.0 + ids % 7
    for _ in range(BATCHES):
        batch = sampler.compose()
        assert batch is not None
        for piece in cut(batch):
            sampler.observe(piece, losses[piece])
    return np.array([float(lane["count"]) for lane in sampler.statistics()])


def whole(batch: Array) -> list[Array]:
    """In one piece."""
    return [batch]


@pytest.mark.parametrize("lanes", [1, 4])
def test_of_many_losses_a_share_is_learnt_from_however_they_come_back(lanes: int) -> None:
    size = 256
    found = learnt_from(size, whole, lanes=lanes)
    share = TRAINED_PER_REFRESH / (size * PROBE_EVERY)
    expected = BATCHES * size * share
    # Five standard deviations of a binomial count.
    assert abs(found.sum() - expected) < 5 * np.sqrt(expected * (1 - share))
    assert np.all(found > 0)
    backwards = learnt_from(size, lambda batch: np.array_split(batch[::-1], 5), lanes=lanes)
    np.testing.assert_array_equal(backwards, found)


def test_all_losses_are_learnt_from_where_they_are_few() -> None:
    size = TRAINED_PER_REFRESH // PROBE_EVERY
    assert learnt_from(size, whole).tolist() == [BATCHES * size]
