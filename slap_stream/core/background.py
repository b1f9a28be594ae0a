"""Work that is done in the background, for whoever needs its result later."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

_Result = TypeVar("_Result")

_HANDOVER_SECONDS = 5e-5


class BackgroundThread:
    """Does one thing after the other in a thread of its own, which ends with this object.

    One that stays: a new one for every batch has none of the memory that the one before had warm,
    which makes composing a tenth dearer.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0

    def start(self, function: Callable[[], _Result]) -> Background[_Result]:
        """Call a function once all before it are done."""
        # A process that was forked has the object, and not the thread.
        if self._executor is None or self._process != os.getpid():
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            self._process = os.getpid()
        try:
            return Background(function, self._executor)
        except BaseException:
            # Where no thread could be started: what was handed in must not be done later on.
            self._executor = None
            raise


class Background(Generic[_Result]):
    """Something that is done in the background.

    A fork waits for it: the child would have no such thread, but the locks that it holds. So does
    the end of the process, which would otherwise end the thread in the middle of somebody's C++.

    Args:
        function: What is called.
        executor: Who calls it.
    """

    def __init__(self, function: Callable[[], _Result], executor: ThreadPoolExecutor) -> None:
        self._function = function
        self._thread: threading.Thread | None = None
        self._results: list[_Result] = []
        _running.add(self)
        try:
            self._ended: Future[None] = executor.submit(self._run)
        except BaseException:
            # Whoever forks would wait for it for ever.
            _running.discard(self)
            raise

    def _run(self) -> None:
        self._thread = threading.current_thread()
        # Lets who has started this go on first, who would wait for the interpreter's lock for up to
        # its switch interval, 5 ms.
        time.sleep(_HANDOVER_SECONDS)
        try:
            self._results.append(self._function())
        finally:
            _running.discard(self)

    def wait(self) -> bool:
        """Wait until it has ended; whether it has not failed."""
        return self._ended.exception() is None

    def get(self) -> _Result:
        """What the function has returned, handed over; waits for it.

        Raises:
            BaseException: What the function has raised.
        """
        self._ended.result()
        return self._results.pop()


_running: set[Background[Any]] = set()


def _wait_for_all() -> None:
    for work in list(_running):
        if work._thread is not threading.current_thread():
            work.wait()


os.register_at_fork(before=_wait_for_all)
