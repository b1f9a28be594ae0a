"""A saved state, read entry by entry: what does not fit is refused by its place in the state."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import StateError
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray

_CURE = "the state was cut or changed since: take the checkpoint before."


class Saved:
    """A saved state, or a part of one.

    What it gives is checked and the caller's own: arrays are copies, whatever they came as. An
    array must have the type that was saved; nested lists, as JSON gives them, serve as well.

    Args:
        entries: What a `state_dict` gave.
        path: Where it lies in the whole state, for messages.

    Raises:
        StateError: If it is no mapping. Every method raises it for what is not there or not such.
    """

    def __init__(self, entries: Any, path: str = "state") -> None:
        if not isinstance(entries, Mapping):
            raise StateError(
                f"{path} must be what state_dict gave, got {_shown(entries)}; load a checkpoint."
            )
        self._entries, self.path = entries, path

    def __getitem__(self, name: str) -> Any:
        """An entry as it is."""
        if name not in self._entries:
            raise StateError(f"{self.path}.{name} must be there, got none; {_CURE}")
        return self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def refusal(self, name: str, constraint: str, value: Any) -> StateError:
        """The error that says what an entry must be."""
        return StateError(f"{self.path}.{name} must be {constraint}, got {_shown(value)}; {_CURE}")

    def check_version(self, version: int) -> None:
        """Refuse what another version of slap_stream has written."""
        if "version" not in self._entries:
            raise StateError(
                f"{self.path} must be what state_dict gave, got one without a version; load a "
                "checkpoint."
            )
        found = self._entries["version"]
        if type(found) is not int or found != version:
            raise StateError(
                f"{self.path}.version must be {version}, got {_shown(found)}; the state was "
                "written by another version of slap_stream."
            )

    def part(self, name: str) -> Saved:
        """A part that is a state of its own."""
        return Saved(self[name], f"{self.path}.{name}")

    def parts(self, name: str) -> list[Saved]:
        """A list of parts."""
        return [
            Saved(value, f"{self.path}.{name}[{place}]")
            for place, value in enumerate(self.sequence(name))
        ]

    def sequence(self, name: str) -> Sequence[Any]:
        """A list or tuple."""
        value = self[name]
        if not isinstance(value, list | tuple):
            raise self.refusal(name, "a list", value)
        return value

    def plain_part(self, name: str) -> dict[str, Any]:
        """A part of numbers, strings and lists of them, which `==` compares without surprise."""
        if not isinstance(self[name], Mapping) or not _is_plain(self[name]):
            raise self.refusal(name, "a dict of plain numbers, strings and lists", self[name])
        return dict(self[name])

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self[name]
        if not isinstance(value, bool | np.bool_):
            raise self.refusal(name, "true or false", value)
        return bool(value)

    def whole(self, name: str, *, least: int = 0, most: int = 2**63 - 1) -> int:
        """A whole number in [least, most]."""
        value = self[name]
        fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise self.refusal(name, f"a whole number in [{least}, {most}]", value)
        return int(value)

    def number(self, name: str, *, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in [least, most]."""
        value = self[name]
        fits = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not fits or not (math.isfinite(value) and least <= value <= most):
            raise self.refusal(name, f"a finite number in [{least}, {most}]", value)
        return float(value)

    def wholes(self, name: str, *shape: int | None, least: int = 0, below: int = 2**63) -> IntArray:
        """Array of whole numbers in [least, below); None stands for any length of an axis."""
        array: IntArray = self._array(name, shape, np.dtype(np.int64), "i")
        if array.size and not (array.min() >= least and array.max() < below):
            wrong = array[(array < least) | (array >= below)]
            raise self.refusal(name, f"whole numbers in [{least}, {below})", wrong[:5])
        return array

    def numbers(
        self, name: str, *shape: int | None, least: float = -math.inf, most: float = math.inf
    ) -> FloatArray:
        """Float64 array of finite numbers in [least, most]."""
        array: FloatArray = self._array(name, shape, np.dtype(np.float64), "if")
        self._check_range(name, array, least, most)
        return array

    def numbers32(self, name: str, *shape: int | None) -> Float32Array:
        """Float32 array of finite numbers."""
        array: Float32Array = self._array(name, shape, np.dtype(np.float32), "if")
        self._check_range(name, array, -math.inf, math.inf)
        return array

    def any_numbers(self, name: str, *shape: int | None) -> FloatArray:
        """Float64 array in which NaN and infinity have a meaning."""
        return self._array(name, shape, np.dtype(np.float64), "if")

    def flags(self, name: str, *shape: int | None) -> BoolArray:
        """Array of true and false."""
        return self._array(name, shape, np.dtype(np.bool_), "b")

    def _check_range(self, name: str, array: NDArray[Any], least: float, most: float) -> None:
        wrong = ~(np.isfinite(array) & (array >= least) & (array <= most))
        if wrong.any():
            raise self.refusal(name, f"finite numbers in [{least}, {most}]", array[wrong][:5])

    def _array(
        self, name: str, shape: Sequence[int | None], dtype: np.dtype[Any], kinds: str
    ) -> NDArray[Any]:
        """A copy of an array of this type, or of nested lists of these kinds of numbers."""
        value = self[name]
        wanted = f"{dtype} {_of_shape(shape)}"
        if isinstance(value, int | float | list | tuple):
            try:
                array = np.array(value)
            except ValueError as error:
                raise self.refusal(name, f"{wanted}, in lists of equal length", value) from error
            # An empty list says nothing of its type, and nothing of the axes after it.
            if not array.size and array.ndim < len(shape):
                inner = [length or 0 for length in shape[array.ndim :]]
                array = array.reshape(*array.shape, *inner)
            fits = not array.size or array.dtype.kind in kinds
        else:
            array = np.array(value)
            fits = array.dtype == dtype
        same = len(shape) == array.ndim and all(
            length in (None, found) for length, found in zip(shape, array.shape, strict=True)
        )
        if not (fits and same):
            raise self.refusal(name, wanted, value)
        with np.errstate(over="ignore"):  # too large for the type is infinite, and refused as that
            return array.astype(dtype, copy=False)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | np.generic)


def _of_shape(shape: Sequence[int | None]) -> str:
    lengths = ["n" if length is None else str(length) for length in shape]
    return f"({', '.join(lengths)}{',' * (len(lengths) == 1)})"


def _shown(value: Any) -> str:
    """What a value is, in few words."""
    if isinstance(value, np.ndarray):
        if value.size <= 5:
            return f"{value.dtype} {value.tolist()}"
        return f"{value.dtype} {_of_shape(value.shape)}"
    if value is None or isinstance(value, Mapping):
        return type(value).__name__
    return reprlib.repr(value)
