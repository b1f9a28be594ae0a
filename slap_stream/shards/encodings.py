"""MDS encodings of texts, whole numbers, arrays and JSON, without loading streaming.

Streaming takes seconds and hundreds of megabytes to load, in each process. Those that convert and
embed need nothing of it but these four, which write and read the same bytes; any other encoding is
streaming's own.
"""

from __future__ import annotations

import json
from sys import byteorder
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# An array begins with a byte: how many axes, and in its last two bits how wide an axis is written.
_AXIS_DTYPES = tuple(np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64))
_MOST_AXES = 63
_DTYPES = frozenset(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + [f"float{bits}" for bits in (16, 32, 64)]
)
# Reading them runs code that whoever wrote the shard has chosen.
UNSAFE_ENCODINGS = ("pkl",)


class Codec(Protocol):
    """How the values of a column are written.

    Attributes:
        size: Bytes of a value; None where each has its own.
    """

    size: int | None

    def encode(self, value: Any, /) -> bytes:
        """The bytes of a value."""
        ...

    def decode(self, data: bytes, /) -> Any:
        """The value of these bytes."""
        ...


class TextCodec:
    """`str`: UTF-8."""

    size: int | None = None
    decode = staticmethod(bytes.decode)

    def encode(self, value: str, /) -> bytes:
        """The bytes of a value."""
        _check(str, value)
        return value.encode()


class IntCodec:
    """`int`: a whole number of 64 bits."""

    size: int | None = 8

    def encode(self, value: int, /) -> bytes:
        """The bytes of a value."""
        _check(int, value)
        return value.to_bytes(8, byteorder, signed=True)

    def decode(self, data: bytes, /) -> int:
        """The value of these bytes."""
        return int.from_bytes(data, byteorder, signed=True)


class JsonCodec:
    """`json`: whatever JSON has."""

    size: int | None = None

    def encode(self, value: Any, /) -> bytes:
        """The bytes of a value."""
        return json.dumps(value.tolist() if isinstance(value, np.ndarray) else value).encode()

    def decode(self, data: bytes, /) -> Any:
        """The value of these bytes."""
        return json.loads(data.decode())


class ArrayCodec:
    """`ndarray:DTYPE`, of any shape but an empty one, and `ndarray:DTYPE:SHAPE`.

    Args:
        dtype: Of every value.
        shape: Of every value; None where each has its own.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...] | None = None) -> None:
        self._dtype, self._shape = np.dtype(dtype), shape
        self.size = None if shape is None else int(np.prod(shape)) * self._dtype.itemsize

    def encode(self, value: Any, /) -> bytes:
        """The bytes of a value."""
        _check(np.ndarray, value)
        array: NDArray[Any] = value
        wrong_shape = array.shape != self._shape if self._shape is not None else not array.size
        if array.dtype != self._dtype or wrong_shape or not 0 < array.ndim <= _MOST_AXES:
            raise TypeError(
                f"value must be an array of {self._dtype} and of the shape "
                f"{self._shape or '(any, not empty)'}, got {array.dtype} of {array.shape!r}."
            )
        if self._shape is not None:
            return array.tobytes()
        width = int(np.searchsorted([1 << 8, 1 << 16, 1 << 32], max(array.shape), side="right"))
        axes = np.array(array.shape, _AXIS_DTYPES[width]).tobytes()
        return b"".join([bytes([array.ndim << 2 | width]), axes, array.tobytes()])

    def decode(self, data: bytes, /) -> Any:
        """The value of these bytes."""
        if self._shape is not None:
            return np.frombuffer(data, self._dtype).reshape(self._shape)
        # Values are copied, so that they are aligned whatever the header takes.
        axes, width = data[0] >> 2, data[0] & 3
        begin = 1 + (axes << width)
        values = np.frombuffer(data[begin:], self._dtype)
        if axes == 1:
            return values
        return values.reshape(np.frombuffer(data[1:begin], _AXIS_DTYPES[width]))


def codec_of(encoding: str) -> Codec:
    """The codec of an encoding as an index names it.

    Raises:
        ValueError: If there is no such encoding.
    """
    own: dict[str, Codec] = {"str": TextCodec(), "int": IntCodec(), "json": JsonCodec()}
    if encoding in own:
        return own[encoding]
    kind, _, told = encoding.partition(":")
    dtype, _, axes = told.partition(":")
    if kind == "ndarray" and dtype in _DTYPES:
        return ArrayCodec(dtype, _shape_of(axes, encoding) if ":" in told else None)
    from slap_stream.shards.library import coder_of

    foreign: Codec | None = coder_of(encoding)
    if foreign is None:
        raise ValueError(f"encoding must be one of MDS, got {encoding!r}.")
    return foreign


def _shape_of(axes: str, encoding: str) -> tuple[int, ...]:
    """The shape that an encoding names after its second colon."""
    try:
        shape = tuple(map(int, axes.split(",")))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(
            f"encoding must name a shape of whole numbers above 0, got {axes!r} in {encoding!r}."
        )
    return shape


def _check(kind: type, value: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"value must be of type {kind.__name__}, got {type(value).__name__}.")
