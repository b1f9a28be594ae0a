"""Linear algebra by blocks, against what NumPy makes of it in one go."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from slap_stream.core import linear
from slap_stream.core.linear import (
    ROWS_AT_A_TIME,
    inverse_of_triangle,
    leading_directions,
    normalised,
    power_after,
    row_chunks,
    single_threaded,
)
from tests import reference
from tests.strategies import seeds


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 3 * ROWS_AT_A_TIME), max_size=6))
def test_chunks_of_rows_do_not_depend_on_how_the_rows_came(sizes: list[int]) -> None:
    rows = np.arange(2 * sum(sizes), dtype=np.float32).reshape(-1, 2)
    parts = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    found, whole = list(row_chunks(parts)), list(row_chunks([rows]))
    assert [chunk.tolist() for chunk in found] == [chunk.tolist() for chunk in whole]
    assert [len(chunk) for chunk in found[:-1]] == [ROWS_AT_A_TIME] * max(0, len(found) - 1)
    assert sum(len(chunk) for chunk in found) == len(rows)


@settings(max_examples=20)
@given(seed=seeds, n=st.integers(1, 130))
def test_a_triangle_times_its_inverse_is_the_identity(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    lower = rng.normal(size=(n, n)) / np.sqrt(n) + 2.0 * np.eye(n)
    inverse = inverse_of_triangle(lower)
    assert not np.triu(inverse, 1).any()
    np.testing.assert_allclose(np.tril(lower) @ inverse, np.eye(n), atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (300, 230)])
def test_power_after_a_triangle_is_that_of_the_whole_product(rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    upper = np.triu(rng.normal(size=(columns, columns))).astype(np.float32)
    expected = np.sum((x.astype(np.float64) @ upper) ** 2, axis=1)
    np.testing.assert_allclose(power_after(x, upper), expected, rtol=1e-4)


def test_leading_directions_hold_what_a_map_stretches_most() -> None:
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    power = 0.8 ** np.arange(40)
    matrix = (vectors * power) @ vectors.T
    found = leading_directions(lambda q: matrix @ q, rng.normal(size=(40, 12)), rounds=4)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-12)
    # The eight largest lie in what twelve directions span.
    captured = np.linalg.norm(found.T @ vectors[:, :8], axis=0)
    assert captured.min() > 0.999


@pytest.mark.parametrize("error", [None, KeyError])
def test_blas_uses_one_thread_inside_and_afterwards_what_it_had(error: type | None) -> None:
    def threads() -> set[int]:
        return {library.get_num_threads() for library in linear._blas}

    with threadpool_limits(2, "blas"):
        with contextlib.suppress(KeyError), single_threaded():
            assert threads() == {1}
            if error is not None:
                raise error
        assert threads() == {2}


def test_any_thread_can_want_one_thread() -> None:
    found = []

    def count() -> None:
        with single_threaded():
            found.append([library.get_num_threads() for library in linear._blas])

    with threadpool_limits(2, "blas"):
        # Threadpoolctl lets the first thread alone that has set a number set others.
        with single_threaded():
            pass
        thread = threading.Thread(target=count)
        thread.start()
        thread.join()
        assert found == [[1] * len(linear._blas)]
        assert {library.get_num_threads() for library in linear._blas} == {2}
    with threadpool_limits(1, "blas"):
        assert {library.get_num_threads() for library in linear._blas} == {1}


def test_one_thread_lasts_until_the_last_who_wants_it_has_done() -> None:
    [library] = linear._blas[:1]
    before = library.get_num_threads()
    try:
        library.set_num_threads(2)
        first, second = single_threaded(), single_threaded()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert library.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert library.get_num_threads() == 2
    finally:
        library.set_num_threads(before)


@given(seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
def test_rows_are_normalised_in_their_own_precision_and_zero_rows_stay(
    seed: int, dtype: type
) -> None:
    rows = np.random.default_rng(seed).normal(size=(9, 5)).astype(dtype) * 1e-15
    rows[4] = 0
    unit = normalised(rows)
    assert unit.dtype == dtype
    np.testing.assert_allclose(unit, reference.unit_rows(rows), rtol=1e-5)
    np.testing.assert_array_equal(unit[4], 0)
