"""What a conversion leaves in its work folder until it has ended, named and read back."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from slap_stream.core.files import read_json
from slap_stream.corpus.tally import Tally
from slap_stream.errors import CorpusError
from slap_stream.types import IntArray


def part_name(number: int) -> str:
    """Directory of a part inside the corpus."""
    return f"part-{number:05d}"


def piece_file(work_dir: Path, number: int, end: str) -> Path:
    """A file of the job that has read the pieces from this one on."""
    return work_dir / f"piece-{number:05d}{end}"


def piece_manifest(
    work_dir: Path, first: int, *, num_pieces: int, num_parts: int
) -> dict[str, Any] | None:
    """What `scatter` left of so many pieces from this one on; None if it has not ended.

    Raises:
        CorpusError: If something else is there.
    """
    path = piece_file(work_dir, first, ".json")
    manifest = read_json(path)
    if manifest is None:
        return None
    lengths = {"part_sizes": num_parts, "part_bytes": num_parts, "rows": num_pieces}
    for key, length in lengths.items():
        counts = manifest.get(key)
        require_ours(path, isinstance(counts, list) and len(counts) == length)
        require_ours(path, all(isinstance(n, int) and n >= 0 for n in manifest[key]))
    require_ours(path, Tally.is_one(manifest.get("tally")))
    return manifest


def part_manifest(work_dir: Path, out: Path, number: int) -> dict[str, Any] | None:
    """What `gather` left of a part; None if it has not ended, or its files are not as they were.

    Raises:
        CorpusError: If something else is there.
    """
    path = work_dir / f"{part_name(number)}.json"
    manifest = read_json(path)
    if manifest is None:
        return None
    files = manifest.get("files")
    require_ours(path, isinstance(files, dict) and Tally.is_one(manifest.get("tally")))
    require_ours(
        path, all("/" not in name and name not in ("", "..") for name in manifest["files"])
    )
    directory = out / part_name(number)
    for name, size in manifest["files"].items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return manifest


def records_of_runs(work_dir: Path, first: int, part: int) -> tuple[IntArray, int]:
    """(num_runs, num_parts) records of each run and part in a file, and the bytes of all of them.

    Raises:
        CorpusError: If the files do not fit together, or know no such part.
    """
    path, ends, data = (piece_file(work_dir, first, end) for end in (".npy", ".ends", ".bin"))
    try:
        # Mapped: what it says of its size is compared with the size that it has.
        counts = np.array(np.load(path, mmap_mode="r"))
    # NumPy takes a header that is none for one of Python 2, and tries to mend it.
    except (ValueError, EOFError, TypeError, LookupError, SyntaxError, TokenError) as error:
        raise _not_ours(path) from error
    require_ours(path, counts.ndim == 2 and counts.dtype == np.int64 and counts.min() >= 0)
    require_ours(path, counts.shape[1] > part and 8 * counts.sum() == ends.stat().st_size)
    return counts, data.stat().st_size


def require_ours(path: Path, ours: Any) -> None:
    """Refuse a file that is not as a conversion has left it.

    Raises:
        CorpusError: If it is not ours.
    """
    if not ours:
        raise _not_ours(path)


def _not_ours(path: Path) -> CorpusError:
    return CorpusError(
        f"{path.name} must be as slap-convert wrote it, got {str(path)!r}, which is not; delete "
        f"{str(path.parent)!r} and run the same again."
    )
