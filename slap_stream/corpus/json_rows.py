"""JSON records in a stream of bytes: one a line, or values in whatever layout they stand.

Usually a record is a line. The others are read value by value: one array over the whole file
(plain, indented, a record a line), records with nothing or a CR between them, records over several
lines. By the standard library's decoder, on a buffer that holds some records. A stream parser would
be quicker on arrays (ijson 1.5 times), but refuses NaN and gives up at the first bad record.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slap_stream.corpus.messages import DropReason

Row = Mapping[str, Any] | DropReason | None
"""A record; or why it cannot be read; or None for a blank line, which is counted and no record."""

MAX_RECORD_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
# An escape or a literal that is cut off is noticed up to so far before the end.
_NEAR_THE_END = 16
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_decode = json.JSONDecoder().raw_decode
_blanks = re.compile(r"[\s\ufeff]*")
_separators = re.compile(r"[\s,\ufeff]*")
_line_end = re.compile(r"[ \t]*\r?(\n|\Z)")


class FormatError(ValueError):
    """A file whose records cannot be told apart, from the start or from some place on."""


def require_utf8(head: bytes) -> None:
    """Refuse UTF-16, of which no record could be read.

    Raises:
        FormatError: If the first bytes of a file tell that it is.
    """
    if head.startswith(_UTF16_MARKS) or 0 in head[:2]:
        raise FormatError("it is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 makes it so")


def one_a_line(head: bytes) -> bool:
    """Whether records are lines, as far as the first bytes of a file tell.

    Raises:
        FormatError: If it is UTF-16.
    """
    require_utf8(head)
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not text.startswith("{"):
        return not text.startswith("[")
    try:
        _, end = _decode(text)
    except (ValueError, RecursionError) as error:
        # No text of JSON has a line end in it: what is not finished and has one is over lines.
        return not (_is_unfinished(error, text) and re.search(r"[\r\n]", text))
    return _line_end.match(text, end) is not None and not re.search(r"[\r\n]", text[:end])


def rows_of_line(line: bytes) -> Sequence[Row]:
    """The rows of a line: as a rule one, but records may stand in it side by side, or in an array.

    All of it is read or nothing: lines of an indented record are no records.
    """
    try:
        text = line.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return (DropReason.NOT_UNICODE,)
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return (value,)
        return [_row(entry) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return list(_side_by_side(text))


def _side_by_side(text: str) -> list[Row]:
    rows: list[Row] = []
    at = _after(_blanks, text, 0)
    while at < len(text):
        try:
            value, at = _decode(text, at)
        except (ValueError, RecursionError):
            return [DropReason.UNREADABLE]
        rows.append(_row(value))
        at = _after(_blanks, text, at)
    return rows or [None]


def _after(separators: re.Pattern[str], text: str, at: int) -> int:
    found = separators.match(text, at)
    return at if found is None else found.end()


def _row(value: Any) -> Row:
    return value if isinstance(value, dict | DropReason) else DropReason.NOT_AN_OBJECT


def rows_of_values(read: Callable[[int], bytes]) -> Iterator[Row]:
    """The records of a stream of JSON values and arrays of them, whatever stands between them.

    After what is no JSON the next record is one that begins a line, as far indented as that one.

    Args:
        read: Gives so many bytes at most, none at the end.

    Raises:
        FormatError: If no next record can be told, or an array has no end.
    """
    text = _Text(read)
    inside = False
    indent: int | None = 0
    while text.skip_separators():
        char = text.ahead[text.at]
        if char == "[" and not inside:
            inside = True
            text.at += 1
            continue
        if char == "]" and inside:
            inside = False
            text.at += 1
            continue
        indent = text.indent(indent)
        found = text.value()
        yield _row(found[0])
        if text.passed:
            continue
        place, cut_off = text.place, text.unfinished and text.ended
        if not text.find_record(indent):
            if inside or not cut_off:
                raise FormatError(f"it is no JSON any more from about letter {place:,} on")
            return
    if inside:
        raise FormatError("its array has no end")


class _Text:
    """A stream as text, of which a part is at hand.

    State: that part and the place of the next value in it, the blanks before that value, and what
    came of the last try to read one.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._gap = ""
        self._thrown_away = 0
        self.ahead, self.at = "", 0
        self.ended = self.passed = self.unfinished = False

    @property
    def place(self) -> int:
        """Letters of the stream before the next value."""
        return self._thrown_away + self.at

    def _more(self) -> bool:
        """Have more at hand, twice as much as is left: no value is tried often."""
        if self.ended:
            return False
        data = self._read(max(_CHUNK_BYTES, len(self.ahead) - self.at))
        self.ended = not data
        self._thrown_away += self.at
        self.ahead = self.ahead[self.at :] + self._decoder.decode(data, self.ended)
        self.at = 0
        return True

    def skip_separators(self) -> bool:
        """Go to the next value, bracket or whatever stands there; False at the end."""
        self._gap = ""
        while True:
            end = _after(_separators, self.ahead, self.at)
            # Of blanks without end only the last matter.
            self._gap = (self._gap + self.ahead[self.at : end])[-_CHUNK_BYTES:]
            self.at = end
            if end < len(self.ahead):
                return True
            if not self._more():
                return False

    def indent(self, before: int | None) -> int | None:
        """Blanks before the next value if it begins a line, or if it is the first; else None."""
        line = re.split(r"[\r\n]", self._gap)
        if len(line) > 1:
            return len(line[-1]) - len(line[-1].lstrip(" \t"))
        return before if self.place <= len(self._gap) + 1 else None

    def value(self) -> tuple[Any]:
        """The value that begins here, or why it is not read; `passed` says whether that is known
        to be its end."""
        while True:
            self.passed = self.unfinished = False
            try:
                value, end = _decode(self.ahead, self.at)
            except (ValueError, RecursionError) as error:
                self.unfinished = _is_unfinished(error, self.ahead)
                if not self.unfinished:
                    return (DropReason.UNREADABLE,)
                if len(self.ahead) - self.at > MAX_RECORD_BYTES:
                    return (DropReason.TOO_LARGE,)
                if not self._more():
                    return (DropReason.UNREADABLE,)
                continue
            # A number may go on.
            if end == len(self.ahead) and not isinstance(value, dict | list) and self._more():
                continue
            too_large = end - self.at > MAX_RECORD_BYTES
            self.passed, self.at = True, end
            return (DropReason.TOO_LARGE if too_large else value,)

    def find_record(self, indent: int | None) -> bool:
        """Go to the next line that begins a record with so many blanks, or ends the array."""
        if indent is None:
            return False
        # Records may begin with the comma that parts them.
        begin = rf"[ \t]{{{indent}}}(,[ \t]*)?(?=\{{)"
        wanted = re.compile(rf"[\r\n]({begin}|[ \t]{{0,{indent}}}(?=\]))")
        while True:
            found = wanted.search(self.ahead, self.at)
            if found is not None:
                self.at = found.start()
                return True
            # What is wanted may have begun, and not be at hand as a whole.
            self.at = max(self.at, len(self.ahead) - indent - _NEAR_THE_END)
            if not self._more():
                return False


def _is_unfinished(error: Exception, text: str) -> bool:
    """Whether more text might mend what the decoder says is wrong."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR_THE_END
