"""index.json: which shards a directory holds, how many samples each, and how to merge several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from slap_stream.core.files import path_inside, require_inside, write_text
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.remote.cache import FileCache
from slap_stream.types import IntArray

INDEX_NAME = "index.json"
INDEX_VERSION = 2
# Size above which a new shard is started. Smaller than streaming's own 64 MiB: a block of the
# sampler is 8 shards, whose embeddings are in memory and whose shards are at hand together.
SHARD_BYTES = 16 << 20
_FILE_KEYS = ("raw_data", "zip_data", "raw_meta", "zip_meta")

# Of streaming: offsets of 32 bits in an MDS file; files of other formats may be larger.
_MAX_MDS_BYTES = _MAX_SAMPLES = (1 << 32) - 1
_MAX_FILE_BYTES = (1 << 63) - 1
_COLUMN_KEYS: dict[str, Callable[[Any], bool]] = {
    "column_names": lambda name: isinstance(name, str),
    "column_encodings": lambda name: isinstance(name, str),
    "column_sizes": lambda size: size is None or _is_whole(size, _MAX_MDS_BYTES),
}

ShardInfo = dict[str, Any]
PathLike = str | os.PathLike[str]


def read_index(corpus_dir: PathLike) -> list[ShardInfo]:
    """Entries of a directory's index.json, one per shard, in sample-id order.

    Raises:
        CorpusError: If the directory or its index.json is missing, or it is no index of version 2.
    """
    directory = Path(corpus_dir)
    path = directory / INDEX_NAME
    if not path.is_file():
        what = f"a shard directory without {INDEX_NAME}" if directory.is_dir() else "no directory"
        raise CorpusError(
            f"corpus must be a directory with an {INDEX_NAME}, got {str(directory)!r}, which is "
            f"{what}; an interrupted conversion has none (run it again), and shards in "
            "sub-directories need merge_indexes."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{INDEX_NAME} must be JSON, got {str(path)!r}, which is not ({error}); "
            "write the shards again."
        ) from error
    if not isinstance(index, dict) or index.get("version") != INDEX_VERSION:
        version = index.get("version") if isinstance(index, dict) else None
        raise CorpusError(
            f"{INDEX_NAME} must be of version {INDEX_VERSION}, got {version!r} in {str(path)!r}; "
            "write the shards again with a current mosaicml-streaming."
        )
    shards = index.get("shards")
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and _is_whole(shard.get("samples"), _MAX_SAMPLES)
        for shard in shards
    ):
        raise CorpusError(
            f"{INDEX_NAME} must list shards with their number of samples, got {str(path)!r}, "
            "which does not; write the shards again."
        )
    for shard_id, shard in enumerate(shards):
        _require_sound(shard, f"{INDEX_NAME} of {str(directory)!r}, shard {shard_id},")
    return shards


def _require_sound(shard: ShardInfo, name: str) -> None:
    """Refuse an entry of which something is of a kind or a size that no writer gives it.

    Whoever uses one may then do so: no file is outside of the directory, nothing as large as its
    file alone could say. What is missing is for its reader to miss.
    """
    for key in _FILE_KEYS:
        file = shard.get(key)
        if file is None:
            continue
        sizes = file.get("bytes", 0) if isinstance(file, dict) else None
        if not _is_whole(sizes, _MAX_FILE_BYTES):
            raise CorpusError(
                f"{name} must say how many bytes its {key} has, got {_short(file)}; write the "
                "shards again."
            )
        if "basename" in file:
            require_inside(name, file["basename"])
        require_hashes(f"{name} in its {key}", file.get("hashes"))
    raw = shard.get("raw_data")
    if shard.get("format") == "mds" and raw is not None and "bytes" in raw:
        # Each sample has at least the place where it begins.
        num_bytes = raw["bytes"]
        if 4 * (shard["samples"] + 2) > num_bytes or num_bytes > _MAX_MDS_BYTES:
            raise CorpusError(
                f"{name} must have as many samples as its file can hold, got "
                f"{shard['samples']} in {num_bytes} bytes; write the shards again."
            )
    for key, check in _COLUMN_KEYS.items():
        column = shard.get(key)
        if column is not None and not (isinstance(column, list) and all(map(check, column))):
            raise CorpusError(
                f"{name} must list its {key} as MDSWriter does, got {_short(column)}; write the "
                "shards again."
            )
    # Of writers of text there are no sizes, and none of these in the index of JSON's.
    needed = [key for key in _COLUMN_KEYS if key != "column_sizes" or shard.get("format") == "mds"]
    if len({len(shard.get(key) or ()) for key in needed}) > 1:
        raise CorpusError(
            f"{name} must list as many {', '.join(needed)}, got others; write the shards again."
        )
    for key in ("format", "compression"):
        if not isinstance(shard.get(key), str | None):
            raise CorpusError(f"{name} must name its {key}, got {_short(shard[key])}.")


def require_hashes(name: str, hashes: Any) -> None:
    """Refuse what an index has as hashes of a file, if they are none.

    Raises:
        CorpusError: If they are not texts by name.
    """
    if hashes and not (
        isinstance(hashes, dict) and all(isinstance(told, str) for told in hashes.values())
    ):
        raise CorpusError(
            f"{name} must have hashes by their names, got {_short(hashes)}; write the shards again."
        )


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _short(value: Any) -> str:
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else type(value).__name__


def write_index(directory: PathLike, shards: Sequence[ShardInfo]) -> Path:
    """Write index.json so that a kill leaves either the old one or the new one."""
    path = Path(directory) / INDEX_NAME
    write_text(path, json.dumps({"version": INDEX_VERSION, "shards": list(shards)}, sort_keys=True))
    return path


def merge_indexes(out: PathLike, part_dirs: Sequence[PathLike]) -> int:
    """Write one index.json at `out` over the shards of directories below it.

    The parts keep their own index.json; shards stay where they are. The same parts in the same
    order give the same bytes, so that a digest of the index names the corpus.

    Args:
        out: Directory above all parts.
        part_dirs: Directories with an index.json each, in the order of their sample ids.

    Returns:
        Samples in the merged corpus.

    Raises:
        CorpusError: If a part lies outside `out`, lacks its index or a shard file, has other
            columns than the rest, or there are no samples at all.
    """
    root = Path(out).resolve()
    merged: list[ShardInfo] = []
    for part_dir in part_dirs:
        part = Path(part_dir).resolve()
        if root not in part.parents:
            raise CorpusError(
                f"part_dirs must lie below {str(root)!r}, got {str(part)!r}; "
                "an index names its shards by relative path."
            )
        prefix = PurePosixPath(part.relative_to(root).as_posix())
        for shard in read_index(part):
            moved = dict(shard)
            for key in _FILE_KEYS:
                if moved.get(key):
                    file = dict(moved[key])
                    file["basename"] = str(prefix / file["basename"])
                    moved[key] = file
            _require_files(root, moved)
            merged.append(moved)
    num_samples = sum(int(shard["samples"]) for shard in merged)
    if not num_samples:
        raise CorpusError(
            f"part_dirs must hold at least one sample, got none in {len(part_dirs)} parts; "
            "an empty corpus cannot be trained on."
        )
    columns_of(merged)
    write_index(root, merged)
    return num_samples


def unhashed_contents(corpus_dir: PathLike, remote: FileCache | None = None) -> tuple[str, ...]:
    """Hashes of what is in the shards of which the index has none, as streaming's writer leaves
    them by default: of these it says no more than how large they are.

    Args:
        corpus_dir: Directory with an index.json and the shards.
        remote: Fetches those shards, of which the directory then needs none.

    Returns:
        (num_shards,) in sample-id order, empty for shards that the index has hashes of, and for
        those that are there compressed only; () if there is none to tell.
    """
    shards = read_index(corpus_dir)
    found = []
    for shard in shards:
        file = shard.get("raw_data") or {}
        path = path_inside(INDEX_NAME, Path(corpus_dir), file.get("basename", "none"))
        if remote is not None and not file.get("hashes") and not shard.get("zip_data"):
            remote.file(file["basename"], file["bytes"])
        found.append("" if file.get("hashes") or not path.is_file() else content_hash(path))
    return tuple(found) if any(found) else ()


def digest_of(file: ShardInfo) -> tuple[str, str] | None:
    """The cheapest of the hashes that an index has of a file, by name; None if it has none that is
    known here."""
    hashes = {name: told for name, told in (file.get("hashes") or {}).items() if is_hash(name)}
    return min(hashes.items(), key=lambda one: (not one[0].startswith("xxh"), one), default=None)


def is_hash(name: str) -> bool:
    """Whether an index may have hashes of that name: one of hashlib or xxhash, of one length."""
    if name in xxhash.algorithms_available:
        return True
    return name in hashlib.algorithms_guaranteed and not name.startswith("shake_")


def content_hash(path: Path) -> str:
    """Hash of a file, as fast as it can be read, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def corpus_size(corpus_dir: PathLike) -> int:
    """Samples in a corpus.

    Raises:
        CorpusError: If the directory has no usable index.json.
    """
    return sum(int(shard["samples"]) for shard in read_index(corpus_dir))


def corpus_columns(corpus_dir: PathLike) -> dict[str, str]:
    """Column names of a corpus and how they are encoded, in alphabetical order.

    Raises:
        CorpusError: If the directory has no usable index.json, or its shards disagree.
    """
    return columns_of(read_index(corpus_dir))


def columns_of(shards: Sequence[ShardInfo]) -> dict[str, str]:
    """Columns that all of these shards have.

    Raises:
        CorpusError: If they disagree.
    """
    found: dict[str, str] | None = None
    for shard_id, shard in enumerate(shards):
        columns = shard.get("columns")
        if not isinstance(columns, dict):
            names, encodings = shard.get("column_names"), shard.get("column_encodings")
            columns = dict(zip(names or [], encodings or [], strict=True))
        if found is None:
            found = columns
        elif columns != found:
            raise CorpusError(
                f"shards must have the same columns, got {columns!r} in shard {shard_id} and "
                f"{found!r} before; merge corpora of one kind, or train on them as streams."
            )
    return dict(sorted((found or {}).items()))


def apportion_counts(
    sizes: IntArray, choose: int, *, granularity: int = 1, seed: int = 0
) -> IntArray:
    """Spread a stream's `choose` over its shards.

    Whole repeats go to every shard. The rest goes to shards in proportion to their size, in picks
    of `granularity` samples, by largest remainder. Streaming draws those picks at random, anew
    each epoch, with O(samples) memory; the totals are the same, ours vary less between shards,
    cost O(shards) and stay for the run: which samples fill a count is what is drawn anew.

    Args:
        sizes: (num_shards,) samples in each shard of the stream.
        choose: Samples that an epoch draws from the stream.
        granularity: Samples taken together from one shard (the last pick of a shard: fewer).
        seed: Decides ties, so that no shard is favoured for coming first.

    Returns:
        (num_shards,) counts that sum exactly to `choose`.

    Raises:
        ConfigError: If samples are asked for from a stream that has none.
    """
    num_samples = int(sizes.sum())
    if not num_samples:
        if choose:
            raise ConfigError(f"choose must be 0 for a stream without samples, got {choose!r}.")
        return np.zeros_like(sizes)
    repeats, rest = divmod(choose, num_samples)
    counts: IntArray = sizes * repeats
    if not rest:
        return counts
    picks = -(-sizes // granularity)
    tie = np.random.default_rng(seed).permutation(len(sizes))
    # A shard's last pick may be smaller than the others, so that the first guess can fall short.
    num_picks = -(-rest // granularity)
    while True:
        extra = np.minimum(_largest_remainder(picks, num_picks, tie) * granularity, sizes)
        short = rest - int(extra.sum())
        if short <= 0:
            break
        num_picks = min(num_picks - (-short // granularity), int(picks.sum()))
    for shard_id in np.argsort(-extra, kind="stable"):
        cut = min(-short, int(extra[shard_id]), granularity)
        extra[shard_id] -= cut
        short += cut
        if not short:
            break
    counts += extra
    return counts


def _largest_remainder(weights: IntArray, total: int, tie: IntArray) -> IntArray:
    whole: IntArray
    whole, remainder = np.divmod(weights * total, weights.sum())
    order = np.lexsort((tie, -remainder))
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def _require_files(root: Path, shard: ShardInfo) -> None:
    """Refuse a shard of which neither the raw nor the compressed files are there in full length."""
    kept = [
        [shard[key] for key in keys if shard.get(key)]
        for keys in (("raw_data", "raw_meta"), ("zip_data", "zip_meta"))
    ]
    if not any(files and all(_in_full(root, file) for file in files) for files in kept):
        name = shard["raw_data"]["basename"]
        raise CorpusError(
            f"shard {name!r} must be on disk in its full length, got a missing or a shorter file; "
            "write that part again."
        )


def _in_full(root: Path, file: ShardInfo) -> bool:
    path = root.joinpath(str(file["basename"]))
    return path.is_file() and path.stat().st_size == int(file["bytes"])
