"""Strings that know which message they are of, whatever a chat template does to them.

A template trims, cuts at `</think>`, adds and compares. `Traced` is a `str` with the same value in
all of that, so that the template goes the same way as with plain strings; only where it is written
out do marks stand around what came from a message. Without its marks the text is that of plain
strings, which the caller checks: what is found by the marks is right, or it is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, SupportsIndex

# Noncharacters of Unicode: no text that is meant for interchange holds them.
START, STOP = "\ufdd0", "\ufdd1"
BLOCK_START, BLOCK_STOP = "\ufdd2", "\ufdd3"
RESERVED = frozenset((START, STOP, BLOCK_START, BLOCK_STOP))
# The mark's second character says of which message: one of a private plane.
_FIRST_OWNER = 0x100000
MAX_OWNERS = 0xFFFD
_MARK = re.compile(f"[{START}{STOP}][\U00100000-\U0010fffd]|[{BLOCK_START}{BLOCK_STOP}]")

Run = tuple[int, int, int]


class Mark(NamedTuple):
    """A mark in a text.

    Attributes:
        position: In the text without marks.
        kind: One of `START`, `STOP`, `BLOCK_START`, `BLOCK_STOP`.
        owner: Number of the message; -1 of a block.
    """

    position: int
    kind: str
    owner: int


def unmark(marked: str) -> tuple[str, list[Mark]]:
    """A text without its marks, and the marks in their order."""
    pieces: list[str] = []
    marks: list[Mark] = []
    position = end = 0
    for found in _MARK.finditer(marked):
        pieces.append(marked[end : found.start()])
        position += found.start() - end
        end = found.end()
        mark = found[0]
        marks.append(Mark(position, mark[0], ord(mark[1]) - _FIRST_OWNER if mark[1:] else -1))
    pieces.append(marked[end:])
    return "".join(pieces), marks


def traced(value: Any, owner: int, *, inside: bool = False) -> Any:
    """The same value with every string in it traced, but for the names of fields.

    Args:
        value: Strings, lists and mappings of them; anything else is left as it is.
        owner: Number of the message, below `MAX_OWNERS`.
        inside: Whether marks stand inside of the blanks at a text's ends, and none around blanks
            alone. A template that trims what it has written out (a macro's result), or asks if
            that is empty, then does as it does without marks.
    """
    if isinstance(value, str):
        return Traced(value, [(0, len(value), owner)], inside)
    if isinstance(value, Mapping):
        return {key: traced(entry, owner, inside=inside) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [traced(entry, owner, inside=inside) for entry in value]
    return value


class Traced(str):
    """A string of which some runs are of a message. Operations that a template calls keep them.

    An operation that is not here gives a plain string, whose text is then not found: an error, not
    a wrong label.
    """

    runs: list[Run]
    inside: bool

    def __new__(cls, text: str, runs: Iterable[Run], inside: bool = False) -> Traced:
        self = super().__new__(cls, text)
        self.runs = list(runs)
        self.inside = inside
        return self

    def _of(self, text: str, runs: Iterable[Run]) -> Traced:
        return Traced(text, runs, self.inside)

    def _cut(self, start: int, stop: int) -> Traced:
        """The range as a string of its own. A run keeps its place there, also when emptied."""
        kept = [
            (max(first, start) - start, min(last, stop) - start, owner)
            for first, last, owner in self.runs
            if (first < stop and last > start) or (first == last and start <= first <= stop)
        ]
        if not kept:
            kept = [(0, 0, owner) for first, last, owner in self.runs if first <= start <= last][:1]
        return self._of(str.__getitem__(self, slice(start, stop)), kept)

    def _pieces(self, parts: Iterable[str], between: int | None = None) -> list[Any]:
        """These parts of the string, in this order; so many characters apart, or some blanks."""
        found, position = [], 0
        for part in parts:
            if between is None:
                position = str.find(self, part, position)
            found.append(self._cut(position, position + len(part)))
            position += len(part) + (between or 0)
        return found

    def __str__(self) -> str:
        text = str.__getitem__(self, slice(None))
        pieces, end = [], 0
        for start, stop, owner in self.runs:
            who = chr(_FIRST_OWNER + owner)
            first, last = start, stop
            if self.inside:
                held = text[start:stop]
                if not held.strip():
                    continue
                last -= len(held) - len(held.rstrip())
                first += len(held) - len(held.lstrip())
            pieces += [text[end:first], START, who, text[first:last], STOP, who]
            end = last
        return "".join([*pieces, text[end:]])

    def __format__(self, spec: str) -> str:
        return format(str(self) if not spec else str.__getitem__(self, slice(None)), spec)

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        after = other.runs if isinstance(other, Traced) else []
        shift = len(self)
        runs = [*self.runs, *((a + shift, b + shift, owner) for a, b, owner in after)]
        return self._of(str.__add__(self, other), runs)

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        shift = len(other)
        runs = [(a + shift, b + shift, owner) for a, b, owner in self.runs]
        return self._of(str.__add__(other, self), runs)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._cut(start, max(start, stop))
        return str.__getitem__(self, key)

    def lstrip(self, chars: str | None = None) -> str:
        """As of `str`."""
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        """As of `str`."""
        return self._cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None) -> str:
        """As of `str`."""
        start = len(self) - len(str.lstrip(self, chars))
        return self._cut(start, max(start, len(str.rstrip(self, chars))))

    def removeprefix(self, prefix: str) -> str:
        """As of `str`."""
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str) -> str:
        """As of `str`."""
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As of `str`."""
        return self._pieces(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """As of `str`."""
        return self._pieces(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        """As of `str`."""
        return self._pieces(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[Any, Any, Any]:
        """As of `str`."""
        before, found, after = self._pieces(str.partition(self, sep), 0)
        return before, found, after

    def rpartition(self, sep: str) -> tuple[Any, Any, Any]:
        """As of `str`."""
        before, found, after = self._pieces(str.rpartition(self, sep), 0)
        return before, found, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Any:
        """As of `str`."""
        if not old:
            return str.replace(self, old, new, count)
        whole, *others = self.split(old, count)
        for part in others:
            whole = whole + new + part
        return whole
