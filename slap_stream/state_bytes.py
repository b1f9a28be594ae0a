"""A state as bytes, and back: a JSON skeleton, then the arrays as they lie in memory. No pickle."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.types import State

# Stands in the skeleton for an array: number of the array.
_ARRAY = "__array__"


def to_bytes(state: State) -> bytes:
    """Bytes of a state of dicts, lists, strings, numbers and arrays."""
    arrays: list[NDArray[Any]] = []

    def place(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value.item()  # a NumPy scalar; anything else is no part of a state
        arrays.append(np.ascontiguousarray(value))
        return {_ARRAY: [value.dtype.str, list(value.shape)]}

    skeleton = json.dumps(state, default=place).encode()
    return b"".join([len(skeleton).to_bytes(8, "little"), skeleton, *(a.tobytes() for a in arrays)])


def from_bytes(data: bytes) -> State:
    """Inverse of `to_bytes`; the arrays are copies."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = start

    def restore(entry: dict[str, Any]) -> Any:
        nonlocal at
        if _ARRAY not in entry:
            return entry
        dtype, shape = np.dtype(entry[_ARRAY][0]), entry[_ARRAY][1]
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
        at += array.nbytes
        return array

    # Objects are restored in the order in which they end, which is that in which arrays were met.
    state: State = json.loads(data[8:start], object_hook=restore)
    return state
