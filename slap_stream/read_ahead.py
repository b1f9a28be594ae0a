"""What is read next, read in the background meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")


class ReadAhead(Generic[_Read]):
    """Calls a function in a thread of its own, for whoever needs what it returns later.

    What fails there is called again by who needs it, and raises there if it fails again; in a
    process that was forked meanwhile, which has no such thread, it is too.

    Args:
        read: Called once in the background, and may be called again.
    """

    def __init__(self, read: Callable[[], _Read]) -> None:
        self._read = read
        self._found: _Read | None = None
        self._error: Exception | None = None
        # Reading must not keep a process from ending.
        self._thread = threading.Thread(target=self._run, name="slap-read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._read()
        except Exception as error:
            # Said when it is needed: at the end of a process it fails, and nobody does.
            self._error = error

    def wait(self) -> None:
        """Wait until it has been read, or failed."""
        self._thread.join()

    def get(self) -> _Read:
        """What was read, handed over; waits for it."""
        self.wait()
        if self._error is not None:
            logger.warning("reading ahead failed (%r); it is read once more.", self._error)
        found, self._found = self._found, None
        return self._read() if found is None else found
