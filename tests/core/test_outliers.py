"""Centres and scales by group; how sure it is that a value is more than scatter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.core.outliers import EDGES, LEAST_SCALE, Mirror, Spread
from tests import reference
from tests.strategies import seeds


def normal(count: int, seed: int = 0) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).normal(size=count)


@given(seed=seeds, shift=st.floats(-2, 2), factor=st.floats(0.1, 10))
def test_each_group_is_centred_and_scaled_by_itself(seed: int, shift: float, factor: float) -> None:
    rng = np.random.default_rng(seed)
    row, column = rng.integers(0, 3, 6_000), rng.integers(0, 2, 6_000)
    centre, scale = shift * np.ones((3, 2)), factor * (1.0 + np.arange(6).reshape(3, 2))
    centre[0] *= -1.0
    values = centre[row, column] + scale[row, column] * rng.normal(size=len(row))
    # Means over many, as columns are numbered.
    many = column + 8
    spread = Spread.of(values, row, many, shape=(3, 10))
    height = spread.standardised(values, row, many)
    for r in range(3):
        for c in range(2):
            mine = height[(row == r) & (column == c)]
            assert abs(np.median(mine)) < 0.25
            assert 0.75 < mine.std() < 1.35


def test_a_group_never_seen_is_placed_as_all_are() -> None:
    values = 3.0 + 2.0 * normal(500)
    spread = Spread.of(values, np.zeros(500, int), np.zeros(500, int), shape=(2, 2))
    assert np.isclose(spread.centre[1, 1], np.median(values))
    assert 1.7 < spread.scale[1, 1] < 2.3


@pytest.mark.parametrize("usual", [True, False])
def test_a_rare_answer_of_one_word_stands_out_only_where_one_word_is_rare(usual: bool) -> None:
    rng = np.random.default_rng(0)
    short = rng.random(4_000) < (0.6 if usual else 0.003)
    rare = short & (rng.random(4_000) < (0.1 if usual else 1.0))
    values = rng.normal(size=4_000) + 5.0 * rare
    column, row = np.where(short, 0, 6), np.zeros(4_000, int)
    height = Spread.of(values, row, column, shape=(1, 7)).standardised(values, row, column)
    # Where one word is rare, its group is thin, and is judged beside all others.
    assert (height[rare].mean() > 1.5) == (not usual)


def test_values_that_are_all_the_same_have_a_scale_all_the_same() -> None:
    spread = Spread.of(np.ones(50), np.zeros(50, int), np.full(50, 6), shape=(1, 7))
    assert spread.scale[0, 6] == pytest.approx(LEAST_SCALE, rel=0.05)
    assert Spread.of(np.zeros(0), np.zeros(0, int), np.zeros(0, int), shape=(1, 1)).scale[0, 0] == 1


@given(seed=seeds, heavy=st.booleans())
def test_what_is_merely_scattered_is_hardly_ever_held_an_outlier(seed: int, heavy: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, 4_000) if heavy else rng.normal(size=4_000)
    assert Mirror.of(values).probability(values).mean() < 0.03


@given(seed=seeds, share=st.sampled_from([0.05, 0.15, 0.3]))
def test_a_heap_above_is_found_and_the_rest_left_alone(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.random(4_000) < share
    values = rng.normal(size=4_000) + 5.0 * noise
    probability = Mirror.of(values).probability(values)
    assert probability[noise].mean() > 0.85
    assert probability[~noise].mean() < 0.03


@given(st.lists(st.floats(-20, 20), max_size=40))
def test_sureness_is_a_probability_that_never_falls(values: list[float]) -> None:
    mirror = Mirror.of(np.array(values))
    assert np.all((mirror.sureness >= 0.0) & (mirror.sureness <= 1.0))
    assert np.all(np.diff(mirror.sureness) >= 0.0)
    ladder = np.append(np.linspace(-10, 10, 81), [np.inf])
    assert np.all(np.diff(mirror.probability(ladder)) >= 0.0)
    assert mirror.probability(np.array([np.nan, -np.inf, EDGES[0] - 1e-9])).tolist() == [0, 0, 0]


def test_one_value_is_no_evidence() -> None:
    assert Mirror.of(np.array([9.0])).probability(np.array([9.0]))[0] == 0.0


@given(
    st.lists(
        st.tuples(st.floats(-9, 9), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=60
    )
)
def test_centres_and_scales_equal_their_twin(rows: list[tuple[float, int, int]]) -> None:
    values, row, column = (np.array(part) for part in zip(*rows, strict=True))
    spread = Spread.of(values.astype(float), row, column, shape=(3, 2))
    expected = reference.spread(values.tolist(), row.tolist(), column.tolist(), (3, 2))
    np.testing.assert_allclose(spread.centre, expected[0], atol=1e-12)
    np.testing.assert_allclose(spread.scale, expected[1], rtol=1e-9)
