"""Two occurrences of a sample never share a batch, and none is left without a batch to go to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slap_stream.selection.repeats import Turns, copy_number, pressing
from tests import reference
from tests.strategies import Array, repeated, seeds


def turns_at(
    step: int, steps: int, *, lane: int = 0, shared: dict[int, tuple[int, int]] | None = None
) -> Turns:
    """Turns of a lane that shares no sample, unless told."""
    return Turns(lane=lane, step=step, steps=steps, shared=shared or {})


@settings(max_examples=100)
@given(candidates=repeated())
def test_copy_numbers_equal_their_twin(candidates: tuple[Array, Array]) -> None:
    sample_id, occurrence = candidates
    expected = reference.copy_number(sample_id.tolist(), occurrence.tolist())
    assert copy_number(sample_id, occurrence).tolist() == expected


@settings(max_examples=60)
@given(first=st.integers(0, 3), lanes=st.integers(1, 4), steps=st.integers(1, 20))
def test_lanes_that_share_a_sample_take_turns(first: int, lanes: int, steps: int) -> None:
    name, other = np.array([7]), np.array([8])
    for step in range(steps):
        may = []
        for lane in range(first, first + lanes):
            turns = turns_at(step, steps, lane=lane, shared={7: (first, lanes)})
            may.append(bool(turns.now(name)[0]))
            # What is left is what will be allowed.
            allowed = [
                turns_at(later, steps, lane=lane, shared={7: (first, lanes)}).now(name)[0]
                for later in range(step, steps)
            ]
            assert turns.left(name)[0] == sum(allowed)
            assert turns.now(other)[0]
            assert turns.left(other)[0] == steps - step
        assert sum(may) == 1


@settings(max_examples=150)
@given(
    copies=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    steps=st.integers(1, 8),
    seed=seeds,
)
def test_batches_stay_full_whoever_chooses_among_the_others(
    copies: list[int], batch_size: int, steps: int, seed: int
) -> None:
    """If full batches without repeats exist at all, then taking what is pressing finds them."""
    assume(sum(min(own, steps) for own in copies) >= steps * batch_size)
    rng = np.random.default_rng(seed)
    sample_id = np.repeat(np.arange(len(copies)), copies)
    occurrence = np.concatenate([np.arange(own) for own in copies])
    for step in range(steps):
        number = copy_number(sample_id, occurrence)
        must, needed = pressing(sample_id, number, turns_at(step, steps), batch_size)
        assert 0 <= needed <= min(batch_size, np.count_nonzero(must))
        first = rng.permutation(np.flatnonzero(must))[:needed]
        rest = rng.permutation(np.setdiff1d(np.flatnonzero(number == 0), first))
        batch = np.concatenate([first, rest])[:batch_size]
        assert len(batch) == batch_size
        assert len(np.unique(sample_id[batch])) == batch_size
        sample_id, occurrence = np.delete(sample_id, batch), np.delete(occurrence, batch)


def test_what_presses_grows_as_the_epoch_ends() -> None:
    sample_id = np.array([1, 1, 1, 2, 3, 4, 5, 6])
    number = copy_number(sample_id, np.array([0, 1, 2, 0, 0, 0, 0, 0]))
    needed = [pressing(sample_id, number, turns_at(step, 4), batch_size=2)[1] for step in range(4)]
    # Nothing presses while there are more steps than copies; then sample 1 does.
    assert needed[0] == 0
    assert all(left <= right for left, right in pairwise(needed))
    must, _ = pressing(sample_id, number, turns_at(1, 4), batch_size=2)
    assert sample_id[must].tolist() == [1]
