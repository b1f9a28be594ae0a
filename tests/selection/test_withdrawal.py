"""What is left to a lane whose candidates turn out to be of no use."""

from __future__ import annotations

from itertools import islice

import numpy as np

from slap_stream import SlapSampler
from slap_stream.selection.withdrawal import withdraw_composed
from tests.laws import config_of


def test_a_batch_is_repeated_whole_though_less_stood_in_for_the_last() -> None:
    sampler = SlapSampler(
        np.array([40] * 2),
        np.random.default_rng(0).normal(size=(80, 8)).astype(np.float16),
        batch_size=8,
        config=config_of(keep=1.0, probe_every=7, num_lanes=2),
    )
    first, second = islice(iter(sampler), 2)
    lane = sampler.lanes[1]
    # Nothing of its second batch can be used, and then nothing is left.
    withdraw_composed(lane, np.array(second[4:]), again=np.array(first[4:7]))
    lane.pool.clear()
    lane.intake.position = lane.num_candidates
    third = sampler.compose()
    assert third is not None
    assert third[4:].tolist() == first[4:]
