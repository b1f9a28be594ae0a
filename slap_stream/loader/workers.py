"""Messages about worker processes that have died.

Torch notices it in two places: while it waits for a batch, at once or within 5 seconds; and by a
signal handler, in the middle of whatever the main thread executes, as a rule the training step. It
raises a RuntimeError there, so that no step is taken on while nobody reads. That one is torch's and
stays as it is; when a batch is asked for, the error is given its right name.

A worker that cannot hand a batch over (no room in shared memory, or nothing that can be pickled)
would print an error and read on, and whoever waits for the batch would wait for ever. Here it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import queues
from multiprocessing.connection import wait
from typing import Any

# Exit code of a worker that could not hand a batch over.
_NOT_HANDED_OVER = 97

_CAUSES = {
    signal.SIGKILL: "as a rule the machine was out of memory: use fewer num_workers, a smaller "
    "prefetch_factor or less memory in collate_fn",
    signal.SIGBUS: "as a rule shared memory was full: use fewer num_workers or enlarge /dev/shm",
    signal.SIGSEGV: "a compiled library failed in it: run with num_workers=0 to see where",
}


def describe_dead(workers: Sequence[Any], error: BaseException) -> str | None:
    """Say which workers have died and why.

    Args:
        workers: The processes of a DataLoader's iterator.
        error: What it has raised.

    Returns:
        The message; None if all live, so that the error is of something else.
    """
    if workers and isinstance(error, OSError | EOFError):
        # A worker that died with a batch half handed over may still be about to end. Torch's
        # handler then raises here what is about to be said.
        with suppress(RuntimeError):
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


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """What a worker does first.

    Attributes:
        then: The caller's `worker_init_fn`.
    """

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        """Have the worker end if it cannot hand a batch over."""
        queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
        if self.then is not None:
            self.then(worker)


def _end(error: BaseException, batch: Any) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(_NOT_HANDED_OVER)


def _reason(exitcode: int) -> str:
    if exitcode == _NOT_HANDED_OVER:
        return (
            "that could not hand a batch over, its own output says why: if shared memory was full, "
            "use fewer num_workers or enlarge /dev/shm; if it cannot be pickled, have collate_fn "
            "make something else"
        )
    if exitcode > 0:
        return f"that exited with code {exitcode}: its own output says why"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"that was killed by signal {-exitcode}"
    cause = _CAUSES.get(number)
    return f"that was killed by {number.name}" + (f": {cause}" if cause else "")
