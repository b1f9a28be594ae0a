"""Messages about worker processes that have died.

Torch notices it in two places: while it waits for a batch, at once or within 5 seconds; and by a
signal handler, in the middle of whatever the main thread executes, as a rule the training step. It
raises a RuntimeError there, so that no step is taken on while nobody reads. That one is torch's and
stays as it is; when a batch is asked for, the error is given its right name.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

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


def _reason(exitcode: int) -> str:
    if exitcode > 0:
        return f"that exited with code {exitcode}: its own output says why"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"that was killed by signal {-exitcode}"
    cause = _CAUSES.get(number)
    return f"that was killed by {number.name}" + (f": {cause}" if cause else "")
