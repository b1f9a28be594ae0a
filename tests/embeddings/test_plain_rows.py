"""Rows read without Zarr are those that Zarr reads, and damaged files are told."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.embeddings.plain_rows import PlainRows
from slap_stream.errors import AlignmentError


def write(path: Path, values: Any, *, chunk: int) -> PlainRows:
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        compressors=None,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return PlainRows(path, shape=values.shape, dtype=values.dtype, chunk_rows=chunk)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 60),
    tail=st.sampled_from([(), (3,)]),
    chunk=st.integers(1, 70),
    dtype=st.sampled_from(["float16", "float32", "int16", "int32"]),
    blank=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    cut=st.tuples(st.integers(-70, 70), st.integers(-70, 70)),
)
def test_rows_are_those_that_zarr_reads(
    rows: int,
    tail: tuple[int, ...],
    chunk: int,
    dtype: str,
    blank: tuple[int, int],
    cut: tuple[int, int],
) -> None:
    values = np.random.default_rng(rows).integers(1, 99, (rows, *tail)).astype(dtype)
    # Chunks of nothing but the fill value are written as others are.
    values[slice(*sorted(blank))] = 0
    with tempfile.TemporaryDirectory() as folder:
        found = write(Path(folder, "a"), values, chunk=chunk)
        array = zarr.open_array(Path(folder, "a"), mode="r")
        np.testing.assert_array_equal(found[slice(*cut)], np.asarray(array[slice(*cut)]))
        np.testing.assert_array_equal(found[0:rows], values)


def test_a_step_is_refused(tmp_path: Path) -> None:
    found = write(tmp_path / "a", np.ones(20, np.int32), chunk=8)
    with pytest.raises(IndexError, match="slice step must be 1, got 2"):
        found[::2]


def test_a_file_that_is_missing_or_cut_is_told(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.int32)
    found = write(tmp_path / "a", values, chunk=8)
    file = tmp_path / "a" / "c" / "1"
    file.write_bytes(file.read_bytes()[:10])
    np.testing.assert_array_equal(found[0:10], values[:10])
    with pytest.raises(AlignmentError, match=r"got 10 of 32 bytes of rows 0 to 8 in '.*c/1'; run"):
        found[4:20]
    with pytest.raises(AlignmentError, match="got 0 of 8 bytes of rows 6 to 8"):
        found[14:16]
    file.unlink()
    with pytest.raises(AlignmentError, match=r"got No such file or directory of rows 0 to 8 in"):
        found[4:16]
    file.mkdir()
    with pytest.raises(AlignmentError, match="got Is a directory of rows"):
        found[4:16]


def test_files_are_counted_however_many_are_claimed(tmp_path: Path) -> None:
    for count in (0, 1, 49, 50, 51):
        rows = PlainRows(tmp_path, shape=(count, 2), dtype=np.dtype(np.int16), chunk_rows=50)
        assert rows.num_files == len(rows.files(0, count))
    claimed = PlainRows(tmp_path, shape=(1 << 60,), dtype=np.dtype(np.int16), chunk_rows=1)
    assert claimed.num_files == 1 << 60
