"""Raw samples of a corpus on local disk, in the order of their ids."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.errors import CorpusError
from slap_stream.shards.index import PathLike, read_index
from slap_stream.shards.library import Reader, decompress, reader_from_json


def iter_corpus(
    corpus_dir: PathLike, start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Raw samples of a corpus on local disk, in sample-id order.

    Shards of which only the compressed files are there are unpacked into a temporary directory,
    one at a time; the corpus is not changed.

    Args:
        corpus_dir: Directory with an index.json.
        start: First sample id.
        stop: Sample id to stop before; None reads to the end.

    Yields:
        Samples as dicts of their columns.

    Raises:
        CorpusError: If the index is missing or unusable, the range is not inside the corpus, a
            shard is missing, or a column would have to be unpickled.
    """
    directory = Path(corpus_dir)
    index = read_index(directory)
    sizes = np.array([shard["samples"] for shard in index], np.int64)
    num_samples = int(sizes.sum())
    stop = num_samples if stop is None else stop
    if not 0 <= start <= stop <= num_samples:
        raise CorpusError(
            f"range must lie inside [0, {num_samples}), got [{start}, {stop}) in "
            f"{str(directory)!r}."
        )
    first_id = np.cumsum(sizes) - sizes
    for shard_id in range(len(index)):
        low = max(start - int(first_id[shard_id]), 0)
        high = min(stop - int(first_id[shard_id]), int(sizes[shard_id]))
        if low >= high:
            continue
        try:
            reader = reader_from_json(str(directory), None, index[shard_id])
            reader.validate(allow_unsafe_types=False)
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(
                f"shard {shard_id} of {str(directory)!r} must be readable without unpickling, got "
                f"an entry in index.json of which streaming says: {error}"
            ) from error
        with ExitStack() as stack:
            _unpack(directory, reader, stack)
            for row in range(low, high):
                yield reader[row]


def _unpack(directory: Path, reader: Reader, stack: ExitStack) -> None:
    """Point the reader at raw files: its own, or unpacked ones that live as long as the stack."""
    raw = [directory / info.basename for info, _ in reader.file_pairs]
    if all(path.is_file() for path in raw):
        for path, (info, _) in zip(raw, reader.file_pairs, strict=True):
            if path.stat().st_size != info.bytes:
                raise CorpusError(
                    f"shard {path.name!r} must have the {info.bytes} bytes that index.json says, "
                    f"got {path.stat().st_size}; fetch it or write the corpus again."
                )
        return
    packed = [directory / info.basename for _, info in reader.file_pairs if info is not None]
    if len(packed) != len(raw) or not all(path.is_file() for path in packed):
        missing = next(path for path in raw if not path.is_file())
        raise CorpusError(
            f"shards of {str(directory)!r} must be on local disk, got no {missing.name!r}; "
            "download the corpus first, or write it again."
        )
    unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slap-shard-")))
    for (info, _), path in zip(reader.file_pairs, packed, strict=True):
        target = unpacked / info.basename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(decompress(reader.compression, path.read_bytes()))
    reader.dirname, reader.split = str(unpacked), ""
