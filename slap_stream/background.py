"""Work that is done in the background, for whoever needs its result later."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_Result = TypeVar("_Result")

_HANDOVER_SECONDS = 5e-5


class Background(Generic[_Result]):
    """Calls a function in a thread of its own.

    A fork waits for it: the child would have no such thread, but the locks that it holds. So does
    the end of the process, which would otherwise end the thread in the middle of somebody's C++.

    Args:
        function: What is called.
        name: Of the thread.
    """

    def __init__(self, function: Callable[[], _Result], name: str) -> None:
        self._function = function
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        # An event, since a thread whose join was interrupted counts as ended for Python.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        _running.add(self)
        try:
            self._thread.start()
        except BaseException:
            # Whoever forks would wait for it for ever.
            _running.discard(self)
            raise

    def _run(self) -> None:
        # Lets who has started this go on first, who would wait for the interpreter's lock for up to
        # its switch interval, 5 ms.
        time.sleep(_HANDOVER_SECONDS)
        try:
            self._results.append(self._function())
        except BaseException as error:  # also what ends a thread: it is raised by `get`
            self._error = error
        finally:
            _running.discard(self)
            self._ended.set()

    def wait(self) -> bool:
        """Wait until it has ended; whether it has not failed."""
        self._ended.wait()
        return self._error is None

    def get(self) -> _Result:
        """What the function has returned, handed over; waits for it.

        Raises:
            BaseException: What the function has raised.
        """
        if not self.wait():
            assert self._error is not None
            raise self._error
        return self._results.pop()


_running: set[Background[Any]] = set()


def _wait_for_all() -> None:
    for work in list(_running):
        if work._thread is not threading.current_thread():
            work.wait()


os.register_at_fork(before=_wait_for_all)
