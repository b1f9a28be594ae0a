"""Damage to saved states: entries that are gone, cut, or of another type, at any depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Path = tuple[str | int, ...]
GONE = object()
# In these NaN or infinity has a meaning.
MAY_BE_NAN = ("own_loss", "distance")


def entries(state: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every entry, at any depth; rows of nested lists are part of their entry."""
    if isinstance(state, Mapping):
        inner: Any = state.items()
    elif isinstance(state, list | tuple) and state and isinstance(state[0], Mapping | np.ndarray):
        inner = enumerate(state)
    else:
        return
    for name, value in inner:
        yield (*path, name)
        yield from entries(value, (*path, name))


def _cut(value: Any) -> Any:
    return value[:-1] if _has_rows(value) else GONE


def _cut_first_row(value: Any) -> Any:
    """One row shorter than the others; of an array, all rows."""
    if not _has_rows(value) or not _has_rows(value[0]):
        return GONE
    if isinstance(value, np.ndarray):
        return value[:, :-1]
    return type(value)([value[0][:-1], *value[1:]])


def _has_rows(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0 and len(value) > 0


def _as_type(dtype: Any) -> Callable[[Any], Any]:
    def retype(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.astype(dtype)
        return GONE

    return retype


def _spoil(value: Any) -> Any:
    """One number in it is none."""
    if isinstance(value, float):
        return float("nan")
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
        spoilt = value.copy()
        spoilt.flat[-1] = np.nan
        return spoilt
    if isinstance(value, list) and value and isinstance(value[0], float):
        return [*value[:-1], float("nan")]
    return GONE


# Each gives what stands in the entry's place.
DAMAGES: dict[str, Callable[[Any], Any]] = {
    "gone": lambda value: GONE,
    "cut": _cut,
    "first row cut": _cut_first_row,
    "None": lambda value: None,
    "text": lambda value: "text",
    "as text": str,
    "in a list": lambda value: [value],
    "in a dict": lambda value: {"value": value},
    # A fraction may well be negative.
    "negative": lambda value: GONE if isinstance(value, float) else -7,
    "half": lambda value: 0.5 + value if type(value) is int else GONE,
    "true": lambda value: GONE if isinstance(value, bool) else True,
    "not a number": _spoil,
    "object": _as_type(object),
    "float32": _as_type(np.float32),
    "float64": _as_type(np.float64),
    "int64": _as_type(np.int64),
    "int32": _as_type(np.int32),
    "bool": _as_type(bool),
}


def damaged(state: Any, path: Path, damage: str) -> Any:
    """A copy in which one entry is damaged; one to which this cannot be done is gone."""
    state = copy.deepcopy(state)
    *above, name = path
    if damage == "not a number" and name in MAY_BE_NAN:
        damage = "gone"
    holder = state
    chain = []
    for step in above:
        chain.append((holder, step))
        holder = holder[step]
    value = DAMAGES[damage](holder[name])
    if isinstance(holder, tuple):
        changed = list(holder)
        outer, step = chain[-1]
        outer[step] = holder = changed
    if value is GONE:
        del holder[name]
    else:
        holder[name] = value
    return state
