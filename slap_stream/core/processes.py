"""Jobs over worker processes, which end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, TypeVar

from tqdm import tqdm

from slap_stream.errors import SlapStreamError

Job = TypeVar("Job")
Advance = Callable[[int], None]
Work = Callable[[Job, Advance], None]
"""Does a job, and says now and then how much of it is done."""

_POLL_SECONDS = 0.2

# Of a worker process: one slot per job, shared with the parent. Set when the worker starts.
_progress: Any = None


class WorkerDied(SlapStreamError, RuntimeError):
    """A worker process ended before its job did."""


def run_jobs(
    work: Work[Job], jobs: Sequence[Job], sizes: Sequence[int], *, num_workers: int, bar: tqdm[Any]
) -> None:
    """Run jobs over spawned processes, or in this one when `num_workers` is at most 1.

    When a job raises, or this process is interrupted or killed, the workers end at once. What a job
    leaves behind must therefore be fit to be found half done.

    Args:
        work: A module-level function, not of the script; it and the jobs are pickled.
        jobs: (num_jobs,) independent of each other.
        sizes: (num_jobs,) in the unit of the bar.
        num_workers: Processes.
        bar: Moved on by what the jobs report, and by a job's size when it ends.

    Raises:
        WorkerDied: If a worker is killed, by the system for want of memory, say.
    """
    before = int(bar.n)
    if work.__module__ == "__main__":
        raise ValueError(
            f"work must be of a module that workers can import, got {work.__qualname__!r} of the "
            "script; move it."
        )
    if num_workers <= 1 or len(jobs) <= 1:
        for job, size in zip(jobs, sizes, strict=True):
            start = before
            before += size
            # Bound now: the work is over before the next job starts.
            work(job, lambda done, start=start: _move(bar, start + done))  # type: ignore[misc]
            # A job whose size is not known, 0, has moved the bar beyond it.
            _move(bar, max(before, int(bar.n)))
        return
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray("q", len(jobs))
    # Nothing is ever sent: when the pipe ends, the workers know that they are not needed.
    listener, keeper = context.Pipe(duplex=False)
    try:
        with ProcessPoolExecutor(
            max_workers=min(num_workers, len(jobs)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(progress, listener),
        ) as executor:
            try:
                # All processes start here: none is started anew for one that has died.
                with _script_hidden(), _interrupts_held():
                    pending = {
                        executor.submit(_run, work, job, slot, size)
                        for slot, (job, size) in enumerate(zip(jobs, sizes, strict=True))
                    }
                while pending:
                    finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    _move(bar, before + sum(progress))
            except BaseException:
                keeper.close()
                executor.shutdown(wait=True, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise WorkerDied(
            f"num_workers must be as few as the memory allows, got {num_workers!r} and a worker "
            "that ended before its job did; what is done is kept: run the same again, with fewer "
            "workers if memory was the cause."
        ) from error
    finally:
        keeper.close()
        listener.close()


def usable_cores() -> int:
    """Cores that this process may run on."""
    # Not everywhere can a process be kept off some cores.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _script_hidden() -> Iterator[None]:
    """Processes that are spawned inside do not run the caller's script.

    They would, to find by name what is pickled from there, which our jobs have nothing of. A script
    that makes its call outside of `if __name__ == "__main__":` would so make it again.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that are spawned inside begin with SIGINT held back, until they ignore it; here it
    is answered at the end.

    Interrupted while they start, they would each print where they were.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT)
    # Another thread may be sent it, and then the main thread's handler is called all the same.
    ours = threading.current_thread() is threading.main_thread() and handler is not None
    if ours:
        signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _move(bar: tqdm[Any], done: int) -> None:
    bar.update(done - bar.n)


def _start_worker(progress: Any, listener: Connection) -> None:
    global _progress
    _progress = progress
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, args=(listener,), daemon=True).start()


def _end_with_parent(listener: Connection) -> None:
    listener.poll(None)
    # Not a clean exit, on purpose: the work that it would wait for has no use any more.
    os._exit(1)


def _run(work: Work[Job], job: Job, slot: int, size: int) -> None:
    def advance(done: int) -> None:
        _progress[slot] = done

    work(job, advance)
    _progress[slot] = size
