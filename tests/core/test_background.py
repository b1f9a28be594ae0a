"""A thread that does one thing after the other: results, errors, interrupts, forks, its end."""

from __future__ import annotations

import gc
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

from slap_stream.core.background import Background, BackgroundThread


@pytest.fixture(name="start")
def _start() -> Callable[[Callable[[], Any]], Background[Any]]:
    return BackgroundThread("slap-test").post


def slowly(result: Any) -> Any:
    time.sleep(0.2)
    return result


def test_what_is_returned_is_handed_over(start: Any) -> None:
    threads: list[str] = []
    work = start(lambda: threads.append(threading.current_thread().name))
    assert work.wait()
    assert work.get() is None
    assert threads == ["slap-test"]


def test_what_is_raised_is_raised_by_who_gets_it(start: Any) -> None:
    def fail() -> None:
        raise SystemExit("no such luck")

    work = start(fail)
    assert not work.wait()
    for _ in range(2):
        with pytest.raises(SystemExit, match="no such luck"):
            work.get()


def test_waiting_goes_on_after_an_interrupt(start: Any) -> None:
    work = start(lambda: slowly("done"))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    # Thread.join would come back at once, the thread still running.
    assert work.get() == "done"
    timer.join()


def test_it_may_fork_itself(start: Any) -> None:
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
        thread.post(lambda: (time.sleep(0.2), print("done", flush=True)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


def test_nobody_waits_for_what_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread, done = BackgroundThread("slap-test"), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            thread.call(lambda: done.append("first"))
    thread.call(lambda: done.append("second"))
    assert done == ["second"], "what could not be started is not done later"


def test_all_is_done_in_order_by_one_thread_that_ends_with_its_owner() -> None:
    thread, order = BackgroundThread("slap-test"), list[int]()
    for number in range(50):
        thread.post(lambda number=number: order.append(number))  # type: ignore[misc]
    first, second = (thread.call(threading.current_thread) for _ in range(2))
    assert first is second
    assert order == list(range(50))
    del thread
    assert not first.is_alive()


def test_a_call_from_the_thread_itself_is_made_at_once() -> None:
    thread = BackgroundThread("slap-test")
    assert thread.call(lambda: thread.call(lambda: "inner")) == "inner"


def test_a_call_whose_waiter_was_interrupted_is_made_all_the_same() -> None:
    thread, done = BackgroundThread("slap-test"), list[str]()
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        thread.call(lambda: done.append(slowly("done")))
    assert thread.call(lambda: list(done)) == ["done"]
    timer.join()


def test_what_has_failed_ends_neither_the_thread_nor_what_comes_after() -> None:
    thread = BackgroundThread("slap-test")

    def fail() -> None:
        raise SystemExit("no such luck")

    failed = thread.post(fail)
    with pytest.raises(SystemExit, match="no such luck"):
        thread.call(fail)
    assert thread.call(lambda: "after") == "after"
    assert not failed.wait()


def test_the_thread_itself_may_be_the_last_to_hold_its_owner() -> None:
    holder = [BackgroundThread("slap-test")]
    ended = threading.Event()
    own = holder[0].call(threading.current_thread)
    holder[0].post(lambda: (time.sleep(0.05), holder.clear(), gc.collect(), ended.set()))
    assert ended.wait(5.0)
    own.join(5.0)
    assert not own.is_alive()


def test_a_forked_process_is_refused_and_does_not_wait_for_ever() -> None:
    thread = BackgroundThread("slap-test")
    work, ended = thread.post(lambda: slowly("done")), thread.post(lambda: "ended")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def ask() -> None:
        for call in (work.get, ended.wait, lambda: thread.call(os.getpid)):
            try:
                call()
            except RuntimeError as error:
                sender.send(str(error))

    child = context.Process(target=ask)
    child.start()
    try:
        for _ in range(3):
            assert receiver.poll(10.0)
            assert f"got process {child.pid}, a fork of it; make a new" in receiver.recv()
    finally:
        child.join()
    assert work.get() == "done"


def test_what_was_never_used_is_usable_in_a_forked_process() -> None:
    thread = BackgroundThread("slap-test")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(thread.call(os.getpid)))
    child.start()
    assert receiver.poll(10.0)
    assert receiver.recv() == child.pid
    child.join()
