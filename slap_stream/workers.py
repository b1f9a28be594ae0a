"""What is said when a process that reads batches has died."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from slap_stream.errors import WorkerError

_CAUSES = {
    signal.SIGKILL: "as a rule the machine was out of memory: use fewer num_workers, a smaller "
    "prefetch_factor or less memory in collate_fn",
    signal.SIGBUS: "as a rule shared memory was full: use fewer num_workers or enlarge /dev/shm",
    signal.SIGSEGV: "a compiled library failed in it: run with num_workers=0 to see where",
}


def raise_for_dead(workers: Sequence[Any], cause: BaseException) -> None:
    """Say which workers have died and why; nothing happens if all live.

    Args:
        workers: The processes of a DataLoader's iterator.
        cause: What torch says of it.

    Raises:
        WorkerError: If one has ended with an error.
    """
    dead = [
        f"worker {index} (pid {worker.pid}) {_reason(worker.exitcode)}"
        for index, worker in enumerate(workers)
        if worker.exitcode
    ]
    if dead:
        raise WorkerError(
            f"all {len(workers)} workers must live, got {'; '.join(dead)}. A new iteration starts "
            "new workers and goes on with the same batch."
        ) from cause


def _reason(exitcode: int) -> str:
    if exitcode > 0:
        return f"that exited with code {exitcode}: its own output says why"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"that was killed by signal {-exitcode}"
    cause = _CAUSES.get(number)
    return f"that was killed by {number.name}" + (f": {cause}" if cause else "")
