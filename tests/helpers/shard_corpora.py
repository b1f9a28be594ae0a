"""Small corpora on disk, and datasets over them, for the tests of the shard modules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter, Stream, StreamingDataset

COLUMNS = {"id": "str", "messages": "json", "input_ids": "ndarray:int32"}


def sample(number: int) -> dict[str, Any]:
    return {
        "id": f"r-{number}",
        "messages": [{"role": "text", "content": "x" * (number * 7 % 50)}],
        "input_ids": np.arange(number % 5 + 1, dtype=np.int32),
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def write_corpus(
    path: Path,
    sizes: list[int],
    *,
    first: int = 0,
    compression: str | None = None,
    hashes: tuple[str, ...] = ("xxh64",),
) -> Path:
    """Stock MDS shards of exactly these sizes; sample i has number `first + i`."""
    writer = MDSWriter(
        columns=COLUMNS,
        out=str(path),
        compression=compression,
        hashes=list(hashes),
        size_limit=None,
    )
    with writer:
        number = first
        for size in sizes:
            for _ in range(size):
                writer.write(sample(number))
                number += 1
            writer.flush_shard()
            writer._reset_cache()
        # Otherwise the stock writer sleeps for a second before it writes the index.
        while writer.executor._work_queue.qsize():
            time.sleep(0.001)
    return path


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one byte without changing the size."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))


class FlakyStream(Stream):
    """Fails the first `failures` downloads of shards with an error."""

    def __init__(self, *, failures: int, error: Exception, **kwargs: Any) -> None:
        super().__init__(download_retry=1, **kwargs)
        self.error = error
        # A list, so that the fetcher's copies of the stream count together.
        self.left = [failures]

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        if from_basename != "index.json" and self.left[0] > 0:
            self.left[0] -= 1
            raise self.error
        return super()._download_file(from_basename, to_basename)


class Doubling(StreamingDataset):
    """Does its work in `__getitem__`, as users' datasets do."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return {"id": found["id"], "twice": found["input_ids"] * 2}


class Numbering(StreamingDataset):
    """Overrides the raw read itself."""

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        return {"number": int(sample_id), **super().get_item(sample_id, retry)}


def shard_files(path: Path) -> Iterator[Path]:
    return iter(sorted(p for p in path.iterdir() if p.name.startswith("shard.")))
