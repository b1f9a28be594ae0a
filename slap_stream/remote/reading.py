"""One remote file as a binary file that can be read and sought in."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from slap_stream.errors import RemoteError
from slap_stream.remote.bucket import RemoteFile, describe, read_range

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Of a request, which takes a tenth of a second to be answered, whatever its size.
BUFFER_BYTES = 4 << 20


class _Ranges(io.RawIOBase):
    """Reads by requests for ranges, all of one version."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.num_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"position must be at least 0, got {start + offset}.")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._file.num_bytes)
        if stop <= self._at:
            return 0
        data = read_range(self._file.url, self._at, stop, version=self._file.version)
        view[: len(data)] = data
        self._at = stop
        return len(data)


def open_remote(file: RemoteFile) -> io.BufferedReader:
    """A remote file, read as it is needed; never all of it is in memory.

    Args:
        file: As it was when it was found: what was cut into pieces then may not be read from
            another version, whose records lie elsewhere.

    Raises:
        RemoteError: Now or when it is read, if it is not there, is another version, or cannot be
            reached.
    """
    now = describe(file.url)
    if (now.num_bytes, _bare(now.version)) != (file.num_bytes, _bare(file.version)):
        raise RemoteError(
            f"file must be there and stay as it is, got {str(file.url)!r}, which has changed "
            "meanwhile; run the same again."
        )
    # In its own words, which are not always those of a listing.
    return io.BufferedReader(_Ranges(now), BUFFER_BYTES)


def _bare(version: str) -> str:
    """A version without its quotes, which Azure's listings leave out."""
    return version.strip('"')
