"""Inputs of a corpus: found, cut into pieces, looked into before all work."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from slap_stream.core.files import local_path
from slap_stream.corpus.loaded import (
    check_loaded,
    loaded_bounds,
    loaded_bytes,
    loaded_fingerprint,
    loaded_kind,
    travels,
)
from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.readers import Kind, Piece, batch_bytes, explained, read, row_group_bytes
from slap_stream.corpus.records import (
    COLUMNS,
    KNOWN_SHAPES,
    has_known_shape,
    normalise,
    shape_by_names,
)
from slap_stream.errors import CorpusError
from slap_stream.remote.listing import RemotePath, listed
from slap_stream.remote.urls import is_remote, parse_url

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
# Parts of a piece: pieces that are smaller are read by one job.
_SMALLEST = 16
_PEEKED_ROWS = 16
_LOADED = Path("<loaded>")
_NOT_LOCAL = (
    "download it first, or load it with datasets.load_dataset and hand over the dataset "
    "(streaming=True keeps none of it on disk)"
)
# Text per byte on disk: a guess, which only decides into how many parts a corpus is cut.
_EXPANSION: dict[Kind, int] = {
    "lines": 1,
    "gz": 4,
    "zst": 5,
    "parquet": 2,
    "arrow": 1,
    "rows": 1,
    "stream": 1,
}
_COMPRESSIONS: tuple[tuple[str, Kind], ...] = (("", "lines"), (".gz", "gz"), (".zst", "zst"))
_SUFFIXES: dict[str, Kind] = {
    f".{name}{end}": kind for end, kind in _COMPRESSIONS for name in ("jsonl", "ndjson", "json")
} | {".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input of a corpus.

    Attributes:
        path: As it was named; below `_LOADED` for a dataset that is loaded already.
        stem: Name, unique among the inputs.
        kind: How its files are read.
        files: In the order of their rows; several only for a saved dataset, none of a loaded one.
        dataset: The `Dataset` or `IterableDataset` itself, if it is loaded already.
    """

    path: Path | RemotePath
    stem: str
    kind: Kind
    files: tuple[Path | RemotePath, ...]
    dataset: Any = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return str(self.path) if self.dataset is None else self.stem

    @property
    def text_bytes(self) -> int:
        """Size of what it holds when uncompressed, about."""
        if self.dataset is not None:
            return loaded_bytes(self.dataset)
        return sum(file.stat().st_size for file in self.files) * _EXPANSION[self.kind]

    @property
    def travels(self) -> bool:
        """Whether worker processes can be told what to read without being sent all of it."""
        return self.dataset is None or travels(self.dataset)

    def fingerprint(self) -> list[str | int]:
        """What changes when the input does: its name, the sizes and times of its files."""
        if self.dataset is not None:
            return [self.stem, *loaded_fingerprint(self.dataset)]
        stats = [file.stat() for file in self.files]
        return [self.stem, *(n for stat in stats for n in (stat.st_size, stat.st_mtime_ns))]


def find_inputs(inputs: Sequence[Any]) -> list[Input]:
    """Find out what the inputs are, without opening data files.

    Args:
        inputs: Files, datasets saved to disk, directories of files, or datasets that are loaded.

    Raises:
        CorpusError: If one does not exist or is of no known format, or two are the same.
    """
    found: list[Found] = []
    datasets: dict[Path | RemotePath, Any] = {}
    for entry in inputs:
        kind = loaded_kind(entry)
        if kind is None and is_remote(entry):
            found += _expand_remote(entry)
            continue
        if kind is None:
            found += _expand(local_path("inputs", entry, _NOT_LOCAL))
            continue
        check_loaded(entry)
        # As if it were a file, so that it has a name among the others.
        path = _LOADED / (f"dataset-{len(datasets) + 1}" if datasets else "dataset")
        datasets[path] = entry
        found.append((path, kind, ()))
    if not found:
        raise CorpusError("inputs must hold at least one file, got []; name what to convert.")
    counts = Counter(path.resolve() for path, _, _ in found)
    twice = [str(path) for path, count in counts.items() if count > 1]
    if twice:
        raise CorpusError(
            f"inputs must be different files, got {twice[:5]!r} ({len(twice)} in all) more than "
            "once; copies would be trained on twice."
        )
    stems = _unique_stems([path for path, _, _ in found])
    return [
        Input(path=path, stem=stem, kind=kind, files=files, dataset=datasets.get(path))
        for stem, (path, kind, files) in zip(stems, found, strict=True)
    ]


def cut(entry: Input) -> list[Piece]:
    """Cut an input into pieces of about `PIECE_BYTES`, where its format allows.

    Raises:
        CorpusError: If a file cannot be read.
    """
    pieces: list[Piece] = []
    if entry.dataset is not None:
        bounds, weights = loaded_bounds(entry.dataset, PIECE_BYTES)
        return [
            Piece(
                path=entry.name,
                kind=entry.kind,
                stem=entry.stem,
                start=start,
                stop=stop,
                num_bytes=weight,
                dataset=entry.dataset,
            )
            for (start, stop), weight in zip(pairwise(bounds), weights, strict=True)
        ]
    for file in entry.files:
        with explained(file):
            size = file.stat().st_size
            if entry.kind == "lines":
                bounds = [*range(0, size, PIECE_BYTES), size]
                weights = [stop - start for start, stop in pairwise(bounds)]
            elif entry.kind == "parquet":
                bounds, weights = _group(row_group_bytes(file), PIECE_BYTES)
            elif entry.kind == "arrow":
                bounds, weights = _group(batch_bytes(file), PIECE_BYTES)
            else:
                bounds, weights = [0, size], [size]
        pieces += [
            Piece(
                path=str(file),
                kind=entry.kind,
                stem=entry.stem,
                start=start,
                stop=stop,
                num_bytes=size * weight // max(sum(weights), 1),
            )
            for (start, stop), weight in zip(pairwise(bounds), weights, strict=True)
        ]
    return pieces


def peek(entry: Input, pieces: Sequence[Piece]) -> Iterator[Mapping[str, Any]]:
    """The first records of an input that are of a known shape; none only if it has no rows.

    Read as they are asked for: of thousands of small files, more would be all of them.

    Raises:
        CorpusError: If a file cannot be read, or none of the first records is of a known shape, nor
            would be if its fields had values.
    """
    first, known = None, False
    if pieces:
        with closing(read(pieces[0], COLUMNS)) as reader:
            for row in islice(reader, _PEEKED_ROWS):
                if row is None:
                    continue
                first = row if first is None else first
                known = known or shape_by_names(row) is not None
                if isinstance(row, Mapping) and has_known_shape(row):
                    yield row
    if first is not None and not known:
        raise CorpusError(
            f"records must have one of the known shapes, got {_describe(first)} at the start of "
            f"{entry.name!r}; known shapes are {'; '.join(KNOWN_SHAPES)}."
        )


def read_records(path: str | Path) -> Iterator[dict[str, Any] | RecordDropped]:
    """The records of files in their order, as messages; of one that cannot be used, why.

    Raises:
        CorpusError: If a file cannot be read, or is of no known format or shape.
    """
    for entry in find_inputs([path]):
        pieces = cut(entry)
        for _ in peek(entry, pieces):
            break
        for piece in pieces:
            for fields in read(piece, COLUMNS):
                if fields is None:
                    continue
                try:
                    if isinstance(fields, DropReason):
                        raise RecordDropped(fields)
                    yield {"messages": normalise(fields, source_field=None).messages}
                except RecordDropped as dropped:
                    yield dropped


def _describe(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"the fields {sorted(map(str, row))[:20]!r}"
    # Both reasons that occur here are what a JSON array over the whole file gives.
    return f"a {row} (one record per line is wanted; jq -c '.[]' unfolds an array)"


Found = tuple[Path | RemotePath, Kind, tuple[Path | RemotePath, ...]]


def _expand_remote(entry: str | Path) -> list[Found]:
    """Files of a URL, as those of a local path; a pattern is a folder of what it fits."""
    known = ", ".join(sorted(_SUFFIXES))
    files, named = listed(parse_url("inputs", entry))
    kinds = [(file, _SUFFIXES.get(_suffix(file))) for file in files]
    found: list[Found] = [(file, kind, (file,)) for file, kind in kinds if kind is not None]
    if not found:
        what = "which is none" if named else f"with {[file.name for file in files[:5]]!r}"
        raise CorpusError(
            f"inputs in object stores or on the web must be files that end in one of {known}, or "
            f"folders or patterns of such, got {str(entry)!r}, {what}."
        )
    return found


def _expand(path: Path) -> list[Found]:
    known = ", ".join(sorted(_SUFFIXES))
    if not path.exists():
        raise CorpusError(f"inputs must exist, got {str(path)!r}; check the path.")
    if path.is_file():
        kind = _SUFFIXES.get(_suffix(path))
        if kind is None:
            raise CorpusError(
                f"inputs must be datasets saved to disk or files that end in one of {known}, "
                f"got {str(path)!r}; write it as JSON lines first."
            )
        return [(path, kind, (path,))]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        if len(splits) != 1:
            raise CorpusError(
                f"inputs must be one split of a dataset each, got {str(path)!r} with the splits "
                f"{splits!r}; name the directory of the split."
            )
        path = path / splits[0]
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text("utf-8"))
        if state.get("_indices_data_files"):
            raise CorpusError(
                f"inputs must be saved without an index mapping, got {str(path)!r}; load it, call "
                "flatten_indices() and save it again."
            )
        return [(path, "arrow", tuple(path / file["filename"] for file in state["_data_files"]))]
    entries = sorted(path.iterdir())
    files = [file for file in entries if _suffix(file) in _SUFFIXES]
    folders = [entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._"]
    if folders and files:
        logger.warning(
            "%s: its sub-folders %s are not read (%d in all); name them, too, if they are inputs.",
            path,
            folders[:5],
            len(folders),
        )
    if not files:
        raise CorpusError(
            f"inputs must be files or datasets saved to disk, got the directory {str(path)!r}, "
            f"which is no such dataset and holds no file that ends in one of {known}."
        )
    return [found for file in files for found in _expand(file)]


def _suffix(path: Path | RemotePath) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix


def _unique_stems(paths: Sequence[Path | RemotePath]) -> list[str]:
    """File names without suffix; where two are alike, with the folders that tell them apart."""
    parts = []
    for path in paths:
        # Links are not followed: in a hub's cache they lead to files that are named by a hash.
        *folders, name = path.absolute().parts
        parts.append((*folders, name.removesuffix(_suffix(path))))
    # Same folder, other suffix: only the whole name tells them apart.
    counts = Counter(parts)
    parts = [
        (*part[:-1], path.name) if counts[part] > 1 else part
        for path, part in zip(paths, parts, strict=True)
    ]
    depths = [1] * len(parts)
    while True:
        stems = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        seen = Counter(stems)
        depths = [d + (seen[stem] > 1) for d, stem in zip(depths, stems, strict=True)]
        if max(seen.values()) == 1:
            return stems


def read_together(pieces: Sequence[Piece]) -> list[int]:
    """(num_jobs + 1,) bounds of the runs of pieces that one job reads, which small ones share."""
    bounds, _ = _group([piece.num_bytes for piece in pieces], PIECE_BYTES // _SMALLEST)
    return bounds


def _group(sizes: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """Bounds and bytes of runs of units that hold about so many bytes each."""
    bounds, weights, weight = [0], [], 0
    for number, size in enumerate(sizes, start=1):
        weight += size
        if weight >= limit or number == len(sizes):
            bounds.append(number)
            weights.append(weight)
            weight = 0
    return bounds, weights
