"""A state that somebody else has made: no code of theirs runs, and nothing changes."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import StateError
from tests.loader.conftest import corpus as corpus  # fixtures
from tests.loader.conftest import unbroken as unbroken
from tests.loader.test_loader import make, run


class _Hostile:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _forged(skeleton: Any, body: bytes) -> bytes:
    """Bytes that look whole: their length and their checksum fit."""
    text = json.dumps(skeleton).encode()
    length = len(text).to_bytes(8, "little")
    return length + zlib.crc32(text + body, zlib.crc32(length)).to_bytes(4, "little") + text + body


def test_what_is_forged_here_is_what_to_bytes_makes() -> None:
    array = np.arange(3)
    forged = _forged({"a": {"__array__": ["<i8", [3]]}}, array.tobytes())
    assert forged == to_bytes({"a": array})


_DTYPES = ("|O", "O", "|V8", "f8,O", "garbage", "<i3", "<i8", "|b1", "", 8, None)
_SHAPES = ([-1], [3], [1, 2], [1 << 62, 1 << 62], [0.5], ["1"], [True], [None], 3, None, [[1]])


@given(dtype=st.sampled_from(_DTYPES), shape=st.sampled_from(_SHAPES), body=st.binary(max_size=16))
def test_forged_bytes_are_refused_or_hold_plain_arrays(dtype: Any, shape: Any, body: bytes) -> None:
    data = _forged({"a": {"__array__": [dtype, shape]}}, body)
    try:
        found = from_bytes(data)["a"]
    except StateError as error:
        assert "must be those that to_bytes made" in str(error)  # noqa: PT017  (or it is read)
    else:
        assert found.dtype.kind in "biuf"
        assert found.tobytes() == body


@pytest.mark.parametrize("skeleton", [{"a": {"__array__": 3}}, {"a": {"__array__": [1]}}])
def test_forged_skeletons_are_refused(skeleton: Any) -> None:
    for data in (_forged(skeleton, b""), _forged(0, b"")[:8] + b"\0" * 8):
        with pytest.raises(StateError, match="must be those that to_bytes made"):
            from_bytes(data)


def test_a_state_of_hostile_content_runs_no_code_and_changes_nothing(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    loader = make(corpus)
    ids = run(loader, 2)
    state, hostile = loader.state_dict(), _Hostile(tmp_path / "touched")
    with pytest.raises(StateError, match="must be those that to_bytes made"):
        from_bytes(pickle.dumps(hostile).ljust(1000, b"\0"))
    objects = np.array([hostile], object)
    for name in state.keys() - {"version"}:
        for value in (hostile, [hostile], objects, {"a": objects}):
            with pytest.raises(StateError):
                loader.load_state_dict(state | {name: value})
    assert not hostile.path.exists()
    assert ids + run(loader, 2) == unbroken[:4]
