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
from zarr.codecs import ZstdCodec

from slap_stream.embeddings.plain_rows import COMPLETE, PlainRows, plain_rows
from slap_stream.errors import AlignmentError


def write(path: Path, values: Any, *, chunk: int, shard: int | None, **options: Any) -> zarr.Array:
    tail = values.shape[1:]
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *tail),
        shards=None if shard is None else (shard, *tail),
        **({"compressors": None} | options),
    )
    array[:] = values
    return array


def read(path: Path) -> PlainRows:
    found = plain_rows(path)
    assert found is not None
    return found


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 60),
    tail=st.sampled_from([(), (3,)]),
    chunk=st.integers(1, 8),
    chunks=st.one_of(st.none(), st.integers(1, 4)),
    dtype=st.sampled_from(["float16", "float32", "int16", "int32"]),
    fill=st.sampled_from([0, 7]),
    blank=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    cut=st.tuples(st.integers(-70, 70), st.integers(-70, 70)),
)
def test_rows_are_those_that_zarr_reads(
    rows: int,
    tail: tuple[int, ...],
    chunk: int,
    chunks: int | None,
    dtype: str,
    fill: int,
    blank: tuple[int, int],
    cut: tuple[int, int],
) -> None:
    values = np.random.default_rng(rows).integers(1, 99, (rows, *tail)).astype(dtype)
    # Chunks and files of nothing but the fill value are not written at all.
    values[slice(*sorted(blank))] = fill
    with tempfile.TemporaryDirectory() as folder:
        shard = None if chunks is None else chunk * chunks
        array = write(Path(folder, "a"), values, chunk=chunk, shard=shard, fill_value=fill)
        found = read(Path(folder, "a"))
        assert (found.shape, found.dtype) == (values.shape, values.dtype)
        np.testing.assert_array_equal(found[slice(*cut)], np.asarray(array[slice(*cut)]))
        np.testing.assert_array_equal(found[0:rows], values)


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": ZstdCodec(level=1)},
        {"fill_value": float("nan")},
        {"dimension_names": None, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    ],
    ids=["packed", "odd fill", "other names"],
)
def test_what_is_not_plain_is_left_to_zarr(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "a", np.ones((20, 3), np.float32), chunk=4, shard=None, **options)
    assert plain_rows(tmp_path / "a") is None


def test_rows_that_are_cut_into_columns_are_left_to_zarr(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(20, 4), dtype="float32", chunks=(5, 2), compressors=None
    )
    array[:] = 1.0
    assert plain_rows(tmp_path / "a") is None


def test_a_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", np.ones(20, np.int32), chunk=4, shard=8)
    with pytest.raises(IndexError, match="slice step must be 1, got 2"):
        read(tmp_path / "a")[::2]


def test_a_file_that_must_be_there_and_is_not_is_told(tmp_path: Path) -> None:
    values = np.zeros(20, np.int32)
    options: dict[str, Any] = {"config": {"write_empty_chunks": True}}
    write(tmp_path / "a", values, chunk=4, shard=8, attributes={COMPLETE: True}, **options)
    found = read(tmp_path / "a")
    np.testing.assert_array_equal(found[:], values)
    (tmp_path / "a" / "c" / "1").unlink()
    np.testing.assert_array_equal(found[0:8], values[:8])
    with pytest.raises(AlignmentError, match=r"got no file in '.*c/1'; run slap-embed again"):
        found[4:16]
    (tmp_path / "a" / "c" / "1").mkdir()
    with pytest.raises(AlignmentError, match="got a directory in"):
        found[4:16]


@settings(max_examples=15, deadline=None)
@given(at=st.integers(1, 2 * 16 + 4), bit=st.integers(0, 7))
def test_an_index_of_which_a_bit_was_flipped_is_told(at: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "a"), np.arange(1, 21, dtype=np.int32), chunk=4, shard=8)
        file = Path(folder, "a", "c", "0")
        content = bytearray(file.read_bytes())
        content[-at] ^= 1 << bit
        file.write_bytes(content)
        with pytest.raises(AlignmentError, match="got an index of another checksum in"):
            read(Path(folder, "a"))[0:8]


@pytest.mark.parametrize(("shard", "keep"), [(8, 10), (8, -30), (None, 5)])
def test_a_file_that_was_cut_is_told(tmp_path: Path, shard: int | None, keep: int) -> None:
    write(tmp_path / "a", np.arange(1, 21, dtype=np.int32), chunk=4, shard=shard)
    found = read(tmp_path / "a")
    file = tmp_path / "a" / "c" / "1"
    file.write_bytes(file.read_bytes()[:keep])
    np.testing.assert_array_equal(found[0:4], [1, 2, 3, 4])
    with pytest.raises(AlignmentError, match=r"as they were written, got .* in '.*c/1'; run slap-"):
        found[4:16]
