"""What becomes of a loader that nobody closes: it is gone at once, and so says its log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from weakref import ReferenceType, WeakMethod, finalize, ref

from slap_stream.core.background import BackgroundThread
from slap_stream.loader.run_log import RunLog

_Result = TypeVar("_Result")


def weakly(method: Callable[[], _Result]) -> Callable[[], _Result]:
    """A method of the loader, which does not hold the loader: one that nobody has any more is gone
    at once, and does not wait for the garbage collector.
    """
    held = WeakMethod(method)

    def call() -> _Result:
        found = held()
        if found is None:
            # Its thread may still compose a batch, and tell the log of it.
            raise ReferenceError("the loader is gone")
        return found()

    return call


def end_with(loader: object, log: RunLog, owner: BackgroundThread) -> None:
    """End a log with its loader, or with the process: loops of one's own seldom close one.

    A kill leaves it open, and so does an error that ends the process: a reader then sees that the
    process is gone.

    Args:
        loader: The loader; neither the log nor the thread may hold it.
        log: Its log.
        owner: The thread that owns the sampler, which has been started: what is made later ends
            earlier.
    """
    finalize(loader, _leave, ref(loader), log, owner, os.getpid())


def _leave(
    loader: ReferenceType[object], log: RunLog, owner: BackgroundThread, process: int
) -> None:
    # A fork has no log, and no thread. An error that nobody caught is kept there when it is told.
    if process == os.getpid() and getattr(sys, "last_value", None) is None:
        owner.call(partial(log.leave, held=loader() is not None))
