"""The first records of an input, looked at before all work; and all of a small one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from slap_stream.corpus.field_map import FieldMap, guess
from slap_stream.corpus.inputs import Input, cut, find_inputs
from slap_stream.corpus.messages import DropReason, RecordDropped, is_given
from slap_stream.corpus.readers import Piece, read
from slap_stream.corpus.records import (
    KNOWN_SHAPES,
    columns_to_read,
    has_known_shape,
    normalise,
    shape_by_names,
)
from slap_stream.corpus.token_rows import TOKEN_FIELDS, holds_tokens
from slap_stream.errors import CorpusError

_PEEKED_ROWS = 16


def peek(
    entry: Input,
    pieces: Sequence[Piece],
    fields: FieldMap | None = None,
    *,
    tokenised: bool = False,
    mapping: bool = True,
) -> Iterator[Mapping[str, Any]]:
    """The first records of an input that are of a known shape, also token ids if there is a
    tokenizer; none only if it has no rows.

    Read as they are asked for: of thousands of small files, more would be all of them.

    Args:
        entry: The input.
        pieces: It as `cut` has cut it.
        fields: Names in the data for known ones.
        tokenised: As `normalise` takes it.
        mapping: Whether who asks could be given a map.

    Raises:
        CorpusError: If a file cannot be read, or none of the first records is of a known shape, nor
            would be if its fields had values.
    """
    first, known = None, False
    if pieces:
        with closing(read(pieces[0], entry.columns)) as reader:
            for row in islice(reader, _PEEKED_ROWS):
                if row is None:
                    continue
                first = row if first is None else first
                fits = has_known_shape(row, fields, tokenised=tokenised)
                known = known or fits or shape_by_names(row, fields) is not None
                if isinstance(row, Mapping) and fits:
                    yield row
    if first is not None and not known:
        raise CorpusError(
            f"records must have one of the known shapes, got {_describe(first, fields)} at the "
            f"start of {entry.name!r}{_cure(first, mapping)}; known shapes are "
            f"{'; '.join(KNOWN_SHAPES)}."
        )


def token_columns_in(path: str | Path) -> tuple[str, ...]:
    """Fields of rows that were tokenised before, as the first records of files have them; none
    where no file begins with such a row.

    Raises:
        CorpusError: If a file cannot be read.
    """
    names: set[str] = set()
    for entry in _with_tokens(path):
        for piece in cut(entry)[:1]:
            with closing(read(piece, entry.columns)) as reader:
                rows = [row for row in islice(reader, _PEEKED_ROWS) if isinstance(row, Mapping)]
            for row in filter(holds_tokens, rows):
                names.update(name for name in TOKEN_FIELDS if is_given(row.get(name)))
    return tuple(name for name in TOKEN_FIELDS if name in names)


def read_records(
    path: str | Path, *, tokenised: bool = False
) -> Iterator[dict[str, Any] | RecordDropped]:
    """The records of files in their order, as messages; of one that cannot be used, why.

    Args:
        path: As `find_inputs` takes it.
        tokenised: As `normalise` takes it: a row of tokens is what `read_tokens` makes of it.

    Raises:
        CorpusError: If a file cannot be read, or is of no known format or shape.
    """
    for entry in _with_tokens(path):
        pieces = cut(entry)
        for _ in peek(entry, pieces, tokenised=tokenised, mapping=False):
            break
        for piece in pieces:
            for row in read(piece, entry.columns):
                if row is None:
                    continue
                try:
                    if isinstance(row, DropReason):
                        raise RecordDropped(row)
                    record = normalise(row, source_field=None, tokenised=tokenised)
                    if record.tokens is None:
                        yield {"messages": record.messages}
                    else:
                        yield {**record.tokens}
                except RecordDropped as dropped:
                    yield dropped


def _with_tokens(path: str | Path) -> list[Input]:
    """Files, of which token ids are read, too."""
    columns = tuple(columns_to_read(None, None, tokenised=True))
    return [replace(entry, columns=columns) for entry in find_inputs([path])]


def _describe(row: Any, fields: FieldMap | None) -> str:
    if not isinstance(row, Mapping):
        return f"a {row}"
    mapped = "" if fields is None else f" with the map {fields.to_dict()!r}"
    return f"the fields {sorted(map(str, row))[:20]!r}{mapped}"


def _cure(row: Any, mapping: bool) -> str:
    """A map that might serve, in words; it is a guess, so that it is not taken by itself."""
    found = guess(row) if isinstance(row, Mapping) else {}
    if not found:
        return ""
    line = ",".join(f"{name}={field}" for name, field in found.items())
    command = f"slap-convert --map {shlex.quote(line)}"
    if not mapping:
        return f"; if it is what they hold, name what {command} makes of them"
    return f"; if it is what they hold, {command}, or fields={found!r}"
