"""Whole files of a remote folder on local disk, within a bound; processes of a node share them."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from time import time
from typing import BinaryIO

import xxhash
from filelock import FileLock

from slap_stream.core.room import told_when_full
from slap_stream.errors import CorpusError, RemoteError
from slap_stream.remote.bucket import download, read_parts, side_by_side
from slap_stream.remote.urls import parse_url

CACHE_BYTES = 8 << 30
# Cut short on its way, or rotten where it lies: the third time it is the remote's.
DAMAGED_ATTEMPTS = 3
_LOCKS = 16
# What says what the files are: little, and looked for by its name.
_KEPT = ("index.json", "corpus.json", "zarr.json")
# After it nobody is writing any more to a file that has not got its name.
_GIVEN_UP_SECONDS = 3600.0

Digest = tuple[str, str]
"""Name of a hash, of hashlib or xxhash, and the hash in hex."""


def scratch(what: str, of: str, root: Path | None = None) -> Path:
    """A folder for what is known by a text; the same for the same text.

    Args:
        what: Begins its name.
        of: What it is for.
        root: Where it is; None: in a folder of this user's, in the one for temporary files.

    Raises:
        CorpusError: If another user has made that one, or it is a link.
    """
    if root is None:
        root = Path(tempfile.gettempdir(), f"slap_stream_{os.getuid()}")
        with suppress(FileExistsError):
            root.mkdir(mode=0o700)
        # Where a link leads whoever made it may change.
        told = root.lstat()
        if not stat.S_ISDIR(told.st_mode) or told.st_uid != os.getuid():
            raise CorpusError(
                f"{str(root)!r} must be a folder of this user's, got a link, a file or one that "
                "another has made; set TMPDIR."
            )
    return root / f"slap-{what}-{hashlib.sha256(of.encode()).hexdigest()[:16]}"


class FileCache:
    """Fetches whole files, checks size and hash, and keeps those used last.

    A file is checked once in a process. Of several processes that want one, one fetches it. What is
    open stays readable when its file is thrown away. Pickles.

    State: the files of its folder; their times say which was used last.

    Args:
        remote: URL of the folder that the files lie in.
        directory: Where they are kept, under the same names.
        limit_bytes: What they may take, besides those on their way; a file that is larger is kept
            alone.

    Attributes:
        directory: The same.
        fetched: Files that this process has fetched.
        fetched_bytes: Their bytes.
        retries: How often a request was tried again.
    """

    def __init__(self, remote: str, directory: Path, limit_bytes: int = CACHE_BYTES) -> None:
        self._url = parse_url("remote", remote)
        self.directory, self._limit_bytes = directory, limit_bytes
        # Beside it: Zarr tells of every file in a group that is none of its own.
        self._locks = directory.with_name(f"{directory.name}.locks")
        self.fetched = self.fetched_bytes = self.retries = 0
        self._checked: set[str] = set()

    def __reduce__(self) -> tuple[type[FileCache], tuple[str, Path, int]]:
        return FileCache, (str(self._url), self.directory, self._limit_bytes)

    def open(self, name: str, num_bytes: int, digest: Digest | None = None) -> BinaryIO:
        """A file, open to be read; fetched if it is not there.

        Args:
            name: Path below the folder.
            num_bytes: Its size.
            digest: Its hash; None: not known.

        Raises:
            RemoteError: If it cannot be fetched, or is not what it should be.
            CorpusError: If there is no room for it on the disk, or the name leads elsewhere.
        """
        path = self._inside(name)
        if name in self._checked:
            found = self._open_whole(path, num_bytes)
            if found is not None:
                return found
        path.parent.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(exist_ok=True)
        with FileLock(self._locks / f"{zlib.crc32(name.encode()) % _LOCKS:02}"):
            damages = 0
            found = self._open_whole(path, num_bytes)
            while True:
                if found is not None:
                    if digest is None or _hash_of(found, digest[0]) == digest[1]:
                        self._checked.add(name)
                        return found
                    found.close()
                    damages += 1
                    if damages == DAMAGED_ATTEMPTS:
                        raise RemoteError(
                            f"file must be as it was written, got {str(self._url.below(name))!r} "
                            f"with another content {damages} times; write it again."
                        )
                path.unlink(missing_ok=True)
                found = self._fetch(name, num_bytes)

    def file(self, name: str, num_bytes: int, digest: Digest | None = None) -> Path:
        """Path of a file that is there now, for who reads it at once; as `open`."""
        self.open(name, num_bytes, digest).close()
        return self.directory / name

    def note(self, name: str) -> bytes | None:
        """Fetch a small file that says what the others are, anew each time; None if there is none.

        Raises:
            RemoteError: If the store cannot be reached.
        """
        data = download(self._url.below(name))
        if data is not None:
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            unfinished.write_bytes(data)
            unfinished.replace(path)
        return data

    def remove(self) -> None:
        """Throw all of it away."""
        for folder in (self.directory, self._locks):
            shutil.rmtree(folder, ignore_errors=True)

    def ensure(self, wanted: Sequence[tuple[str, int, Digest | None]]) -> None:
        """Fetch those of these files that are not there, several at a time.

        Args:
            wanted: Arguments of `open`.

        Raises:
            RemoteError: As `open`.
            CorpusError: Likewise.
        """
        missing = [one for one in wanted if not (self.directory / one[0]).is_file()]
        for _ in side_by_side(lambda one: self.file(*one), missing):
            pass

    def link(self, name: str, num_bytes: int, digest: Digest | None, folder: Path) -> None:
        """Make a file be found below another folder, too, on the same disk, until it is removed."""
        self._inside(name)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(DAMAGED_ATTEMPTS):
            self.open(name, num_bytes, digest).close()
            # Another process may throw it away in between.
            with suppress(FileNotFoundError):
                os.link(self.directory / name, target)
                return
        raise CorpusError(
            f"files of {str(self.directory)!r} must stay until they are opened, got {name!r} "
            f"thrown away {DAMAGED_ATTEMPTS} times; raise the bound of {self._limit_bytes} bytes."
        )

    def _inside(self, name: str) -> Path:
        """Where a file is kept. Names are read from files that anybody may have written."""
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise CorpusError(
                f"files must lie below {str(self._url)!r}, got the name {name!r}; write what names "
                "it again."
            )
        return self.directory / name

    def _open_whole(self, path: Path, num_bytes: int) -> BinaryIO | None:
        """The file, noted as used now; None if it is missing or not of its size."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != num_bytes:
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def _fetch(self, name: str, num_bytes: int) -> BinaryIO:
        """Fetch a file; it is open, since others may throw it away as soon as it has its name."""
        path = self.directory / name
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with (
                told_when_full("cache_dir", self.directory, num_bytes),
                unfinished.open("wb") as file,
            ):
                url = self._url.below(name)
                file.writelines(read_parts(url, num_bytes, retried=self._retried))
            found = unfinished.open("rb")
            # One after the other: each must count what the others have added.
            with FileLock(self._locks / "room"):
                self._make_room(num_bytes)
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self.fetched += 1
        self.fetched_bytes += num_bytes
        return found

    def _retried(self) -> None:
        self.retries += 1

    def _make_room(self, num_bytes: int) -> None:
        """Throw away what was used longest ago, until so much fits; needs the lock."""
        files = []
        for folder, _, names in os.walk(self.directory):
            if "/.reading-" in folder:
                continue
            for name in names:
                # Of another process, which has thrown it away or finished it.
                with suppress(FileNotFoundError):
                    path = Path(folder, name)
                    found = path.stat()
                    given_up = found.st_mtime < time() - _GIVEN_UP_SECONDS
                    if name not in _KEPT and (given_up or not name.startswith(".")):
                        files.append((found.st_mtime_ns, found.st_size, path))
        taken = sum(size for _, size, _ in files) + num_bytes
        for _, size, path in sorted(files):
            if taken <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            taken -= size


def _hash_of(file: BinaryIO, algorithm: str) -> str:
    make = getattr(xxhash, algorithm) if algorithm in xxhash.algorithms_available else algorithm
    try:
        found = hashlib.file_digest(file, make).hexdigest()  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        file.close()
        raise CorpusError(
            f"hashes must be of hashlib or xxhash, got {algorithm!r} ({error}); write what names "
            "it again."
        ) from error
    file.seek(0)
    return found
