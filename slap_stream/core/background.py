"""A thread that does one thing after the other, for whoever needs the results later.

A loader has one that owns its sampler: whatever is called there is done whole and in order, also
when Ctrl-C, or torch when a worker has died, raises an error in the thread that waits for it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_Result = TypeVar("_Result")

_HANDOVER_SECONDS = 5e-5


class BackgroundThread:
    """Calls functions one after the other in a thread of its own, which ends with this object.

    One that stays: a new one for every batch has none of the memory that the one before had warm,
    which makes composing a tenth dearer.

    A process that is forked has no such thread, and whatever the thread was about may be half done
    there: it can neither hand in functions nor wait for results. The end of the process waits for
    what was handed in, which would otherwise end in the middle of somebody's C++.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Started when it is first needed: then objects that have one can be copied before.
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def post(self, function: Callable[[], _Result]) -> Background[_Result]:
        """Have a function called once all before it are done; does not wait.

        Raises:
            RuntimeError: In a process that was forked from the one with the thread.
        """
        return self._hand_in(function, _HANDOVER_SECONDS)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Call a function in the thread, once all before it are done, and wait for its result.

        If an interrupt ends the waiting, the function is called all the same.

        Raises:
            BaseException: What the function raises.
            RuntimeError: In a process that was forked from the one with the thread.
        """
        if self._thread is threading.current_thread():
            return function()
        return self._hand_in(function, 0.0).get()

    def _hand_in(
        self, function: Callable[[], _Result], pause_seconds: float
    ) -> Background[_Result]:
        if self._thread is None:
            self._start()
        elif self._process != os.getpid():
            raise _forked(self._name)
        work = Background(function, self._name, pause_seconds)
        self._queue.put(work)
        return work

    def _start(self) -> None:
        self._process = os.getpid()
        self._queue: SimpleQueue[Background[Any] | None] = SimpleQueue()
        # A daemon, since the interpreter waits for others before it runs finalizers.
        thread = threading.Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._queue, thread)
        self._thread = thread


class Background(Generic[_Result]):
    """Something that is done in the background.

    Args:
        function: What is called.
        name: Of the thread that calls it.
        pause_seconds: That the thread waits first.
    """

    def __init__(self, function: Callable[[], _Result], name: str, pause_seconds: float) -> None:
        self._function: Callable[[], _Result] | None = function
        self._name, self._pause_seconds = name, pause_seconds
        self._process = os.getpid()
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        # Held until it has ended. An Event or a Future has steps of its own, which an interrupt
        # can end half way; to wait for a lock is a single one.
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Do it; the thread's business."""
        assert self._function is not None, "it is done once"
        if self._pause_seconds:
            # Lets who has handed this in go on first, who would wait for the interpreter's lock
            # for up to its switch interval, 5 ms.
            time.sleep(self._pause_seconds)
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error
        # What it holds, a loader perhaps, may be done with.
        self._function = None
        self._running.release()
        # An error holds the frames that it came through: one that held it, too, would keep a
        # loader alive until the garbage collector comes.
        del self

    def wait(self) -> bool:
        """Wait until it has ended; whether it has not failed.

        Raises:
            RuntimeError: In a process that was forked before it had ended.
        """
        if self._process != os.getpid() and self._running.locked():
            raise _forked(self._name)
        with self._running:
            pass
        return self._error is None

    def get(self) -> _Result:
        """What the function has returned, handed over; waits for it.

        Raises:
            BaseException: What the function has raised.
            RuntimeError: In a process that was forked before it had ended.
        """
        if not self.wait():
            assert self._error is not None
            try:
                raise self._error
            finally:
                del self  # as in `run`
        return self._results.pop()


def _serve(queue: SimpleQueue[Background[Any] | None]) -> None:
    while (work := queue.get()) is not None:
        work.run()
        del work


def _end(queue: SimpleQueue[Background[Any] | None], thread: threading.Thread) -> None:
    queue.put(None)
    # The thread itself may be the last to hold what it worked for.
    if thread is not threading.current_thread():
        thread.join()


def _forked(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} must be used in the process that has its thread, got process {os.getpid()}, a "
        "fork of it; make a new loader or sampler there."
    )
