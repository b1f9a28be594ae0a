"""Rows of a Zarr array whose chunks lie in files of plain bytes, read from these files.

Zarr takes 1 to 2 ms a read, however few the rows, in threads that wait for the interpreter's lock
in between; through a loader that was a third to a half of all CPU time of uniform batches. Eight
reads of 1,000 rows of 384 half floats take 15 times as long through Zarr as here, eight of 20 rows
20 times, whatever the chunks (256 to 16,384 rows, in shards or not: the best of them). Memory maps
take 2 and 4 times as long: each has to be made and unmade.

Reference: Zarr core specification, version 3: a regular grid of chunks, codec `bytes`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.files import leads_inside
from slap_stream.errors import AlignmentError


def chunk_path(directory: Path, chunk: int, num_axes: int) -> Path:
    """The file of a chunk of whole rows, as Zarr names it."""
    return directory.joinpath("c", str(chunk), *["0"] * (num_axes - 1))


def _on_disk(path: Path) -> BinaryIO:
    return open(path, "rb")


class PlainRows:
    """An array of fixed-size rows, read by contiguous range; survives a fork, and any thread may.

    Args:
        directory: Of the array; its chunks are whole rows, all of them written.
        shape: (rows, ...) of the array.
        dtype: Of its numbers.
        chunk_rows: Rows in each chunk, which is a file.
        opened: Opens a file of the array, given its path; None: as one on disk.

    Attributes:
        shape: The same.
        dtype: The same.
        chunk_bytes: Size of each file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunk_rows: int,
        opened: Callable[[Path], BinaryIO] | None = None,
    ) -> None:
        self._directory = directory
        self._opened = opened or _on_disk
        self.shape, self.dtype = shape, dtype
        self._chunk_rows = chunk_rows
        # Chunks that are known to lie in the store, and not elsewhere by a link.
        self._inside: set[int] = set()
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self.chunk_bytes = chunk_rows * self._row_bytes

    @property
    def num_files(self) -> int:
        """Of all rows; however many they claim to be."""
        return -(-self.shape[0] // self._chunk_rows)

    def files(self, start: int, stop: int) -> list[Path]:
        """Files that rows `start` to `stop` are in."""
        chunks = range(start // self._chunk_rows, -(-stop // self._chunk_rows))
        return [chunk_path(self._directory, chunk, len(self.shape)) for chunk in chunks]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """A copy of a contiguous range of rows.

        Raises:
            IndexError: If the slice has a step.
            AlignmentError: If a file is missing or shorter than it should be.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"slice step must be 1, got {step!r}; rows are read contiguously.")
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        at = 0
        while at < len(out):
            chunk, first = divmod(start + at, self._chunk_rows)
            part = out[at : at + self._chunk_rows - first]
            self._read(chunk, first, part)
            at += len(part)
        return out

    def _read(self, chunk: int, first: int, out: NDArray[Any]) -> None:
        path = chunk_path(self._directory, chunk, len(self.shape))
        if chunk not in self._inside:
            # Once a chunk, since following all parts of a path takes longer than a small read.
            if not leads_inside(self._directory.parent, path):
                raise AlignmentError(
                    f"embeddings must lie in {str(self._directory.parent)!r}, got {str(path)!r}, "
                    f"a link to {os.path.realpath(path)!r}; copy that file there."
                )
            self._inside.add(chunk)
        try:
            with self._opened(path) as file:
                file.seek(first * self._row_bytes)
                num_bytes = file.readinto(out.data.cast("B"))  # type: ignore[attr-defined]
            found = f"{num_bytes} of {out.nbytes} bytes"
        except (FileNotFoundError, IsADirectoryError) as error:
            found, num_bytes = str(error.strerror), 0
        if num_bytes < out.nbytes:
            raise AlignmentError(
                f"embeddings must be read as they were written, got {found} of rows {first} to "
                f"{first + len(out)} in {str(path)!r}; run slap-embed again."
            )
