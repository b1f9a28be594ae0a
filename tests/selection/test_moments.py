"""Sums over samples: what they add up to, and that it does not matter how the samples came."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.selection.moments import SYMMETRIC, Moments
from tests.laws import as_json
from tests.strategies import Array, seeds

COLUMNS, SKETCH_DIM = 9, 16


def samples(seed: int, n: int) -> tuple[Array, Array, Array]:
    """(n, COLUMNS) rows with one column of ones, (n,) losses, (n, SKETCH_DIM) sketches."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, COLUMNS)).astype(np.float32)
    x[:, 0] = 1.0
    return x, rng.gamma(2.0, size=n), rng.normal(size=(n, SKETCH_DIM)).astype(np.float32)


def moments_of(x: Array, losses: Array, sketches: Array) -> Moments:
    """Moments of samples that all have a loss and a sketch."""
    moments = Moments.zeros(columns=COLUMNS, sketch_dim=SKETCH_DIM)
    moments.add_sketched(x, losses, sketches)
    return moments


@settings(max_examples=20)
@given(seed=seeds, n=st.integers(1, 600))
def test_moments_are_the_sums_that_they_say(seed: int, n: int) -> None:
    x, losses, sketches = samples(seed, n)
    wide = x.astype(np.float64)
    unit = sketches / np.linalg.norm(sketches.astype(np.float64), axis=1, keepdims=True)
    expected = {
        "gram": wide.T @ wide,
        "cross": wide.T @ losses,
        "square": losses @ losses,
        "count": n,
        "sketch_gram": wide.T @ wide,
        "sketch_cross": wide.T @ unit,
        "sketch_count": n,
    }
    found = moments_of(x, losses, sketches)
    for name, sums in expected.items():
        np.testing.assert_allclose(getattr(found, name), sums, rtol=1e-5, atol=1e-5 * np.sqrt(n))


@settings(max_examples=20)
@given(seed=seeds, cut=st.integers(0, 40))
def test_moments_of_parts_add_up_to_those_of_the_whole(seed: int, cut: int) -> None:
    x, losses, sketches = samples(seed, 40)
    total = moments_of(x[:cut], losses[:cut], sketches[:cut])
    total = total.plus(moments_of(x[cut:], losses[cut:], sketches[cut:]))
    whole = moments_of(x, losses, sketches).to_dict()
    for name, expected in whole.items():
        np.testing.assert_allclose(total.to_dict()[name], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=5))
def test_rows_that_come_in_parts_have_the_same_moments_bit_by_bit(sizes: list[int]) -> None:
    x, losses, _ = samples(0, sum(sizes))
    parts, whole = (Moments.zeros(columns=COLUMNS, sketch_dim=SKETCH_DIM) for _ in range(2))
    whole.add_losses(x, losses)
    parts.add_losses(np.split(x, np.cumsum(sizes)[:-1]), losses)
    np.testing.assert_array_equal(parts.gram, whole.gram)
    np.testing.assert_array_equal(parts.cross, whole.cross)


def test_a_long_gradient_is_not_more_of_a_direction() -> None:
    x, losses, sketches = samples(0, 30)
    # Powers of two, which change no digit of the unit sketches.
    scale = 2.0 ** np.random.default_rng(0).integers(-9, 9, (30, 1))
    plain = moments_of(x, losses, sketches)
    scaled = moments_of(x, losses, (sketches * scale).astype(np.float32))
    np.testing.assert_array_equal(scaled.sketch_cross, plain.sketch_cross)


def test_moments_survive_a_checkpoint_bit_by_bit_and_the_state_is_a_copy() -> None:
    moments = moments_of(*samples(0, 50))
    state = moments.to_dict()
    saved = as_json(state)
    assert all(len(state[name]) == COLUMNS * (COLUMNS + 1) // 2 for name in SYMMETRIC)
    again = Moments.from_dict(saved)
    for name in ("gram", "cross", "square", "count", "sketch_gram", "sketch_cross"):
        np.testing.assert_array_equal(getattr(again, name), getattr(moments, name))
    for into in (None, moments_of(*samples(2, 9))):
        total = moments.plus(again, decay=0.5, into=into)
        for name in state:
            np.testing.assert_allclose(getattr(total, name), 1.5 * getattr(again, name))
    moments.add_losses(*samples(1, 5)[:2])
    assert as_json(state) == saved
