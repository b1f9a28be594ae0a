"""A state as bytes, and back: a JSON skeleton, then the arrays as they lie in memory. No pickle.

Before them stand the length of the skeleton (8 bytes) and a checksum of all else (4).
"""

from __future__ import annotations

import json
import math
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import StateError
from slap_stream.types import State

# Stands in the skeleton for an array: number of the array.
_ARRAY = "__array__"
_LENGTH, _HEADER = 8, 12
# Arrays of numbers, truth values and texts; an object would be a place in memory, and anything else
# something that NumPy would have to parse.
_DTYPE = re.compile("[<>|][biufcSU][0-9]{1,4}")
# What comes of bytes that only look like a state.
_OF_OTHERS = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, AttributeError)


def to_bytes(state: State) -> bytes:
    """Bytes of a state of dicts, lists, strings, numbers and arrays."""
    arrays: list[NDArray[Any]] = []

    def place(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value.item()  # a NumPy scalar; anything else is no part of a state
        arrays.append(np.ascontiguousarray(value))
        return {_ARRAY: [value.dtype.str, list(value.shape)]}

    skeleton = json.dumps(state, default=place).encode()
    body = b"".join([skeleton, *(array.tobytes() for array in arrays)])
    length = len(skeleton).to_bytes(_LENGTH, "little")
    return length + _checksum(length, body) + body


def from_bytes(data: bytes) -> State:
    """Inverse of `to_bytes`; the arrays are copies.

    Raises:
        StateError: If they are not what `to_bytes` has made, or not all of it.
    """
    length, body = data[:_LENGTH], memoryview(data)[_HEADER:]
    wrong = (
        f"the bytes of a state must be those that to_bytes made, all of them, got {len(data)} "
        "that were cut or changed since; take the checkpoint before."
    )
    if data[_LENGTH:_HEADER] != _checksum(length, body):
        raise StateError(wrong)
    try:
        return _restored(length, body)
    except _OF_OTHERS as error:
        # The sum is right, and anyone can make one.
        raise StateError(wrong) from error


def _restored(length: bytes, body: memoryview) -> State:
    start = int.from_bytes(length, "little")
    at = start

    def restore(entry: dict[str, Any]) -> Any:
        nonlocal at
        if _ARRAY not in entry:
            return entry
        told, shape = entry[_ARRAY]
        if not _DTYPE.fullmatch(told) or min(shape, default=0) < 0:
            raise ValueError(f"no array of {told!r} of the shape {shape!r} is made of numbers")
        dtype, count = np.dtype(told), math.prod(shape)
        # A view of what is there, so that no more is asked for than that.
        data = body[at : at + count * dtype.itemsize]
        at += len(data)
        flat = np.frombuffer(data, dtype, count) if count else np.empty(0, dtype)
        return flat.reshape(shape).copy()

    # Objects are restored in the order in which they end, which is that in which arrays were met.
    state = json.loads(bytes(body[:start]), object_hook=restore)
    if not isinstance(state, dict) or at != len(body):
        raise ValueError("more or less is there than the skeleton says")
    return state


def _checksum(length: bytes, body: bytes | memoryview) -> bytes:
    return zlib.crc32(body, zlib.crc32(length)).to_bytes(_HEADER - _LENGTH, "little")
