"""Inputs of a corpus: found, and cut into pieces."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slap_stream.core.files import local_path, path_inside, writable
from slap_stream.corpus.field_map import FieldMap
from slap_stream.corpus.loaded import (
    check_loaded,
    loaded_bounds,
    loaded_bytes,
    loaded_fingerprint,
    loaded_kind,
    token_columns_of,
    travels,
)
from slap_stream.corpus.readers import Kind, Packing, Piece, explained, records_are_lines
from slap_stream.corpus.records import (
    COLUMNS,
    columns_to_read,
)
from slap_stream.corpus.tables import batch_bytes, row_group_bytes
from slap_stream.errors import CorpusError
from slap_stream.remote.listing import RemotePath, listed
from slap_stream.remote.urls import is_remote, parse_url
from slap_stream.shards.index import INDEX_NAME

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
# Parts of a piece: pieces that are smaller are read by one job.
_SMALLEST = 16
_LOADED = Path("<loaded>")
_NOT_LOCAL = (
    "download it first, or load it with datasets.load_dataset and hand over the dataset "
    "(streaming=True keeps none of it on disk)"
)
# Text per byte on disk: a guess, which only decides into how many parts a corpus is cut.
_EXPANSION = {"parquet": 2, "gz": 4, "zst": 5}
_PACKINGS: dict[str, Packing] = {".gz": "gz", ".zst": "zst"}
_TEXTS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
}
_SUFFIXES: dict[str, Kind] = {
    **_TEXTS,
    **{suffix + packed: kind for packed in _PACKINGS for suffix, kind in _TEXTS.items()},
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
# What `datasets` reads and we do not.
_LOAD = "load it, datasets.load_dataset({}, split='train', streaming=True), and hand that over"
_BY_DATASETS = {
    ".tar": _LOAD.format("'webdataset', data_files=...") + " with fields={'messages': "
    "'json.messages'} or the like",
    ".lance": _LOAD.format("its folder's path") + " (pylance is needed)",
}
# What lies in folders of data and says something about it.
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", INDEX_NAME, "corpus.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input of a corpus.

    Attributes:
        path: As it was named; below `_LOADED` for a dataset that is loaded already.
        stem: Name, unique among the inputs.
        kind: How its files are read.
        files: In the order of their rows; several only for a saved dataset, none of a loaded one.
        dataset: The `Dataset` or `IterableDataset` itself, if it is loaded already.
        columns: Fields of a record that are looked at.
    """

    path: Path | RemotePath
    stem: str
    kind: Kind
    files: tuple[Path | RemotePath, ...]
    dataset: Any = None
    columns: tuple[str, ...] = COLUMNS

    @property
    def name(self) -> str:
        """What errors call it."""
        return str(self.path) if self.dataset is None else self.stem

    @property
    def text_bytes(self) -> int:
        """Size of what it holds when uncompressed, about."""
        if self.dataset is not None:
            return loaded_bytes(self.dataset, self.columns)
        expansion = _EXPANSION.get(self.packing or self.kind, 1)
        return sum(file.stat().st_size for file in self.files) * expansion

    @property
    def packing(self) -> Packing:
        """How its files are compressed."""
        is_text = self.kind in _TEXTS.values()
        return _PACKINGS.get(self.path.suffix.lower(), "") if is_text else ""

    @property
    def travels(self) -> bool:
        """Whether worker processes can be told what to read without being sent all of it."""
        return self.dataset is None or travels(self.dataset)

    def fingerprint(self) -> list[str | int]:
        """What changes when the input does: its name, the sizes and times of its files."""
        if self.dataset is not None:
            return [self.stem, *loaded_fingerprint(self.dataset, self.columns)]
        stats = [file.stat() for file in self.files]
        return [self.stem, *(n for stat in stats for n in (stat.st_size, stat.st_mtime_ns))]


def find_inputs(
    inputs: Sequence[Any], fields: FieldMap | None = None, *, tokenised: bool = False
) -> list[Input]:
    """Find out what the inputs are, without opening data files.

    Args:
        inputs: Files, datasets saved to disk, directories of files, or datasets that are loaded.
        fields: Names in the data for known ones.
        tokenised: As `normalise` takes it.

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
        check_loaded(entry, fields)
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
        Input(
            path=path,
            stem=stem,
            kind=kind,
            files=files,
            dataset=datasets.get(path),
            columns=_columns(datasets.get(path), fields, tokenised),
        )
        for stem, (path, kind, files) in zip(stems, found, strict=True)
    ]


def _columns(dataset: Any, fields: FieldMap | None, tokenised: bool) -> tuple[str, ...]:
    """Fields that are looked at; of a loaded dataset they decide its size and fingerprint, so that
    those of tokens are left out where they are not read: labels of something else, say."""
    if tokenised and dataset is not None:
        tokenised = bool(token_columns_of(dataset))
    return tuple(columns_to_read(fields, None, tokenised=tokenised))


def cut(entry: Input) -> list[Piece]:
    """Cut an input into pieces of about `PIECE_BYTES`, where its format allows.

    Raises:
        CorpusError: If a file cannot be read.
    """
    pieces: list[Piece] = []
    if entry.dataset is not None:
        bounds, weights = loaded_bounds(entry.dataset, PIECE_BYTES, entry.columns)
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
            if (
                entry.kind == "lines"
                and not entry.packing
                and (size <= PIECE_BYTES or records_are_lines(file))
            ):
                bounds = [*range(0, size, PIECE_BYTES), size]
                weights = [stop - start for start, stop in pairwise(bounds)]
            elif entry.kind == "parquet":
                bounds, weights = _group(row_group_bytes(file), PIECE_BYTES)
            # Where its batches lie can be told of one elsewhere only by reading all of it.
            elif entry.kind == "arrow" and not isinstance(file, RemotePath):
                bounds, weights = _group(batch_bytes(file), PIECE_BYTES)
            else:
                bounds, weights = [0, size], [size]
        pieces += [
            Piece(
                path=file if isinstance(file, RemotePath) else str(file),
                kind=entry.kind,
                stem=entry.stem,
                start=start,
                stop=stop,
                num_bytes=size * weight // max(sum(weights), 1),
                packing=entry.packing,
                whole=len(weights) == 1,
            )
            for (start, stop), weight in zip(pairwise(bounds), weights, strict=True)
        ]
    return pieces


Found = tuple[Path | RemotePath, Kind, tuple[Path | RemotePath, ...]]


def _expand_remote(entry: str | Path) -> list[Found]:
    """Files of a URL, as those of a local path; a pattern is a folder of what it fits."""
    known = ", ".join(sorted(_SUFFIXES))
    files, named = listed(parse_url("inputs", entry))
    meant = [file for file in files if named or _may_hold_data(file.name)]
    kinds = [(file, _SUFFIXES.get(_suffix(file).lower())) for file in meant]
    found: list[Found] = [(file, kind, (file,)) for file, kind in kinds if kind is not None]
    if not found:
        what = "which is none" if named else f"with {[file.name for file in files[:5]]!r}"
        raise CorpusError(
            f"inputs in object stores or on the web must be files that end in one of {known}, or "
            f"folders or patterns of such, got {str(entry)!r}, {what}."
        )
    return found


def _expand(path: Path) -> list[Found]:
    with explained(path):
        return _expanded(path)


def _expanded(path: Path) -> list[Found]:
    known = ", ".join(sorted(_SUFFIXES))
    if not path.exists():
        raise CorpusError(f"inputs must exist, got {str(path)!r}; check the path.")
    if not path.is_dir():
        kind = _SUFFIXES.get(_suffix(path).lower()) if path.is_file() else None
        if kind is None:
            cure = _BY_DATASETS.get(path.suffix.lower(), "write it as JSON lines first")
            raise CorpusError(
                f"inputs must be datasets saved to disk or files that end in one of {known}, "
                f"got {str(path)!r}; {cure}."
            )
        return [(path, kind, (path,))]
    if path.suffix.lower() == ".lance":
        raise CorpusError(
            f"inputs must be files or datasets saved to disk, got {str(path)!r}; "
            f"{_BY_DATASETS['.lance']}."
        )
    if (path / "dataset_dict.json").is_file():
        splits = _described(path / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise CorpusError(
                f"inputs must be one split of a dataset each, got {str(path)!r} with the splits "
                f"{splits!r}; name the directory of the split."
            )
        path = path_inside("dataset_dict.json", path, splits[0])
    if (path / "state.json").is_file():
        if _described(path / "state.json", "_indices_data_files"):
            raise CorpusError(
                f"inputs must be saved without an index mapping, got {str(path)!r}; load it, call "
                "flatten_indices() and save it again."
            )
        names = [
            file.get("filename") if isinstance(file, Mapping) else file
            for file in _described(path / "state.json", "_data_files")
        ]
        return [(path, "arrow", tuple(path_inside("state.json", path, name) for name in names))]
    entries = sorted(path.iterdir())
    files = [
        file for file in entries if _suffix(file).lower() in _SUFFIXES and _may_hold_data(file.name)
    ]
    folders = [entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._"]
    if folders and files:
        logger.warning(
            "%s: its sub-folders %s are not read (%d in all); name them, too, if they are inputs.",
            path,
            folders[:5],
            len(folders),
        )
    if not files:
        inside = f"; name its sub-folders, {folders[:5]!r} ({len(folders)} in all)"
        raise CorpusError(
            f"inputs must be files or datasets saved to disk, got the directory {str(path)!r}, "
            f"which is no such dataset and holds no file that ends in one of {known}"
            f"{inside if folders else ''}."
        )
    return [found for file in files for found in _expand(file)]


def _described(file: Path, key: str) -> list[Any]:
    """A list that a file of `datasets` holds under that name; [] for none."""
    try:
        told = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        told = None
    value = (told.get(key) or []) if isinstance(told, dict) else None
    if not isinstance(value, list):
        raise CorpusError(
            f"{file.name} must be as save_to_disk writes it, with a list {key!r}, got "
            f"{str(file)!r}, which is not; save the dataset again."
        )
    return value


def _may_hold_data(name: str) -> bool:
    """Whether a file of a folder is an input, and not one about the others.

    With a dot begin files that are not meant to be seen: `._NAME`, which macOS puts beside each.
    """
    return not name.startswith(".") and name.lower() not in _ABOUT_DATA


def _suffix(path: Path | RemotePath) -> str:
    """As it is written: .jsonl, .JSONL.gz."""
    return "".join(path.suffixes[-2:]) if path.suffix.lower() in _PACKINGS else path.suffix


def _unique_stems(paths: Sequence[Path | RemotePath]) -> list[str]:
    """File names without suffix; where two are alike, with the folders that tell them apart."""
    parts = []
    for path in paths:
        # Links are not followed: in a hub's cache they lead to files that are named by a hash.
        *folders, name = map(writable, path.absolute().parts)
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
