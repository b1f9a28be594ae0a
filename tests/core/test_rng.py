"""Draws are functions of their counters, and behave like the distributions they are named for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slap_stream.core.rng import Purpose, generator, gumbels, uniforms
from tests import reference

# Statistical tests fix their seeds; each would raise a false alarm for one seed in 10,000.
FALSE_ALARM = 1e-4

counters = st.integers(0, 2**62)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    purpose=st.sampled_from(Purpose),
    epoch=st.integers(0, 10**6),
    pairs=st.lists(st.tuples(counters, counters), max_size=5),
)
def test_uniforms_equal_their_twin(
    seed: int, purpose: Purpose, epoch: int, pairs: list[tuple[int, int]]
) -> None:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    drawn = uniforms(seed, purpose, epoch, table[:, 0], table[:, 1])
    start = int(np.random.SeedSequence((seed, int(purpose), epoch)).generate_state(1, np.uint64)[0])
    for (first, second), value in zip(pairs, drawn.tolist(), strict=True):
        state = reference.splitmix64(start ^ reference.splitmix64(first))
        shifted = (second + 0x632BE59BD9B4E019) % 2**64
        state = reference.splitmix64(state ^ reference.splitmix64(shifted))
        assert value == ((state >> 12) + 0.5) / 2**52
        assert 0.0 < value < 1.0


def test_a_draw_does_not_depend_on_what_is_drawn_with_it() -> None:
    ids, copies = np.arange(1000), np.arange(1000) % 3
    whole = gumbels(7, 2, ids, copies)
    some = np.array([900, 5, 17])
    np.testing.assert_array_equal(gumbels(7, 2, ids[some], copies[some]), whole[some])


def test_every_counter_matters() -> None:
    ids, none = np.arange(500), np.zeros(500, np.int64)
    base = uniforms(0, Purpose.PROBE, 0, ids, none)
    others = [
        uniforms(1, Purpose.PROBE, 0, ids, none),
        uniforms(0, Purpose.GUMBEL, 0, ids, none),
        uniforms(0, Purpose.PROBE, 1, ids, none),
        uniforms(0, Purpose.PROBE, 0, ids + 1, none),
        uniforms(0, Purpose.PROBE, 0, ids, none + 1),
        uniforms(0, Purpose.PROBE, 0, none, ids + 1),
    ]
    for other in others:
        assert not np.any(base == other)
        assert abs(np.corrcoef(base, other)[0, 1]) < stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(500)


@pytest.mark.parametrize("copies", [0, 1])
def test_uniforms_are_uniform_and_gumbels_gumbel(copies: int) -> None:
    ids = np.arange(20_000)
    second = np.full(len(ids), copies)
    drawn = uniforms(3, Purpose.PROBE, 1, ids, second)
    assert stats.kstest(drawn, "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(gumbels(3, 1, ids, second), "gumbel_r").pvalue > FALSE_ALARM


def test_generators_repeat_and_differ_by_purpose_and_counter() -> None:
    first = generator(5, Purpose.BLOCK, 1, 2).random(8)
    np.testing.assert_array_equal(first, generator(5, Purpose.BLOCK, 1, 2).random(8))
    for other in (
        generator(6, Purpose.BLOCK, 1, 2),
        generator(5, Purpose.POLICY, 1, 2),
        generator(5, Purpose.BLOCK, 2, 1),
        generator(5, Purpose.BLOCK, 1, 3),
    ):
        assert not np.any(first == other.random(8))
