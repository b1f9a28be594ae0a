"""Datasets that are loaded already: `datasets.Dataset` and `datasets.IterableDataset`.

Rows are read through the dataset itself, not from its files: indices, renamed columns, maps and
typed values (`Json`) are then as its user sees them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from slap_stream.corpus.field_map import FieldMap
from slap_stream.corpus.records import KNOWN_SHAPES, shape_by_names
from slap_stream.corpus.token_rows import TOKEN_FIELDS, packed_fields
from slap_stream.errors import ConfigError, CorpusError

LoadedKind = Literal["rows", "stream"]

_KINDS: dict[str, LoadedKind] = {"Dataset": "rows", "IterableDataset": "stream"}
_ROWS_AT_ONCE = 256
_REPORT_ROWS = 64
# What a stream is taken for that does not say how large it is; decides into how many parts a corpus
# is cut, and nothing else.
_STREAM_BYTES = 1 << 30
# Rows of a stream that tell it from another one of the same definition.
_TELLING_ROWS = 16


def loaded_kind(value: Any) -> LoadedKind | None:
    """How a dataset of the library `datasets` is read; None for anything else.

    Raises:
        CorpusError: If it is several splits at once.
    """
    # By name: who hands over no such dataset need not have the library.
    names = {
        base.__name__
        for base in type(value).__mro__
        if base.__module__.partition(".")[0] == "datasets"
    }
    if names & {"DatasetDict", "IterableDatasetDict"}:
        splits = list(value)
        take = "train" if "train" in splits or not splits else splits[0]
        raise CorpusError(
            f"dataset must be one split, got a {type(value).__name__} with the splits {splits!r}; "
            f"take one of them: dataset[{take!r}]."
        )
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def check_loaded(dataset: Any, fields: FieldMap | None = None) -> None:
    """Refuse, before any row is read, what cannot be read as it is.

    Args:
        dataset: As it was given.
        fields: Names in the data for known ones.

    Raises:
        CorpusError: If it has no rows, none of the known shapes, or rows that are made on access.
    """
    kind = loaded_kind(dataset)
    if kind == "rows" and not len(dataset):
        raise CorpusError("dataset must hold at least one row, got 0; nothing to train on.")
    if kind == "rows" and dataset.format["type"] == "custom":
        raise CorpusError(
            "dataset must hold its rows, got one whose rows are made when they are asked for "
            "(set_transform, with_transform); use map() with the same function."
        )
    names = dataset.column_names
    # A stream knows its columns only if somebody has said which they are.
    if names is None or shape_by_names(dict.fromkeys(names), fields) is not None:
        return
    if fields is not None or "input_ids" not in names:
        raise CorpusError(
            f"dataset must have the columns of one of the known shapes, got {names[:20]!r}; "
            f"rename_column() or map() to one of: {'; '.join(KNOWN_SHAPES)}."
        )
    packed = packed_fields(names)
    if packed:
        raise CorpusError(
            f"dataset must hold one sample in a row, got a column {packed[0]!r} beside input_ids, "
            "as packed ones have; samples are chosen one by one: hand it over as it was before it "
            "was packed (padding_free saves padding, too), or without that column if it was not."
        )


def check_tokenizer(dataset: Any, tokenizer: Any, fields: FieldMap | None = None) -> None:
    """Refuse a dataset of nothing but token ids where there is no tokenizer.

    Args:
        dataset: As it was given.
        tokenizer: Likewise.
        fields: Names in the data for known ones.

    Raises:
        ConfigError: If it is one.
    """
    if tokenizer is not None or not token_columns_of(dataset):
        return
    names = dataset.column_names
    if names is None or shape_by_names(dict.fromkeys(names), fields) is None:
        raise ConfigError(
            "tokenizer must be the one that made the dataset's input_ids, got None; what is "
            "embedded are the texts that it makes of them."
        )


def token_columns_of(dataset: Any) -> tuple[str, ...]:
    """Columns of a dataset that was tokenised before, as far as they are read; else none.

    Of a stream that does not say what it holds, those of its first row.
    """
    kind = loaded_kind(dataset)
    if kind is None:
        return ()
    names = dataset.column_names
    if names is None:
        names = list(next(_stream(dataset), {}))
    return tuple(n for n in TOKEN_FIELDS if n in names) if "input_ids" in names else ()


def loaded_fingerprint(dataset: Any, columns: Sequence[str]) -> list[str | int]:
    """What changes when the dataset does.

    The rows of a `Dataset` cannot change: its own fingerprint names them. Of an `IterableDataset`
    only the definition is known (files, functions with their arguments, as for the cache of
    `datasets`), and what these columns hold in its first rows, which are read.

    Raises:
        CorpusError: If the definition of a stream cannot be told from others.
    """
    if loaded_kind(dataset) == "rows":
        return ["rows", str(dataset._fingerprint), len(dataset)]
    from datasets.fingerprint import Hasher

    try:
        # A copy, because iterating leaves its marks in the definition.
        definition = Hasher.hash(copy.deepcopy(dataset)._ex_iterable)
    except (TypeError, pickle.PicklingError) as error:
        raise CorpusError(
            "dataset must have a definition that can be pickled, by which it is known again, got "
            f"an IterableDataset that has not ({error}); let its function open what it reads."
        ) from error
    first = [row for _, row in zip(range(_TELLING_ROWS), _stream(dataset), strict=False)]
    return ["stream", definition, Hasher.hash([_columns_of(row, columns) for row in first])]


def loaded_bytes(dataset: Any, columns: Sequence[str]) -> int:
    """Size of these columns of a dataset, about."""
    if loaded_kind(dataset) == "stream":
        return int(dataset.info.dataset_size or _STREAM_BYTES)
    view = _view(dataset, columns)
    # Of the whole table, of which an index may show a part.
    return int(view.data.nbytes * len(view) // max(view.data.num_rows, 1))


def loaded_bounds(
    dataset: Any, piece_bytes: int, columns: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Bounds of pieces of about as many bytes, in rows, and the bytes of each.

    A stream is one piece, from end to end: its parts are not in general what they would be alone.
    """
    if loaded_kind(dataset) == "stream":
        return [0, 0], [0]
    size, rows = loaded_bytes(dataset, columns), len(dataset)
    count = max(1, min(rows, -(-size // piece_bytes)))
    bounds = [rows * n // count for n in range(count + 1)] if rows else [0]
    return bounds, [size * (b - a) // max(rows, 1) for a, b in pairwise(bounds)]


def loaded_rows(
    dataset: Any, start: int, stop: int, columns: Sequence[str], report: Callable[[float], None]
) -> Iterator[Mapping[str, Any]]:
    """Rows `start` to `stop` of a `Dataset`, or all of a stream.

    Args:
        dataset: What to read.
        start: First row; a stream has but one piece.
        stop: Half-open end.
        columns: To read, of those that there are.
        report: Called now and then with the share that is done; for a stream, with the rows.
    """
    if loaded_kind(dataset) == "stream":
        for number, row in enumerate(_stream(dataset), start=1):
            yield row
            if number % _REPORT_ROWS == 0:
                report(number)
        return
    view = _view(dataset, columns)
    for at in range(start, stop, _ROWS_AT_ONCE):
        end = min(at + _ROWS_AT_ONCE, stop)
        table = view[at:end]
        for values in zip(*table.values(), strict=True):
            yield dict(zip(table, values, strict=True))
        report((end - start) / (stop - start))


def travels(dataset: Any) -> bool:
    """Whether a dataset goes to another process by the names of its files."""
    return loaded_kind(dataset) == "rows" and bool(dataset.cache_files)


def _view(dataset: Any, columns: Sequence[str]) -> Any:
    present = [name for name in columns if name in dataset.column_names]
    return dataset.with_format(None).select_columns(present)


def _stream(dataset: Any) -> Iterator[Mapping[str, Any]]:
    # A copy, so that the caller's is as they left it.
    yield from copy.deepcopy(dataset).with_format(None)


def _columns_of(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in columns if name in row}
