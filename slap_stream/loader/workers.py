"""Messages about worker processes that have died.

Torch notices it in two places: while it waits for a batch, at once or within 5 seconds; and by a
signal handler, in the middle of whatever the main thread executes, as a rule the training step. It
raises a RuntimeError there, so that no step is taken on while nobody reads. Here that error is
given its right name, in the same place and at the same time; others pass through as they are.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from types import FrameType
from typing import Any
from weakref import WeakSet

from slap_stream.core.interrupts import handler_of
from slap_stream.errors import WorkerError

_CAUSES = {
    signal.SIGKILL: "as a rule the machine was out of memory: use fewer num_workers, a smaller "
    "prefetch_factor or less memory in collate_fn",
    signal.SIGBUS: "as a rule shared memory was full: use fewer num_workers or enlarge /dev/shm",
    signal.SIGSEGV: "a compiled library failed in it: run with num_workers=0 to see where",
}


# Torch's iterators over the workers of our loaders. A process has one handler of a signal, so these
# are the process's too.
_watched: WeakSet[Any] = WeakSet()


def watch(iterator: Any) -> None:
    """Have the death of a worker of this DataLoader's iterator be a `WorkerError` wherever torch's
    signal handler raises it.

    In other threads than the main one there is no such handler, and nothing is done.
    """
    if threading.current_thread() is not threading.main_thread() or not len(iterator._workers):
        return
    _watched.add(iterator)
    handler = handler_of(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, _NamesWorkers):
        signal.signal(signal.SIGCHLD, _NamesWorkers(handler))


class _NamesWorkers:
    """The handler that was there, torch's or one that calls it; only its error is another."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except WorkerError:
            raise  # named already, by one of us that the handler calls
        except RuntimeError as error:
            for iterator in _watched:
                workers = iterator._workers
                # Other loaders have workers too.
                if any(f"(pid {worker.pid})" in str(error) for worker in workers):
                    message = describe_dead(workers, error)
                    if message is not None:
                        raise WorkerError(message) from error
            raise


def describe_dead(workers: Sequence[Any], error: BaseException) -> str | None:
    """Say which workers have died and why.

    Args:
        workers: The processes of a DataLoader's iterator.
        error: What it has raised.

    Returns:
        The message; None if all live, so that the error is of something else.
    """
    if workers and isinstance(error, OSError | EOFError):
        # A worker that died with a batch half handed over may still be about to end.
        ready = wait([worker.sentinel for worker in workers], timeout=3.0)
        for worker in workers:
            if worker.sentinel in ready:
                # Its files are closed a moment before its exit code can be had.
                worker.join(3.0)
    dead = [
        f"worker {index} (pid {worker.pid}) {_reason(worker.exitcode)}"
        for index, worker in enumerate(workers)
        if worker.exitcode
    ]
    if not dead:
        return None
    return (
        f"all {len(workers)} workers must live, got {'; '.join(dead)}. A new iteration starts new "
        "workers and goes on with the same batch."
    )


def _reason(exitcode: int) -> str:
    if exitcode > 0:
        return f"that exited with code {exitcode}: its own output says why"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"that was killed by signal {-exitcode}"
    cause = _CAUSES.get(number)
    return f"that was killed by {number.name}" + (f": {cause}" if cause else "")
