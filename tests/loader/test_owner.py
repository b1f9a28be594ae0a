"""One thread owns the sampler: interrupts, other threads and dying workers lose no batch."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from slap_stream.errors import FeedbackError
from tests.helpers.every_line import LOADER, PASSING, at_every_line
from tests.laws import as_json, config_of
from tests.loader.test_loader import feed, make, run


def test_another_thread_may_ask_for_metrics_between_any_two_lines(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    draws, ids, done = random.Random(0), list[list[int]](), threading.Event()

    def linger() -> None:
        # So that the training loop comes into every gap between two lines of the other thread.
        if threading.current_thread().name == "watch":
            time.sleep(0.003)

    with at_every_line(PASSING, linger):
        loader = make(corpus)

        def watch() -> None:
            while not done.is_set():
                loader.metrics()

        thread = threading.Thread(target=watch, name="watch")
        thread.start()
        try:
            while len(ids) < len(unbroken):
                for batch in loader:
                    time.sleep(draws.uniform(0.0, 0.02))  # a training step
                    ids.append(feed(loader, batch))
        finally:
            done.set()
            thread.join()
    assert ids == unbroken


@pytest.mark.parametrize(("lookahead", "prepared"), [(0, False), (4, True)])
def test_a_batch_is_pending_whichever_line_of_its_delivery_is_interrupted(
    corpus: Path, lookahead: int, prepared: bool
) -> None:
    config = config_of(num_lanes=2, lookahead=lookahead)
    loader = make(corpus, config=config)
    run(loader, 3)
    state = loader.state_dict()
    expected = run(loader, 2)
    for lines in range(500):
        loader = make(corpus, config=config)
        if prepared:
            Accelerator(cpu=True).prepare(loader)
        loader.load_state_dict(state)
        batches, left = iter(loader), [lines]

        def interrupt(left: list[int] = left) -> None:
            left[0] -= threading.current_thread() is threading.main_thread()
            if left[0] == -1:
                raise KeyboardInterrupt

        try:
            with at_every_line(LOADER, interrupt):
                batch = next(batches)
        except KeyboardInterrupt:
            # Ended, unless the interrupt came before anything was done.
            batch = next(batches, None) or next(iter(loader))
        assert batch["sample_id"].tolist() == expected[0]
        if left[0] >= 0:
            break
    assert 20 < lines < 499
    feed(loader, batch)
    assert run(loader, 1) == expected[1:]


@pytest.mark.parametrize(("lookahead", "seed"), [(0, 1), (1, 2), (4, 3)])
def test_an_interrupt_at_any_line_loses_nothing(corpus: Path, lookahead: int, seed: int) -> None:
    config, draws = config_of(num_lanes=2, lookahead=lookahead), random.Random(seed)
    expected = run(make(corpus, config=config), 60)
    kept: list[list[int]] = []
    loader = make(corpus, config=config)
    interrupts, until = 0, draws.randrange(150)

    def interrupt() -> None:
        nonlocal until
        until -= threading.current_thread() is threading.main_thread()
        if until < 0:
            until = draws.randrange(150)
            raise KeyboardInterrupt

    while len(kept) < 40:
        fed = True
        with at_every_line(LOADER, interrupt):
            try:
                for batch in loader:
                    kept.append(batch["sample_id"].tolist())
                    fed = False
                    feed(loader, batch)
                    fed = True
            except KeyboardInterrupt:
                interrupts += 1
        # What the loop's body was given is delivered, and nothing else.
        state = loader.state_dict()
        if state["pending"]:
            assert state["pending"][0].tolist() == expected[len(kept)]
        if not fed:
            # Either nothing was taken in, or all of it was.
            with contextlib.suppress(FeedbackError):
                feed(loader, batch)
    assert kept == expected[: len(kept)]
    assert interrupts >= 20


@pytest.mark.parametrize(
    ("part", "method"),
    [("_composer", "leaving"), ("_scorer", "bring_near"), ("feedback", "take_trained")],
)
def test_an_interrupt_in_the_middle_of_a_batch_loses_nothing(
    part: str,
    method: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Composed in the background, where nobody is interrupted, unless there is no lookahead.
    config = config_of(num_lanes=2, lookahead=4 if method == "take_trained" else 0)
    expected = run(make(corpus, config=config), 30)
    loader = make(corpus, config=config)
    owner = getattr(loader.sampler.lanes[0], part)
    original = getattr(owner, method)
    calls = 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, method, interrupted)
    ids: list[list[int]] = []
    interrupts = 0
    while len(ids) < 30:
        try:
            for batch in loader:
                ids.append(batch["sample_id"].tolist())
                feed(loader, batch)
        except KeyboardInterrupt:
            interrupts += 1
    assert ids[:30] == expected
    assert interrupts >= 5


def interrupt_the_loader(number: int, frame: Any) -> None:
    """A handler of Ctrl-C that spares the test's own lines: what they lose is their loss."""
    while frame is not None:
        if "slap_stream" in Path(frame.f_code.co_filename).parts:
            raise KeyboardInterrupt
        frame = None if frame.f_code.co_filename == __file__ else frame.f_back


@pytest.mark.usefixtures("let_go_soon")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupt_while_a_batch_is_composed_in_the_background_loses_nothing(
    corpus: Path, unbroken: list[list[int]], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(corpus, num_workers=num_workers)
    lane = loader.sampler.lanes[0]
    original, threads = lane.prepare, set[str]()
    kept: list[list[int]] = []

    def slow() -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.005)
        if len(kept) % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.005)
        original()

    monkeypatch.setattr(lane, "prepare", slow)
    before = signal.signal(signal.SIGINT, interrupt_the_loader)
    interrupts = 0
    try:
        batches = None
        while len(kept) < 30:
            try:
                batches = batches or iter(loader)
                batch = next(batches)
            except (KeyboardInterrupt, StopIteration) as ended:
                interrupts += isinstance(ended, KeyboardInterrupt)
                batches = None
                continue
            kept.append(batch["sample_id"].tolist())
            fed = False
            while not fed:
                # After an interrupt either nothing was taken in, or all of it was.
                try:
                    feed(loader, batch)
                    fed = True
                except KeyboardInterrupt:
                    interrupts += 1
                except FeedbackError:
                    fed = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept == unbroken[:30]
    assert interrupts >= 5
    assert threads == {"slap-sampler"}


def test_who_asks_for_the_next_batch_is_told_what_failed_in_the_background(
    corpus: Path, unbroken: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(corpus)
    lane = loader.sampler.lanes[1]
    batches = iter(loader)
    ids = [feed(loader, next(batches))]

    def fail() -> None:
        raise OSError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(lane, "prepare", fail)
        ids.append(feed(loader, next(batches)))
        # Everything else goes on as before.
        loader.metrics()
        state = as_json(loader.state_dict())
        with pytest.raises(OSError, match="no such luck"):
            next(batches)
    assert ids + run(loader, 20) == unbroken[:22]
    other = make(corpus)
    other.load_state_dict(state)
    assert ids + run(other, 20) == unbroken[:22]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterator_that_another_has_taken_over_from_ends(
    corpus: Path, unbroken: list[list[int]], num_workers: int
) -> None:
    loader = make(corpus, num_workers=num_workers)
    first = iter(loader)
    ids = [feed(loader, next(first))]
    second = iter(loader)
    ids.append(feed(loader, next(second)))
    with pytest.raises(RuntimeError, match=r"must not be used on after .* a new iteration"):
        next(first)
    ids.append(feed(loader, next(second)))
    assert ids == unbroken[:3]


def test_who_is_interrupted_while_waiting_finds_the_call_done(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(corpus)
    batch = next(iter(loader))
    lane = loader.sampler.lanes[0]
    original = lane.feedback.take_trained

    def slow(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return original(*arguments, **named)

    monkeypatch.setattr(lane.feedback, "take_trained", slow)
    with pytest.raises(KeyboardInterrupt):
        feed(loader, batch)
    assert loader.metrics()["observed"] == len(batch["sample_id"])


def test_a_handler_of_a_signal_may_save_the_state_between_any_two_lines(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    draws, states = random.Random(0), list[Any]()
    kept: list[list[int]] = []

    def save() -> None:
        if threading.current_thread() is threading.main_thread() and not draws.randrange(25):
            sys.settrace(None)
            states.append((len(kept), as_json(loader.state_dict())))

    loader = make(corpus)
    batches = iter(loader)
    while len(kept) < 20:
        with at_every_line(LOADER, save):
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(loader)
                continue
        kept.append(feed(loader, batch))
    assert kept == unbroken[:20]
    assert len(states) >= 10
    for done, state in states[::3]:
        again = make(corpus)
        again.load_state_dict(state)
        assert run(again, 3) == unbroken[done : done + 3]


def test_a_forked_process_is_told_that_the_loader_is_its_parents(corpus: Path) -> None:
    loader = make(corpus)
    batches = iter(loader)
    next(batches)
    loader.metrics()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def ask() -> None:
        for call in (loader.metrics, loader.state_dict, lambda: next(batches)):
            try:
                call()
            except RuntimeError as error:
                sender.send(str(error))

    child = context.Process(target=ask)
    child.start()
    try:
        for _ in range(3):
            assert receiver.poll(10.0)
            message = receiver.recv()
            assert "slap-sampler must be used in the process that has its thread" in message
    finally:
        child.kill()
        child.join()


def test_the_thread_ends_with_the_loader(corpus: Path) -> None:
    before = set(threading.enumerate())
    loader = make(corpus)
    run(loader, 3)
    [owner] = [t for t in set(threading.enumerate()) - before if t.name == "slap-sampler"]
    del loader
    gc.collect()
    owner.join(5.0)
    assert not owner.is_alive()


def test_a_process_ends_in_the_middle_of_an_epoch(corpus: Path) -> None:
    program = (
        "from pathlib import Path; from tests.loader.test_loader import make; import sys;"
        "loader = make(Path(sys.argv[1])); batches = iter(loader); next(batches); print('done')"
    )
    command = [sys.executable, "-c", program, str(corpus)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
