"""Handlers of signals wait while a state changes, so that none of them ends a change half way.

Ctrl-C, and the death of a worker as torch reports it, raise an exception in the middle of whatever
the main thread executes. In the middle of a batch that is being composed, the batch would be lost
and the state be neither the one before it nor the one after.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGCHLD)

Handler = Callable[[int, FrameType | None], Any]

# Inside `undisturbed`, what is to run when a signal has come, and the signals that came. A process
# has one handler of a signal, so these are the process's too.
_handlers: dict[int, Handler] = {}
_came: list[tuple[int, FrameType | None]] = []


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context after which, instead of inside which, Python's handlers of signals run.

    Only the main thread is ever disturbed. Handlers that are not Python's stay as they are: they
    end the process, or do nothing.
    """
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        for number in _HELD:
            handler = signal.getsignal(number)
            if callable(handler):
                _handlers[number] = handler
                signal.signal(number, _note)
        yield
    finally:
        handlers = dict(_handlers)
        _handlers.clear()
        _give_back(handlers)


@contextmanager
def waiting() -> Iterator[None]:
    """Context inside `undisturbed` in which handlers do run: while others are waited for, for
    seconds perhaps, nothing changes."""
    if not _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _give_back(_handlers)
        yield
    finally:
        for number in _handlers:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _came.append((number, frame))


def _give_back(handlers: Mapping[int, Handler]) -> None:
    """Let all handlers run again, though one may raise; first those whose signals came."""
    with ExitStack() as stack:
        stack.callback(_run, handlers)
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)


def _run(handlers: Mapping[int, Handler]) -> None:
    with ExitStack() as stack:
        while _came:
            # A stack runs what it was given last first.
            number, frame = _came.pop()
            stack.callback(handlers[number], number, frame)
