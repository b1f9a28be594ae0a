"""Signals that come while a state changes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from slap_stream.core import interrupts
from slap_stream.core.interrupts import handler_of, ready_to_wait, undisturbed, waiting


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_handler_runs_after_the_change() -> None:
    done = []

    def change() -> None:
        with undisturbed():
            interrupt()
            with undisturbed():
                interrupt()
            done.append("changed")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["changed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_signal_is_told_once_and_in_order() -> None:
    came: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGCHLD)}

    def handler(number: int, frame: Any) -> None:
        came.append(number)

    try:
        for number in before:
            signal.signal(number, handler)
        with undisturbed():
            signal.raise_signal(signal.SIGCHLD)
            signal.raise_signal(signal.SIGINT)
            assert not came
        assert came == [signal.SIGCHLD, signal.SIGINT]
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_the_error_of_one_handler_does_not_keep_another_from_coming_back() -> None:
    before = signal.getsignal(signal.SIGCHLD)

    def complain(number: int, frame: Any) -> None:
        raise RuntimeError("a worker died")

    signal.signal(signal.SIGCHLD, complain)
    try:
        with pytest.raises(RuntimeError, match="a worker died"), undisturbed():
            signal.raise_signal(signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is complain
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("before_the_wait", [True, False])
def test_who_waits_for_others_can_be_interrupted(before_the_wait: bool) -> None:
    done = []

    def change() -> None:
        with undisturbed():
            if before_the_wait:
                interrupt()
            with waiting():
                done.append("waits")
                interrupt()
            done.append("changed")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ([] if before_the_wait else ["waits"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_the_wait_handlers_wait_again() -> None:
    done = []

    def change() -> None:
        with undisturbed():
            with waiting():
                done.append("waits")
            interrupt()
            done.append("changed")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["waits", "changed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_that_are_ready_to_wait_run_at_once_outside_of_changes() -> None:
    done = []

    def compose(signals: int) -> None:
        with undisturbed():
            for _ in range(signals):
                interrupt()
            done.append("composed")

    def train() -> Iterator[None]:
        with ready_to_wait():
            with ready_to_wait():
                pass
            compose(0)
            yield
            with pytest.raises(KeyboardInterrupt):
                interrupt()
            done.append("stepped")
            with pytest.raises(KeyboardInterrupt):
                compose(1)
            yield

    run = train()
    next(run)
    next(run)
    assert done == ["composed", "stepped", "composed"]
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert handler_of(signal.SIGINT) is signal.default_int_handler
    run.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    before = signal.getsignal(signal.SIGCHLD)

    def other(number: int, frame: Any) -> None:
        pass

    try:
        with ready_to_wait():
            signal.signal(signal.SIGCHLD, other)
            # It can wait from the next time on that somebody gets ready.
            with ready_to_wait():
                assert handler_of(signal.SIGCHLD) is other
        assert signal.getsignal(signal.SIGCHLD) is other
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_another_thread_closes_ends_no_handler() -> None:
    def train() -> Iterator[None]:
        with ready_to_wait():
            yield

    run = train()
    next(run)
    thread = threading.Thread(target=run.close)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    # Who gets ready next puts it right.
    with ready_to_wait():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_handlers_that_are_not_pythons_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ready_to_wait(), undisturbed():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def change() -> None:
        with ready_to_wait(), undisturbed(), waiting():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert seen == [before]


def test_nothing_is_put_back_when_the_interpreter_ends() -> None:
    # Names of modules are None by then.
    names = ["_in_main_thread", "_end_ready", "_process", "signal", "threading"]
    context = ready_to_wait(lambda: True)
    context.__enter__()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(interrupts, name, None)
            context.__exit__(None, None, None)
    finally:
        interrupts._end_ready()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
