"""A state as bytes, and back: a JSON skeleton, then the arrays as they lie in memory. No pickle.

Before them stand the length of the skeleton (8 bytes) and a checksum of all else (4).
"""

from __future__ import annotations

import json
import re
import zlib
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import StateError
from slap_stream.types import State

# Stands in the skeleton for an array: number of the array.
_ARRAY = "__array__"
_LENGTH, _HEADER = 8, 12
_DTYPE = re.compile("[<>|][biufUS][0-9]{1,4}")


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
    if data[_LENGTH:_HEADER] != _checksum(length, body):
        raise StateError(
            f"the bytes of a state must be those that to_bytes made, all of them, got {len(data)} "
            "that were cut or changed since; take the checkpoint before."
        )
    start = int.from_bytes(length, "little")
    try:
        return _restored(body, start)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        # Made to look whole: a checksum keeps nobody out.
        raise StateError(
            f"the bytes of a state must be those that to_bytes made, got others ({error}); take "
            "the checkpoint before."
        ) from error


def _restored(body: memoryview, start: int) -> State:
    at = start

    def restore(entry: dict[str, Any]) -> Any:
        nonlocal at
        if _ARRAY not in entry:
            return entry
        name, shape = entry[_ARRAY]
        # Numbers and texts: no objects, and nothing that NumPy would have to parse.
        if not _DTYPE.fullmatch(name):
            raise TypeError(f"an array of {name!r}")
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"an array of shape {shape!r}")
        array = np.frombuffer(body, np.dtype(name), prod(shape), at).reshape(shape).copy()
        at += array.nbytes
        return array

    # Objects are restored in the order in which they end, which is that in which arrays were met.
    state: State = json.loads(bytes(body[:start]), object_hook=restore)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes more than its arrays have")
    return state


def _checksum(length: bytes, body: bytes | memoryview) -> bytes:
    return zlib.crc32(body, zlib.crc32(length)).to_bytes(_HEADER - _LENGTH, "little")
