"""Handlers of signals wait while a state changes, so that none of them ends a change half way.

Ctrl-C, and the death of a worker as torch reports it, raise an exception in the middle of whatever
the main thread executes. In the middle of a batch that is being composed, the batch would be lost
and the state be neither the one before it nor the one after.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGCHLD)

Handler = Callable[[int, FrameType | None], Any]


class _Process:
    """A process has one handler of a signal, so what is known of them is the process's too.

    Attributes:
        ready: Contexts that want handlers to be ones that can wait.
        busy: Whether they wait now.
        came: Signals that wait, and their handlers.
    """

    def __init__(self) -> None:
        self.ready = 0
        self.busy = False
        self.came: list[tuple[Handler, int, FrameType | None]] = []

    def run(self) -> None:
        """Run the handlers that wait, in order, all of them, though one may raise."""
        with ExitStack() as stack:
            while self.came:
                # A stack runs what it was given last first.
                handler, number, frame = self.came.pop()
                stack.callback(handler, number, frame)


_process = _Process()


class _CanWait:
    """A handler that was there, and runs later if it must."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _process.came.append((self.handler, number, frame))
        if not _process.busy:
            _process.run()


def handler_of(number: int) -> Any:
    """As `signal.getsignal`, of a handler that can wait the one that was there before."""
    handler = signal.getsignal(number)
    return handler.handler if isinstance(handler, _CanWait) else handler


@contextmanager
def ready_to_wait(_ending: Callable[[], bool] = sys.is_finalizing) -> Iterator[None]:
    """Context in which `undisturbed` costs next to nothing: the handlers that are there when it is
    entered can wait all along.

    Other handlers that are set inside it stay; they do not wait.
    """
    if not _in_main_thread():
        yield
        return
    _get_ready()
    try:
        yield
    finally:
        # A generator that nobody holds any more may be closed by any thread, and by an interpreter
        # that ends, when this module has no names any more.
        if not _ending():
            _end_ready()


class undisturbed:
    """Context after which, instead of inside which, Python's handlers of signals run.

    Only the main thread is ever disturbed. Handlers that are not Python's stay as they are: they
    end the process, or do nothing.
    """

    __slots__ = ("_got_ready", "_outermost")

    def __enter__(self) -> None:
        self._outermost = not _process.busy and _in_main_thread()
        self._got_ready = False
        if not self._outermost:
            return
        if not _process.ready:
            self._got_ready = True
            _get_ready()
        _process.busy = True

    def __exit__(self, *error: object) -> None:
        if not self._outermost:
            return
        _process.busy = False
        try:
            if _process.came:
                _process.run()
        finally:
            if self._got_ready:
                _end_ready()


@contextmanager
def waiting() -> Iterator[None]:
    """Context inside `undisturbed` in which handlers do run: while others are waited for, for
    seconds perhaps, nothing changes."""
    if not _process.busy or not _in_main_thread():
        yield
        return
    _process.busy = False
    try:
        _process.run()
        yield
    finally:
        _process.busy = True


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _get_ready() -> None:
    _process.ready += 1
    try:
        for number in _HELD:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, _CanWait):
                signal.signal(number, _CanWait(handler))
    except BaseException:
        # One of them has run just now, and raised.
        _end_ready()
        raise


def _end_ready() -> None:
    _process.ready -= 1
    if _process.ready or not _in_main_thread():
        return
    for number in _HELD:
        handler = signal.getsignal(number)
        if isinstance(handler, _CanWait):
            signal.signal(number, handler.handler)
