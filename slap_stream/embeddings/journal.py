"""A locked, append-only file of JSON lines: what a job that may be killed has done so far."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from slap_stream.errors import CorpusError


class Journal:
    """Lines that survive a kill; one process holds it at a time.

    State, on disk: whole lines. A line torn by a kill has no line end, does not count, and is cut
    off by the next append.

    Args:
        path: The file; made with its folder if it is not there.

    Raises:
        CorpusError: If another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115, closed by close
        try:
            # Released by the kernel when the process ends, however it ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise CorpusError(
                f"{path.parent.name} must be written by one process, got {path} locked by "
                "another; wait for it or stop it."
            ) from error

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines, in order."""
        self._file.seek(0)
        return [json.loads(line) for line in self._file.read().split(b"\n")[:-1]]

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Forget every line."""
        self._file.truncate(0)

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
