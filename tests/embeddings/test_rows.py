"""Stores over arrays hand out the right rows, and refuse arrays that do not fit."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.embeddings.rows import (
    BRIDGE_ROWS,
    SPAN_ROWS,
    ArrayStore,
    StackedStore,
    plan_spans,
)
from slap_stream.embeddings.store import open_embeddings
from slap_stream.errors import AlignmentError
from slap_stream.types import Rows
from tests.helpers.embed_rows import array_store, assert_rows_are, make_rows


@settings(max_examples=100, deadline=None)
@given(ids=st.sets(st.integers(0, 200_000), max_size=60))
def test_spans_cover_the_ids_and_waste_little(ids: set[int]) -> None:
    spans = plan_spans(np.array(sorted(ids), dtype=np.int64))
    covered = [i for i in ids if any(start <= i < stop for start, stop in spans)]
    assert len(covered) == len(ids)
    assert all(0 < stop - start <= SPAN_ROWS for start, stop in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert sum(stop - start for start, stop in spans) <= BRIDGE_ROWS * max(1, len(ids))


def test_neighbouring_ids_share_one_read() -> None:
    class Counting(ArrayStore):
        reads = 0

        def read(self, start: int, stop: int) -> Rows:
            self.reads += 1
            return super().read(start, stop)

    counting = Counting(np.zeros((10_000, 2), dtype=np.float32))
    counting.read_ids(np.r_[5_010:5_000:-1, 17, 3])
    assert counting.reads == 2


@pytest.mark.parametrize("bad", [[-1], [20], [3, 25, -4]])
def test_ids_outside_the_store_are_refused(bad: list[int]) -> None:
    with pytest.raises(IndexError, match=r"ids must lie inside \[0, 20\)"):
        array_store().read_ids(bad)


def test_an_array_store_defaults_to_one_source_and_length_one() -> None:
    rows = ArrayStore(np.ones((3, 2))).read(0, 3)
    assert rows.embedding.dtype == np.float32
    assert rows.length.tolist() == [1, 1, 1]
    assert rows.feature.shape == (3, 0)
    assert rows.source.tolist() == [0, 0, 0]


def test_an_array_store_takes_memory_maps_zarr_arrays_and_virtual_ones(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.save(tmp_path / "e.npy", values)

    class Virtual:
        shape = (10, 4)
        dtype = "float32"

        def __getitem__(self, rows: slice) -> np.ndarray:
            return values[rows]

    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    chunked = zarr.create_array(tmp_path / "e.zarr", data=values, chunks=(3, 4))
    for array in (values, mapped, chunked, Virtual()):
        opened = open_embeddings(array)
        assert opened.shape == (10, 4)
        np.testing.assert_array_equal(opened.read(2, 9).embedding, values[2:9])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embeddings": np.zeros(3)}, ValueError, r"embeddings must be \(num_samples, dim\)"),
        ({"embeddings": np.zeros((3, 2), int)}, TypeError, "embeddings must be floating point"),
        ({"lengths": np.ones(4)}, ValueError, r"lengths must have shape \(3,\), got \(4,\)"),
        ({"features": np.ones(3)}, ValueError, r"features must have shape \(3, num_features\)"),
        ({"sources": np.ones(3)}, TypeError, "sources must be whole numbers"),
        ({"sources": np.array([0, 1, -1])}, ValueError, r"sources must lie inside \[0, 32768\)"),
        (
            {"sources": np.array([0, 1, 2]), "source_names": ["a", "b"]},
            ValueError,
            r"sources must lie inside \[0, 2\), got values in \[0, 2\]",
        ),
        ({"source_names": ["a", "b"]}, ValueError, "source_names must be one name without"),
        ({"feature_names": ["a"]}, ValueError, "feature_names must name 0 columns"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given_arguments = {"embeddings": np.zeros((3, 2))} | arguments
    with pytest.raises(error, match=message):
        ArrayStore(given_arguments.pop("embeddings"), **given_arguments)


def test_an_array_that_lies_about_its_shape_is_refused() -> None:
    class Lying:
        shape = (10, 4)
        dtype = np.dtype(np.float32)

        def __getitem__(self, rows: slice) -> np.ndarray:
            return np.zeros((1, 4), dtype=np.float32)

    with pytest.raises(AlignmentError, match=r"embeddings\[0:5\] must have shape \(5, 4\)"):
        ArrayStore(Lying()).read(0, 5)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_stacked_stores_read_like_one(sizes: list[int], bounds: tuple[int, int]) -> None:
    stores, first = [], 0
    for size in sizes:
        rows = make_rows(size, first=first)
        stores.append(
            ArrayStore(
                rows.embedding,
                lengths=rows.length,
                features=rows.feature,
                sources=rows.source,
                feature_names=("up", "down"),
                source_names=("a", "b", "c"),
            )
        )
        first += size
    stacked = StackedStore(stores)
    start, stop = sorted(min(bound, first) for bound in bounds)
    assert stacked.shape == (first, 4)
    assert_rows_are(stacked.read(start, stop), np.arange(start, stop))


def test_sources_of_stacked_stores_are_matched_by_name() -> None:
    def one(names: list[str]) -> ArrayStore:
        return ArrayStore(np.zeros((2, 1)), sources=np.array([0, 1]), source_names=names)

    stacked = StackedStore([one(["a", "b"]), one(["b", "c"])])
    assert stacked.source_names == ("a", "b", "c")
    assert stacked.read(0, 4).source.tolist() == [0, 1, 1, 2]


def test_stores_of_different_encoders_cannot_be_stacked() -> None:
    with pytest.raises(AlignmentError, match="stores must share dimension and feature columns"):
        StackedStore([ArrayStore(np.zeros((2, 3))), ArrayStore(np.zeros((2, 4)))])
    with pytest.raises(ValueError, match="stores must not be empty"):
        StackedStore([])


def test_importing_stores_does_not_import_zarr() -> None:
    code = "import sys, slap_stream.embeddings.rows; sys.exit('zarr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
