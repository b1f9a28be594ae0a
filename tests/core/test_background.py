"""Work in the background: its result, its errors, interrupts and forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from slap_stream.core import background
from slap_stream.core.background import Background, BackgroundThread


def start(function: Callable[[], Any]) -> Background[Any]:
    return BackgroundThread("slap-test").start(function)


def slowly(result: Any) -> Any:
    time.sleep(0.2)
    return result


def test_what_is_returned_is_handed_over() -> None:
    threads: list[str] = []
    work = start(lambda: threads.append(threading.current_thread().name))
    assert work.wait()
    assert work.get() is None
    assert threads == ["slap-test_0"]


def test_what_is_raised_is_raised_by_who_gets_it() -> None:
    def fail() -> None:
        raise SystemExit("no such luck")

    work = start(fail)
    assert not work.wait()
    for _ in range(2):
        with pytest.raises(SystemExit, match="no such luck"):
            work.get()


def test_waiting_goes_on_after_an_interrupt() -> None:
    work = start(lambda: slowly("done"))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    # Thread.join would come back at once, the thread still running.
    assert work.get() == "done"
    timer.join()


def test_a_fork_waits_for_it() -> None:
    began = time.monotonic()
    work = start(lambda: slowly("done"))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work.get()))
    child.start()
    assert time.monotonic() - began >= 0.2
    assert receiver.recv() == "done"
    child.join()
    assert work.get() == "done"


def test_it_may_fork_itself() -> None:
    def fork() -> int:
        child = os.fork()
        if not child:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert start(fork).get() == 7


def test_the_end_of_the_process_waits_for_it() -> None:
    program = """
        import time
        from slap_stream.core.background import BackgroundThread
        thread = BackgroundThread("slap-test")
        thread.start(lambda: (time.sleep(0.2), print("done", flush=True)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


def test_nobody_waits_for_what_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread, done = BackgroundThread("slap-test"), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            thread.start(lambda: done.append("first"))
    assert not background._running
    thread.start(lambda: done.append("second")).get()
    assert done == ["second"], "what could not be started is not done later"


def test_one_thread_does_all_and_ends_with_its_owner() -> None:
    thread = BackgroundThread("slap-test")
    first, second = (thread.start(threading.current_thread).get() for _ in range(2))
    assert first is second
    del thread
    first.join(timeout=5.0)
    assert not first.is_alive()


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    thread = BackgroundThread("slap-test")
    assert thread.start(os.getpid).get() == os.getpid()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(thread.start(os.getpid).get()))
    child.start()
    assert receiver.poll(10.0)
    assert receiver.recv() == child.pid
    child.join()
