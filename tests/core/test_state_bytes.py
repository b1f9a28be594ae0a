"""States as bytes: the same again, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import StateError


def test_a_state_survives_as_bytes() -> None:
    state = {
        "numbers": [1, 2.5, float("nan"), None, True, "text"],
        "arrays": {"a": np.arange(6).reshape(2, 3), "none": np.zeros((0, 4), np.float32)},
        "list": [np.array([True, False]), {"deep": np.float64(3.0), "half": np.ones(3, "f2")}],
    }
    found = from_bytes(to_bytes(state))
    np.testing.assert_equal(found, state)
    assert found["list"][1]["half"].dtype == np.float16
    assert found["arrays"]["none"].shape == (0, 4)


@given(cut=st.integers(0, 400), flipped=st.integers(0, 400))
def test_bytes_that_were_cut_or_changed_are_refused(cut: int, flipped: int) -> None:
    whole = to_bytes({"a": np.arange(40), "b": "text"})
    wrong = bytearray(whole)
    wrong[flipped % len(whole)] ^= 1
    for data in (whole[: min(cut, len(whole) - 1)], bytes(wrong), b""):
        with pytest.raises(StateError, match="must be those that to_bytes made, all of them"):
            from_bytes(data)
