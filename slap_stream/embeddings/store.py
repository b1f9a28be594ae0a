"""`embeddings.zarr`: embeddings, lengths, features and sources; row i belongs to sample id i."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from slap_stream.core.checks import require_whole
from slap_stream.core.files import read_json, sync_new, write_json
from slap_stream.core.room import require_room, told_when_full
from slap_stream.core.work_dir import LOCK_NAME, PLAN_NAME, claimed, remove
from slap_stream.embeddings.layout import (
    FORMAT_VERSION,
    METADATA_NAME,
    StoreLayout,
    attributes_in,
    require_embeddings,
)
from slap_stream.embeddings.plain_rows import PlainRows, chunk_path
from slap_stream.embeddings.remote_store import StoreFiles
from slap_stream.embeddings.rows import ArrayStore, StackedStore, check_range
from slap_stream.errors import AlignmentError, CorpusError
from slap_stream.remote.cache import CACHE_BYTES
from slap_stream.remote.urls import is_remote
from slap_stream.shards.index import content_hash
from slap_stream.types import Rows, RowStore

# In the folder of a half-written store: the store itself, and a mark for each block that is done.
_STORE, _MARK = "store", "block"


# What Zarr, or the reading of what its metadata says, raises where that says nonsense.
_OF_ZARR = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, NotImplementedError),
)
# Kinds of numbers, and axes, of the arrays that are read.
_COLUMNS = {"embedding": ("f", 2), "length": ("iu", 1), "feature": ("f", 2), "source": ("iu", 1)}


class EmbeddingWriter:
    """Writes a store block by block, in any order, from any number of processes.

    The store grows in a folder beside its final name (`NAME.partial`) and is moved when it is
    whole, so that what has the final name can always be used. A block is marked after it is
    written; after a kill, blocks without a mark are written again. Pickles, so that worker
    processes can `write`.

    State, all on disk: the arrays, their attributes, and the marks.

    Args:
        path: Where the finished store will be.
        layout: What is written; a half-written store of another layout is refused.

    Attributes:
        layout: The same.
    """

    def __init__(self, path: str | os.PathLike[str], layout: StoreLayout) -> None:
        self._path = Path(path)
        self.layout = layout
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._growing = self._partial / _STORE

    def is_finished(self) -> bool:
        """Whether the store is there already, whole.

        Raises:
            CorpusError: If a store of another layout is there.
        """
        if not self._path.exists():
            return False
        self._refuse_what_is_not_ours()
        self.layout.require_same(_attributes_at(self._path), str(self._path))
        return True

    @contextmanager
    def open(self, *, overwrite: bool = False) -> Iterator[list[int]]:
        """Create the store or go on with a half-written one; finish it at the end of the `with`.

        Args:
            overwrite: Replace a finished store, and a half-written one of another layout.

        Yields:
            Blocks that are still to be written.

        Raises:
            CorpusError: If something else is in the way, another process is writing, or blocks
                are missing at the end.
        """
        if self._path.exists() and not overwrite:
            raise CorpusError(
                f"embeddings must not exist yet, got {str(self._path)!r}; pass overwrite to "
                "replace them."
            )
        self._refuse_what_is_not_ours()
        with claimed(
            self._partial,
            self.layout.plan(),
            result=self._path,
            name="embeddings",
            overwrite=overwrite,
        ):
            if not self._growing.exists():
                self._create()
            blocks = self._missing()
            # Zarr fills the last file up.
            num_bytes = len(blocks) * self.layout.rows_per_chunk * self.layout.row_bytes
            require_room("embeddings", self._path, num_bytes, exact=True)
            with told_when_full("embeddings", self._partial, num_bytes):
                yield blocks
            missing = self._missing()
            if missing:
                raise CorpusError(
                    f"all {self.layout.num_blocks} blocks must be written, got {len(missing)} "
                    "missing; run again to go on."
                )
            self._note_hashes()
            if self._path.exists():
                shutil.rmtree(self._path)
            self._growing.rename(self._path)
            remove(self._partial)

    def _missing(self) -> list[int]:
        return [n for n in range(self.layout.num_blocks) if not self._mark(n).exists()]

    def _mark(self, block: int) -> Path:
        return self._partial / f"{_MARK}-{block:06d}.json"

    def note(self, **attributes: Any) -> None:
        """Put down further attributes, of kinds that JSON has, of the store being written."""
        zarr.open_group(self._growing, mode="r+", zarr_format=3).attrs.update(attributes)

    def _note_hashes(self) -> None:
        """Put down what is in the files, for those who fetch them; as the marks have it."""
        marks = [read_json(self._mark(block)) or {} for block in range(self.layout.num_blocks)]
        found: list[dict[str, str]] = [mark.get("hashes", {}) for mark in marks]
        # Marks of an earlier version have none.
        if all(found):
            self.note(file_hashes={name: [one[name] for one in found] for name in found[0]})

    def _refuse_what_is_not_ours(self) -> None:
        """Only what a writer of this class made is ever deleted.

        Raises:
            CorpusError: If the store's place, or that of the half-written one, holds something
                else.
        """
        if self._path.exists():
            require_embeddings(_attributes_at(self._path), str(self._path))
        inside = {path.name for path in self._partial.glob("*")}
        ours = (LOCK_NAME, PLAN_NAME, _STORE, _MARK)
        if any(not name.startswith(ours) for name in inside) or (
            inside and LOCK_NAME not in inside
        ):
            raise CorpusError(
                f"half-written embeddings go to {str(self._partial)!r}, which must be free, got "
                f"{sorted(inside)[:5]} there; choose another place or move them away."
            )

    def _create(self) -> None:
        layout = self.layout
        for mark in self._partial.glob(f"{_MARK}-*"):
            mark.unlink()
        # Renamed when all arrays are there: a kill before leaves none.
        unfinished = self._partial / f"{_STORE}.new"
        group = zarr.create_group(
            unfinished, zarr_format=3, attributes=layout.attributes(), overwrite=True
        )
        absent = {"feature": not layout.feature_names, "source": not layout.source_names}
        for name, (dtype, tail) in layout.columns().items():
            if absent.get(name):
                continue
            group.create_array(
                name,
                shape=(layout.num_samples, *tail),
                dtype=dtype,
                # A file each, of plain bytes. Half floats hardly compress, and the rest is little.
                chunks=(layout.rows_per_chunk, *tail),
                compressors=None,
            )
        for described in unfinished.rglob("zarr.json"):
            sync_new(described, unfinished)
        unfinished.rename(self._growing)

    def write(self, block: int, rows: Rows) -> None:
        """Write one whole block, and its mark when it is there.

        Raises:
            CorpusError: If the rows are not as many as the block has, or hold what is not finite.
        """
        start, stop = self.layout.block(block)
        columns = self.layout.columns()
        # An array takes its setting when it is opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(self._growing, mode="r+", zarr_format=3)
            arrays = {name: array for name, array in group.arrays() if name in columns}
        hashes = {}
        for name, (_, tail) in columns.items():
            values, shape = np.asarray(getattr(rows, name)), (stop - start, *tail)
            if values.shape != shape:
                raise CorpusError(
                    f"{name} of block {block} must have shape {shape!r}, got {values.shape!r}; "
                    "one row per sample of the block."
                )
            if name in arrays:
                arrays[name][start:stop] = (
                    _half(name, values, start) if values.ndim == 2 else values
                )
                # Before the mark, which would outlive them when the power fails.
                directory = self._growing / name
                file = chunk_path(directory, block, values.ndim)
                sync_new(file, directory)
                hashes[name] = content_hash(file)
        write_json(self._mark(block), {"rows": [start, stop], "hashes": hashes})


def _half(name: str, values: NDArray[Any], start: int) -> NDArray[np.float16]:
    """As float16; what is not finite, or becomes so, is refused by sample id."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if len(bad):
        raise CorpusError(
            f"{name} must be finite and below 65504 in size, got other values for samples "
            f"{(bad[:5] + start).tolist()} ({len(bad)} in this block); check the encoder or the "
            "reference model on them, in float32."
        )
    return half


def _attributes_at(path: Path) -> dict[str, Any]:
    """What the group there says about itself, be it a store of another version; {} if no group."""
    try:
        return attributes_in((path / METADATA_NAME).read_bytes())
    except OSError:
        return {}


class EmbeddingStore(ArrayStore):
    """A finished `embeddings.zarr`, read by contiguous ranges; pickles as its path.

    Of one elsewhere the files that hold the rows asked for are fetched whole, checked, and kept as
    far as `cache_bytes` allows; they are then read as local ones are.

    Args:
        path: Directory of the Zarr group, or its URL.
        cache_dir: Folder for the files of a URL, on a local disk; None: one of this user's in the
            one for temporary files. Processes of a machine share it.
        cache_bytes: What they may take.

    Attributes:
        path: The first, as a text if it is a URL.
        attributes: All that the group says about itself; see `StoreLayout.attributes`.
        length_unit: `tokens`, or `characters / 4`.
        index_digest: `file_digest` of the index.json of the dataset that was embedded.
        encoder: Name, version and dimension of the encoder.
        shard_hashes: (num_shards,) of the dataset that was embedded; empty where its index has
            hashes of its own, and () where it has of all, or where an earlier version made this.

    Raises:
        AlignmentError: If there is no finished store.
    """

    # Files, opened for each read.
    thread_safe = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._files: StoreFiles | None = None
        if is_remote(path):
            self._files = StoreFiles(path, cache_dir, require_whole("cache_bytes", cache_bytes, 1))
        self.path: Path | str = Path(path) if self._files is None else self._files.url
        self._folder = Path(path) if self._files is None else self._files.folder
        if not self._folder.exists():
            growing = self._folder.with_name(self._folder.name + ".partial")
            half = f" ({growing.name} is half-written)" if growing.exists() else ""
            raise AlignmentError(
                f"embeddings must be an existing embeddings.zarr, got {str(self.path)!r}, which "
                f"does not exist{half}; run slap-embed on the corpus."
            )
        try:
            group = zarr.open_group(self._folder, mode="r", zarr_format=3)
        except _OF_ZARR as error:
            raise AlignmentError(self._not_a_store(str(error))) from error
        self.attributes: dict[str, Any] = dict(group.attrs)
        found = self.attributes.get("format_version")
        if found != FORMAT_VERSION:
            raise AlignmentError(
                self._not_a_store(f"format_version {found!r}, not {FORMAT_VERSION}")
            )
        try:
            self._open(dict(group.arrays()))
        except AlignmentError:
            raise
        except _OF_ZARR as error:
            raise AlignmentError(self._not_a_store(f"{type(error).__name__}: {error}")) from error

    def _open(self, arrays: dict[str, Any]) -> None:
        said = self.attributes
        names, features = said["source_names"], said["feature_names"]
        self.length_unit, self.index_digest = str(said["length_unit"]), str(said["index_digest"])
        self.encoder: dict[str, Any] = dict(said["encoder"])
        self.shard_hashes = tuple(map(str, said.get("shard_hashes", ())))
        needed = {"embedding": True, "length": True, "source": names, "feature": features}
        for name, wanted in needed.items():
            if wanted and name not in arrays:
                raise AlignmentError(self._not_a_store(f"no array {name}"))
        columns = {
            name: self._plain_rows(name, array) for name, array in arrays.items() if name in needed
        }
        if self._files is not None:
            self._files.know(columns, said.get("file_hashes", {}))
        super().__init__(
            columns["embedding"],
            lengths=columns["length"],
            features=columns.get("feature"),
            sources=columns.get("source"),
            feature_names=features,
            source_names=tuple(names) or ("all",),
        )

    def _checked_sources(self, names: Sequence[str] | None) -> tuple[str, ...]:
        # They were checked when they were written, and to read them all takes long.
        return tuple(names or ())

    def _plain_rows(self, name: str, array: Any) -> PlainRows:
        kind, num_axes = _COLUMNS.get(name, ("", 0))
        if array.dtype.kind not in kind or array.ndim != num_axes or array.dtype.itemsize > 8:
            raise AlignmentError(self._not_a_store(f"{name} of {array.ndim} axes of {array.dtype}"))
        whole_rows = array.chunks[1:] == array.shape[1:] and array.chunks[0] > 0
        if array.shards or array.compressors or array.filters or not whole_rows:
            raise AlignmentError(self._not_a_store(f"{name} not in files of plain rows"))
        return PlainRows(
            self._folder / name,
            shape=array.shape,
            dtype=array.dtype.newbyteorder("<"),
            chunk_rows=array.chunks[0],
            opened=None if self._files is None else self._files.open,
        )

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open), one contiguous read per array.

        Raises:
            IndexError: If the range leaves the store.
            AlignmentError: If a file is missing or shorter than it should be.
            RemoteError: If a file that lies elsewhere cannot be fetched.
        """
        if self._files is not None:
            check_range(start, stop, self.shape[0])
            self._files.ensure(start, stop)
        return super().read(start, stop)

    def metrics(self) -> dict[str, float]:
        """What this process has fetched of a store that lies elsewhere; {} of a local one."""
        return {} if self._files is None else self._files.metrics()

    def _not_a_store(self, reason: str) -> str:
        return (
            f"embeddings must be a Zarr group that slap-embed made, got {str(self.path)!r} "
            f"({reason}); run slap-embed on the corpus."
        )

    def __reduce__(self) -> tuple[Any, tuple[Path | str]]:
        # Handles of Zarr belong to the process that opened them.
        options = {} if self._files is None else self._files.options
        return partial(EmbeddingStore, **options), (self.path,)

    def verify(self, index_digest: str, num_samples: int) -> None:
        """Refuse a dataset that these are not the embeddings of.

        Args:
            index_digest: `file_digest` of the dataset's index.json.
            num_samples: Samples of the dataset.

        Raises:
            AlignmentError: If the number of rows or the digest differs.
        """
        if self.shape[0] != num_samples:
            raise AlignmentError(
                f"embeddings must have one row per sample, {num_samples}, got {self.shape[0]} in "
                f"{str(self.path)!r}; run slap-embed on this dataset again."
            )
        if self.index_digest != index_digest:
            raise AlignmentError(
                f"embeddings must be made from the dataset whose index.json has SHA-256 "
                f"{index_digest[:12]}..., got {str(self.path)!r} made from "
                f"{self.index_digest[:12]}...; run slap-embed on this dataset again."
            )


def store_metrics(store: RowStore) -> dict[str, float]:
    """What this process has fetched of stores that lie elsewhere; {} if none does."""
    total: dict[str, float] = {}
    for one in store.stores if isinstance(store, StackedStore) else [store]:
        for name, value in (one.metrics() if isinstance(one, EmbeddingStore) else {}).items():
            total[name] = total.get(name, 0.0) + value
    return total


def open_embeddings(
    embeddings: Any, cache_dirs: Sequence[str | os.PathLike[str] | None] = ()
) -> RowStore:
    """A row store from what a user hands over.

    Args:
        embeddings: Path of an `embeddings.zarr`, a row store, an array (or anything with `shape`,
            `dtype` and row slices), or a list of those, one per stream, in stream order.
        cache_dirs: Folders for what lies elsewhere, one per stream; (): as for `EmbeddingStore`.

    Raises:
        TypeError: If it is none of these.
        AlignmentError: If a path holds no finished store, or stores do not fit together.
    """
    if isinstance(embeddings, str | os.PathLike):
        return EmbeddingStore(embeddings, cache_dir=cache_dirs[0] if cache_dirs else None)
    if hasattr(embeddings, "read") and hasattr(embeddings, "source_names"):
        store: RowStore = embeddings
        return store
    if hasattr(embeddings, "shape") and hasattr(embeddings, "dtype"):
        return ArrayStore(embeddings)
    if isinstance(embeddings, Sequence) and embeddings:
        if any(isinstance(item, int | float) for item in embeddings):
            raise TypeError(
                "embeddings must be a path, a store, an array or a list of those, got a list of "
                "numbers; pass a NumPy array."
            )
        stores = [open_embeddings(item, cache_dirs[n : n + 1]) for n, item in enumerate(embeddings)]
        return stores[0] if len(stores) == 1 else StackedStore(stores)
    raise TypeError(
        "embeddings must be a path, a store, an array or a non-empty list of those, got "
        f"{type(embeddings).__name__}; pass embeddings.zarr as slap-embed made it."
    )
