"""What is said when a process that reads batches has died."""

from __future__ import annotations

import signal
from collections.abc import Sequence
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
