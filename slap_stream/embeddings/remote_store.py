"""Files of an `embeddings.zarr` that lies elsewhere, fetched whole as their rows are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from slap_stream.embeddings.layout import METADATA_NAME
from slap_stream.embeddings.plain_rows import PlainRows
from slap_stream.errors import AlignmentError
from slap_stream.remote.bucket import download
from slap_stream.remote.cache import FileCache, scratch
from slap_stream.remote.urls import parse_url

_COLUMNS = ("embedding", "length", "feature", "source")


class StoreFiles:
    """A store's files on local disk, under the same names; what describes them is fetched at once.

    A store that is written anew has another folder, so that no file of the old one is taken for its
    own.

    Args:
        url: URL of the Zarr group.
        cache_dir: Folder above that of the files; None: as `EmbeddingStore` says.
        cache_bytes: What the files may take.

    Attributes:
        url: The same, as a text.
        folder: A Zarr group without the files of its arrays.
        options: Arguments that make another of these.

    Raises:
        AlignmentError: If there is no group.
        RemoteError: If it cannot be reached.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None,
        cache_bytes: int,
    ) -> None:
        place = parse_url("embeddings", url)
        described = download(place.below(METADATA_NAME))
        self.url = str(place)
        if described is None:
            raise AlignmentError(
                f"embeddings must be an existing embeddings.zarr, got {self.url!r}, which has no "
                f"{METADATA_NAME}; run slap-embed on the corpus, or wait until it has uploaded all."
            )
        root = None if cache_dir is None else Path(cache_dir)
        told = hashlib.sha256(described).hexdigest()
        self.folder = scratch("embeddings", f"{self.url} {told}", root)
        self._cache = FileCache(self.url, self.folder, cache_bytes)
        for name in ("", *_COLUMNS):
            self._cache.note(f"{name}/{METADATA_NAME}".strip("/"))
        self._columns: Mapping[str, PlainRows] = {}
        self._hashes: Mapping[str, Sequence[str]] = {}
        self.options: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": cache_bytes}

    def know(self, columns: Mapping[str, PlainRows], hashes: Mapping[str, Sequence[str]]) -> None:
        """Be told of the arrays.

        Args:
            columns: By name.
            hashes: (num_files,) xxh3_64 of each array's files; without them sizes alone are
                checked.

        Raises:
            AlignmentError: If they are not hashes of these files.
        """
        for name, found in hashes.items():
            rows = columns.get(name)
            num_files = 0 if rows is None else rows.num_files
            if len(found) != num_files:
                raise AlignmentError(
                    f"embeddings must have a hash for each file, got {len(found)} for {num_files} "
                    f"files of {name} in {self.url!r}; run slap-embed again."
                )
        self._columns, self._hashes = columns, hashes

    def open(self, path: Path) -> BinaryIO:
        """A file of an array, fetched if it is not there."""
        return self._cache.open(*self._described(path))

    def ensure(self, start: int, stop: int) -> None:
        """Fetch all files that rows `start` to `stop` are in, several at a time."""
        paths = [file for rows in self._columns.values() for file in rows.files(start, stop)]
        self._cache.ensure([self._described(path) for path in paths])

    def metrics(self) -> dict[str, float]:
        """What this process has fetched."""
        return {
            "embedding_files_fetched": float(self._cache.fetched),
            "embedding_bytes_fetched": float(self._cache.fetched_bytes),
            "embedding_retries": float(self._cache.retries),
        }

    def _described(self, path: Path) -> tuple[str, int, tuple[str, str] | None]:
        """Name, size and hash of a file."""
        name = path.relative_to(self.folder)
        column, chunk = name.parts[0], int(name.parts[2])
        hashes = self._hashes.get(column)
        digest = None if hashes is None else ("xxh3_64", hashes[chunk])
        return name.as_posix(), self._columns[column].chunk_bytes, digest
