"""A saved state gives what was saved, or says where it does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slap_stream.core.saved import Saved
from slap_stream.errors import StateError

CUT = "the state was cut or changed since: take the checkpoint before"


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=1, min_side=0, max_dims=3)))
def test_arrays_come_back_as_they_were_also_from_nested_lists(array: Any) -> None:
    numbers = array.astype(np.float32) / 7
    for given_ids, given_numbers in ((array, numbers), (array.tolist(), numbers.tolist())):
        saved = Saved({"ids": given_ids, "numbers": given_numbers, "flags": array > 0})
        ids = saved.wholes("ids", *array.shape, least=-(2**63))
        np.testing.assert_array_equal(ids, array)
        assert ids.dtype == np.int64
        found = saved.numbers32("numbers", *array.shape)
        np.testing.assert_array_equal(found, numbers)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(saved.flags("flags", *array.shape), array > 0)


def test_what_it_gives_is_a_copy() -> None:
    array = np.zeros(3)
    Saved({"a": array}).numbers("a", 3)[:] = 1.0
    assert not array.any()


@pytest.mark.parametrize(
    ("read", "entry", "message"),
    [
        (
            lambda s: s.whole("a"),
            1.0,
            r"state.a must be a whole number in \[0, .*, got 1.0; " + CUT,
        ),
        (lambda s: s.whole("a"), True, "a whole number"),
        (lambda s: s.whole("a", most=3), 4, r"a whole number in \[0, 3\], got 4"),
        (lambda s: s.number("a"), float("nan"), "a finite number"),
        (lambda s: s.number("a"), "1.0", "a finite number"),
        (lambda s: s.number("a", least=0.0), -1.0, r"in \[0.0, inf\], got -1.0"),
        (lambda s: s.flag("a"), 1, "true or false, got 1"),
        (lambda s: s.part("a"), [1], r"state.a must be what state_dict gave, got \[1\]"),
        (lambda s: s.parts("a"), [{}, 1], r"state.a\[1\] must be what state_dict gave, got 1"),
        (lambda s: s.sequence("a"), "text", "a list, got 'text'"),
        (lambda s: s.plain_part("a"), {"b": np.zeros(2)}, "a dict of plain numbers"),
        (lambda s: s.wholes("a", 3), np.zeros(2, np.int64), r"int64 \(3,\), got int64 \[0, 0\]"),
        (lambda s: s.wholes("a", 2), np.zeros(2), r"int64 \(2,\), got float64"),
        (lambda s: s.wholes("a", 2), np.zeros(2, np.int32), r"int64 \(2,\), got int32"),
        (lambda s: s.wholes("a", 1), [0.5], r"int64 \(1,\)"),
        (lambda s: s.wholes("a", None, below=9), [8, 9, -1], r"\[0, 9\), got int64 \[9, -1\]"),
        (lambda s: s.numbers("a", 2, 2), [[0.0, 1.0], [2.0]], "in lists of equal length"),
        (lambda s: s.numbers("a", 1), [float("inf")], "finite numbers"),
        (lambda s: s.numbers("a", 1), [True], r"float64 \(1,\)"),
        (lambda s: s.numbers32("a", 1), [1e300], "finite numbers"),
        (lambda s: s.flags("a", 2), [0, 1], r"bool \(2,\)"),
        (lambda s: s["b"], 0, "state.b must be there, got none; " + CUT),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(read: Any, entry: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        read(Saved({"a": entry}))


def test_an_empty_list_stands_for_any_empty_array() -> None:
    saved = Saved({"a": [], "b": [[], []]})
    assert saved.wholes("a", None).shape == (0,)
    assert saved.numbers32("a", 0, 16).shape == (0, 16)
    assert saved.numbers("b", 2, 0).shape == (2, 0)
    with pytest.raises(StateError, match=r"int64 \(2,\)"):
        saved.wholes("a", 2)


@given(st.integers(-3, 9).filter(lambda version: version != 5) | st.none() | st.just("5"))
def test_another_version_is_refused_before_anything_else(version: Any) -> None:
    with pytest.raises(StateError, match=r"state.version must be 5, got .*another version"):
        Saved({"version": version}).check_version(5)
    Saved({"version": 5}).check_version(5)


def test_what_no_state_dict_gave_is_not_called_another_version() -> None:
    with pytest.raises(StateError, match="state must be what state_dict gave, got one without a v"):
        Saved({}).check_version(5)
