"""Row stores over arrays in memory, and several stores stacked into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slap_stream.errors import AlignmentError
from slap_stream.types import BoolArray, IntArray, Rows, RowStore

# Rows that are read and thrown away to bridge two wanted ids: one more request costs about as much
# as reading this many rows (Zarr on a local disk).
BRIDGE_ROWS = 256
# Longest single read of `read_ids`, so that scattered ids do not pull a whole corpus into memory.
SPAN_ROWS = 16_384
_COLUMNS = ("embedding", "length", "feature", "source")


class RowSlices(Protocol):
    """An array that is only ever asked for its shape, its dtype and contiguous row slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...)."""
        ...

    @property
    def dtype(self) -> Any:
        """NumPy dtype, or its name."""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """Rows `start` to `stop` as anything NumPy can convert."""
        ...


def check_range(start: int, stop: int, num_samples: int) -> None:
    """Refuse a range that does not lie inside the store.

    Raises:
        IndexError: Unless 0 <= start <= stop <= num_samples.
    """
    if not 0 <= start <= stop <= num_samples:
        raise IndexError(
            f"range must lie inside [0, {num_samples}), got [{start}, {stop}); rows are sample ids."
        )


def plan_spans(sorted_ids: IntArray) -> list[tuple[int, int]]:
    """Cut ascending ids into few contiguous ranges that cover them.

    Args:
        sorted_ids: (n,) ascending.

    Returns:
        Half-open ranges in order, each at most `SPAN_ROWS` long, disjoint; ids less than
        `BRIDGE_ROWS` apart share one.
    """
    if not len(sorted_ids):
        return []
    cuts = np.flatnonzero(np.diff(sorted_ids) >= BRIDGE_ROWS) + 1
    spans = []
    for run in np.split(sorted_ids, cuts):
        at = 0
        while at < len(run):
            until = int(np.searchsorted(run, run[at] + SPAN_ROWS))
            spans.append((int(run[at]), int(run[until - 1]) + 1))
            at = until
    return spans


class ReadsIds:
    """Adds reading by id, in any order, to a store that reads ranges.

    Attributes:
        shape: (num_samples, dim).
        thread_safe: Whether several threads may read at the same time; nobody knows of a caller's
            arrays.
    """

    shape: tuple[int, int]
    thread_safe = False

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open), one contiguous read."""
        raise NotImplementedError

    def read_ids(self, ids: ArrayLike) -> Rows:
        """Rows of these samples, in the order asked; grouped into few contiguous reads.

        Args:
            ids: (n,) int64 sample ids, any order, repeats allowed.

        Returns:
            n rows; row i belongs to `ids[i]`.

        Raises:
            IndexError: If an id is outside the store.
        """
        wanted: IntArray = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= self.shape[0])]
        if len(outside):
            raise IndexError(
                f"ids must lie inside [0, {self.shape[0]}), got {outside[:5].tolist()} "
                f"({len(outside)} in all); rows are sample ids."
            )
        if not len(wanted):
            return self.read(0, 0)
        if np.all(wanted[1:] > wanted[:-1]):
            return self._read_ascending(wanted)
        unique, inverse = np.unique(wanted, return_inverse=True)
        return take(self._read_ascending(unique), inverse.reshape(-1))

    def _read_ascending(self, ids: IntArray) -> Rows:
        """Rows of (n,) ascending ids, none twice; one read is in memory besides the result."""
        spans = plan_spans(ids)
        if len(spans) == 1:
            start, stop = spans[0]
            rows = self.read(start, stop)
            return rows if len(ids) == stop - start else take(rows, ids - start)
        columns: dict[str, NDArray[Any]] = {}
        for start, stop in spans:
            part = self.read(start, stop)
            here = slice(int(np.searchsorted(ids, start)), int(np.searchsorted(ids, stop)))
            if here.stop - here.start < stop - start:
                part = take(part, ids[here] - start)
            for name in _COLUMNS:
                values = getattr(part, name)
                # Stacked stores may hand out half floats here and floats there.
                if name not in columns:
                    columns[name] = np.empty((len(ids), *values.shape[1:]), values.dtype)
                have = columns[name]
                if have.dtype != values.dtype:
                    columns[name] = have.astype(np.promote_types(have.dtype, values.dtype))
                columns[name][here] = values
        return Rows(**columns)


def take(rows: Rows, at: IntArray | BoolArray) -> Rows:
    """Rows at these positions (or under this mask)."""
    return Rows(**{name: getattr(rows, name)[at] for name in _COLUMNS})


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of all parts in order; at least one part, all of the same width."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _COLUMNS}
    return Rows(**columns)


class ArrayStore(ReadsIds):
    """A row store over arrays: NumPy, memory maps, Zarr arrays or anything sliced by rows.

    Args:
        embeddings: (num_samples, dim) floating; float64 is handed out as float32.
        lengths: (num_samples,) positive; None means ones.
        features: (num_samples, num_features) floating; None means no columns.
        sources: (num_samples,) integer index into `source_names`; None means one source.
        feature_names: Names of the columns; None means `feature_0`, `feature_1`, ...
        source_names: Names of the sources; None means `source_0`, ... as many as `sources` has.

    Attributes:
        shape: (num_samples, dim).
        dtype: Of the embeddings as they are handed out: float16 or float32.
        feature_names: Names of the feature columns, in order.
        source_names: Names of the sources; at least one.

    Raises:
        ValueError: If the arrays disagree on the number of samples, or names on that of columns.
        TypeError: If the embeddings are not floating point, or the sources not whole numbers.
    """

    def __init__(
        self,
        embeddings: RowSlices,
        *,
        lengths: RowSlices | None = None,
        features: RowSlices | None = None,
        sources: RowSlices | None = None,
        feature_names: Sequence[str] | None = None,
        source_names: Sequence[str] | None = None,
    ) -> None:
        shape = tuple(int(size) for size in embeddings.shape)
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(
                f"embeddings must be (num_samples, dim), got shape {shape!r}; one row per sample."
            )
        if np.dtype(embeddings.dtype).kind != "f":
            raise TypeError(
                f"embeddings must be floating point, got dtype {embeddings.dtype}; "
                "store them as float16 or float32."
            )
        self.shape = shape
        half = np.dtype(embeddings.dtype) == np.float16
        self.dtype: np.dtype[Any] = np.dtype(np.float16 if half else np.float32)
        self._embeddings = embeddings
        self._lengths = self._aligned("lengths", lengths, 1)
        self._features = self._aligned("features", features, 2)
        self._sources = self._aligned("sources", sources, 1)
        num_features = 0 if features is None else int(features.shape[1])
        if feature_names is None:
            feature_names = [f"feature_{column}" for column in range(num_features)]
        if len(feature_names) != num_features:
            raise ValueError(
                f"feature_names must name {num_features} columns, got {list(feature_names)!r}; "
                "one name per column of features."
            )
        self.feature_names = tuple(feature_names)
        self.source_names = self._checked_sources(source_names)

    def _aligned(self, name: str, array: RowSlices | None, ndim: int) -> RowSlices | None:
        if array is None:
            return None
        if len(array.shape) != ndim or int(array.shape[0]) != self.shape[0]:
            expected = f"({self.shape[0]}{',' if ndim == 1 else ', num_features'})"
            raise ValueError(
                f"{name} must have shape {expected}, got {tuple(array.shape)!r}; row i belongs to "
                "row i of the embeddings."
            )
        return array

    def _checked_sources(self, names: Sequence[str] | None) -> tuple[str, ...]:
        if self._sources is None:
            if names is not None and len(names) != 1:
                raise ValueError(
                    f"source_names must be one name without sources, got {list(names)!r}; pass "
                    "sources as well."
                )
            return tuple(names) if names else ("all",)
        if np.dtype(self._sources.dtype).kind not in "iu":
            raise TypeError(
                f"sources must be whole numbers, got dtype {self._sources.dtype}; they are "
                "indexes into source_names."
            )
        low, high = 0, -1
        for start in range(0, self.shape[0], SPAN_ROWS):
            part = np.asarray(self._sources[start : start + SPAN_ROWS])
            low, high = min(low, int(part.min())), max(high, int(part.max()))
        limit = np.iinfo(np.int16).max + 1 if names is None else len(names)
        if low < 0 or high >= limit:
            raise ValueError(
                f"sources must lie inside [0, {limit}), got values in [{low}, {high}]; they are "
                "indexes into source_names."
            )
        if names is None:
            return tuple(f"source_{index}" for index in range(max(high + 1, 1)))
        if not names:
            raise ValueError("source_names must not be empty, got []; name at least one source.")
        return tuple(names)

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open), one contiguous read per array.

        Raises:
            IndexError: If the range leaves the store.
            AlignmentError: If an array hands out another shape than it promised.
        """
        check_range(start, stop, self.shape[0])
        count, dim = stop - start, self.shape[1]
        embedding = np.asarray(self._embeddings[start:stop], dtype=self.dtype)
        if embedding.shape != (count, dim):
            raise AlignmentError(
                f"embeddings[{start}:{stop}] must have shape {(count, dim)!r}, got "
                f"{embedding.shape!r}; the array does not hold what its shape says."
            )
        feature: NDArray[Any] = np.zeros((count, 0), dtype=np.float32)
        if self._features is not None:
            feature = np.asarray(self._features[start:stop])
            if feature.dtype != np.float16:
                feature = feature.astype(np.float32)
        length = np.ones(count, dtype=np.int32)
        if self._lengths is not None:
            length = np.asarray(self._lengths[start:stop]).astype(np.int32)
        source = np.zeros(count, dtype=np.int16)
        if self._sources is not None:
            source = np.asarray(self._sources[start:stop]).astype(np.int16)
        return Rows(embedding=embedding, length=length, feature=feature, source=source)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """(rows, dim) embeddings of a contiguous slice."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"slice step must be 1, got {step!r}; rows are read contiguously.")
        return self.read(start, max(start, stop)).embedding


class StackedStore(ReadsIds):
    """Several stores read as one: the streams of a dataset, in stream order.

    Args:
        stores: At least one; sample ids of a store follow those of the stores before it. Sources
            of the same name are one source.

    Attributes:
        stores: The stores, in stream order.
        shape: (num_samples, dim).
        feature_names: Names of the feature columns, in order.
        source_names: Names of the sources of all stores, each once, in order of first appearance.
        thread_safe: Whether several threads may read at the same time.

    Raises:
        AlignmentError: If the stores differ in dimension or feature columns.
    """

    def __init__(self, stores: Sequence[RowStore]) -> None:
        if not stores:
            raise ValueError("stores must not be empty, got []; pass one store per stream.")
        self.stores = tuple(stores)
        first = self.stores[0]
        for position, store in enumerate(self.stores):
            if store.shape[1] != first.shape[1] or store.feature_names != first.feature_names:
                raise AlignmentError(
                    f"stores must share dimension and feature columns, got {first.shape[1]} and "
                    f"{list(first.feature_names)} for stream 0 but {store.shape[1]} and "
                    f"{list(store.feature_names)} for stream {position}; embed all streams with "
                    "the same encoder and options."
                )
        self._starts = np.cumsum([0, *(store.shape[0] for store in self.stores)])
        self.shape = int(self._starts[-1]), first.shape[1]
        self.thread_safe = all(store.thread_safe for store in self.stores)
        self.feature_names = first.feature_names
        names = dict.fromkeys(name for store in self.stores for name in store.source_names)
        self.source_names = tuple(names)
        index = {name: number for number, name in enumerate(names)}
        self._source_maps = [
            np.array([index[name] for name in store.source_names], dtype=np.int16)
            for store in self.stores
        ]

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open); one contiguous read per store touched.

        Raises:
            IndexError: If the range leaves the stores.
        """
        check_range(start, stop, self.shape[0])
        parts: list[Rows] = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for position in range(min(first, len(self.stores) - 1), len(self.stores)):
            offset, end = int(self._starts[position]), int(self._starts[position + 1])
            if parts and offset >= stop:
                break
            low, high = max(start, offset), max(min(stop, end), max(start, offset))
            if low > end:
                continue
            rows = self.stores[position].read(low - offset, high - offset)
            parts.append(replace(rows, source=self._source_maps[position][rows.source]))
        return concatenate(parts)


def as_row_store(embeddings: Any, lengths: Any, features: Any, sources: Any) -> RowStore:
    """The store that was given, or one over the arrays that were.

    Raises:
        AlignmentError: If arrays come with a store, which brings its own.
    """
    if hasattr(embeddings, "read_ids"):
        if any(extra is not None for extra in (lengths, features, sources)):
            raise AlignmentError(
                "lengths, features and sources must not be given with an EmbeddingStore; it "
                "brings its own."
            )
        store: RowStore = embeddings
        return store
    return ArrayStore(embeddings, lengths=lengths, features=features, sources=sources)
