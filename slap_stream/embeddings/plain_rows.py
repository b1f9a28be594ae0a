"""Rows of a Zarr array that lies uncompressed on local disk, read without Zarr.

Zarr takes 1 to 2 ms a read, however few the rows, in threads that wait for the interpreter's lock
in between; a thousand rows read from the file take 0.07 ms. Through a loader Zarr took a third to a
half of all CPU time of uniform batches.

Reference: Zarr core specification, version 3, and its sharding codec (ZEP 2).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import AlignmentError

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]
_DTYPES = ("float16", "float32", "int16", "int32")
# What an index gives as the place of a chunk that was never written, being all `fill_value`.
_MISSING = 2**64 - 1
# Says, among an array's attributes, that all of its chunks were written: one that is missing is no
# chunk of nothing but the fill value.
COMPLETE = "every_chunk_written"


class PlainRows:
    """An array of fixed-size rows, read by contiguous range; survives a fork, and any thread may.

    Args:
        directory: Of the array.
        shape: (rows, ...) of the array.
        dtype: Of its numbers.
        file_rows: Rows in each file.
        chunk_rows: Rows in each chunk of a file that begins with chunks and ends with an index of
            them; None: a file is one chunk.
        fill_value: What is in chunks and files that were never written; None: all were.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        file_rows: int,
        chunk_rows: int | None,
        fill_value: float | None,
    ) -> None:
        self._directory = directory
        self.shape, self.dtype = shape, dtype
        self._file_rows, self._chunk_rows, self._fill_value = file_rows, chunk_rows, fill_value
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """A copy of a contiguous range of rows.

        Raises:
            IndexError: If the slice has a step.
            AlignmentError: If a file is missing or shorter than it should be, or its index is
                damaged.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"slice step must be 1, got {step!r}; rows are read contiguously.")
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        while start < stop:
            number, first = divmod(start, self._file_rows)
            count = min(stop - start, self._file_rows - first)
            self._read_file(number, first, out[len(out) - (stop - start) :][:count])
            start += count
        return out

    def _read_file(self, number: int, first: int, out: NDArray[Any]) -> None:
        path = self._directory.joinpath("c", str(number), *["0"] * (len(self.shape) - 1))
        try:
            with open(path, "rb", 0) as file:
                if self._chunk_rows is None:
                    self._read(file, path, first * self._row_bytes, out)
                else:
                    self._read_chunks(file, path, first, out)
        except IsADirectoryError as error:
            raise AlignmentError(self._damaged(path, "a directory")) from error
        except FileNotFoundError as error:
            if self._fill_value is None:
                raise AlignmentError(self._damaged(path, "no file")) from error
            out[:] = self._fill_value

    def _read_chunks(self, file: BinaryIO, path: Path, first: int, out: NDArray[Any]) -> None:
        assert self._chunk_rows is not None
        # (chunks, 2): where each begins and how many bytes it has, then a checksum of the table.
        index = np.empty((self._file_rows // self._chunk_rows, 2), "<u8")
        checksum = np.empty(1, "<u4")
        size = file.seek(0, 2)
        self._read(file, path, size - index.nbytes - checksum.nbytes, index)
        self._read(file, path, size - checksum.nbytes, checksum)
        if google_crc32c.value(index.tobytes()) != checksum[0]:
            raise AlignmentError(self._damaged(path, "an index of another checksum"))
        chunk_bytes = self._chunk_rows * self._row_bytes
        at = 0
        while at < len(out):
            chunk, inside = divmod(first + at, self._chunk_rows)
            part = out[at : at + self._chunk_rows - inside]
            place, length = index[chunk].tolist()
            if place == length == _MISSING and self._fill_value is not None:
                part[:] = self._fill_value
            elif length == chunk_bytes and place + length <= size:
                self._read(file, path, place + inside * self._row_bytes, part)
            else:
                what = f"{length} bytes from {place} on for chunk {chunk}"
                raise AlignmentError(self._damaged(path, what))
            at += len(part)

    def _read(self, file: BinaryIO, path: Path, place: int, out: NDArray[Any]) -> None:
        view = out.data.cast("B")
        if place >= 0:
            file.seek(place)
            done = 0
            while done < len(view):
                read = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not read:
                    break
                done += read
            if done == len(view):
                return
        raise AlignmentError(self._damaged(path, f"fewer than {len(view)} bytes from {place} on"))

    def _damaged(self, path: Path, what: str) -> str:
        return (
            f"embeddings must be read as they were written, got {what} in {str(path)!r}; run "
            "slap-embed again."
        )


def plain_rows(directory: Path) -> PlainRows | None:
    """The array in a directory, if it is one that can be read without Zarr.

    Args:
        directory: Of a Zarr array on local disk, with its zarr.json.
    """
    about = json.loads((directory / "zarr.json").read_text())
    shape, grid = about.get("shape", []), about.get("chunk_grid", {})
    file_shape = grid.get("configuration", {}).get("chunk_shape", [])
    codecs, chunk_rows = about.get("codecs", []), None
    if len(codecs) == 1 and codecs[0].get("name") == "sharding_indexed":
        inner = codecs[0]["configuration"]
        chunk_shape, codecs = inner["chunk_shape"], inner["codecs"]
        fits = (
            inner.get("index_location", "end") == "end"
            and inner["index_codecs"] == _INDEX_CODECS
            and chunk_shape[1:] == file_shape[1:]
            and file_shape[0] % chunk_shape[0] == 0
        )
        if not fits:
            return None
        chunk_rows = int(chunk_shape[0])
    fits = (
        about.get("zarr_format") == 3
        and grid.get("name") == "regular"
        and about.get("chunk_key_encoding")
        == {"name": "default", "configuration": {"separator": "/"}}
        and about.get("data_type") in _DTYPES
        and codecs == [_BYTES]
        and not about.get("storage_transformers")
        and isinstance(about.get("fill_value"), int | float)
        and len(shape) >= 1
        and file_shape[1:] == shape[1:]
        and sys.byteorder == "little"
    )
    if not fits:
        return None
    return PlainRows(
        directory,
        shape=tuple(shape),
        dtype=np.dtype(about["data_type"]),
        file_rows=int(file_shape[0]),
        chunk_rows=chunk_rows,
        fill_value=None if about.get("attributes", {}).get(COMPLETE) else about["fill_value"],
    )
