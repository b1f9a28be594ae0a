"""Worker processes: what is said when one dies, and what they draw."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slap_stream.errors import WorkerError
from slap_stream.loader.workers import describe_dead
from tests.laws import config_of
from tests.loader.test_loader import feed, make, run


@pytest.mark.usefixtures("let_go_soon")
# Torch looks for free file handles when a worker has gone; its own signal handler may raise there.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning"
)
def test_a_worker_that_dies_is_named_and_replaced(corpus: Path, unbroken: list[list[int]]) -> None:
    loader = make(corpus, num_workers=2, persistent_workers=True)
    batches = iter(loader)
    ids = [feed(loader, next(batches))]
    victim = loader._iterator._workers[1]
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=rf"worker 1 \(pid {victim.pid}\) .* SIGKILL: .* memory"):
        ids.extend(feed(loader, batch) for batch in batches)
    assert time.monotonic() - began < 10
    assert ids + run(loader, 10) == unbroken[: len(ids) + 10]


def train_while(killed: int) -> None:
    """Stands for a training step in which a worker is killed: nothing of ours is called."""
    os.kill(killed, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.usefixtures("let_go_soon")
def test_a_worker_that_dies_during_a_step_ends_it_with_torchs_error(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = make(corpus, num_workers=2, persistent_workers=True)
    batches = iter(loader)
    ids = [feed(loader, next(batches))]
    victim = loader._iterator._workers[0].pid
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {victim}\) is killed by"):
        train_while(victim)
    with pytest.raises(WorkerError, match=rf"worker 0 \(pid {victim}\) that was killed by SIGKILL"):
        ids.extend(feed(loader, batch) for batch in batches)
    assert ids + run(loader, 5) == unbroken[: len(ids) + 5]
    # Torch's, once there are workers, or whatever was there: never one of ours.
    assert "slap_stream" not in getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")
    assert handler is None or "slap_stream" not in getattr(handler, "__module__", "")


def test_an_error_of_the_callers_own_code_in_a_worker_stays_what_it_is(corpus: Path) -> None:
    loader = make(corpus, num_workers=1, collate_fn=fail)
    with pytest.raises(RuntimeError, match="no such thing") as caught:
        next(iter(loader))
    assert not isinstance(caught.value, WorkerError)


def fail(samples: list[Any]) -> Any:
    raise RuntimeError("no such thing")


def drawn(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Stands for augmentation: numbers that a worker draws."""
    return {"torch": torch.rand(4), "numpy": torch.from_numpy(np.random.random(4))}


def draws_of(loader: Any, batches: int) -> list[list[float]]:
    found: list[list[float]] = []
    while len(found) < batches:
        for batch in islice(loader, batches - len(found)):
            found.append([*batch["torch"].tolist(), *batch["numpy"].tolist()])
    return found


def test_a_resumed_runs_workers_do_not_draw_again_what_they_drew(corpus: Path) -> None:
    options = {"num_workers": 1, "collate_fn": drawn}
    loader = make(corpus, **options)
    before = draws_of(loader, 3)
    state = loader.state_dict()
    after = []
    for _ in range(2):
        again = make(corpus, **options)
        again.load_state_dict(state)
        after.append(draws_of(again, 3))
    assert after[0] == after[1], "from one state on, the same draws"
    numbers = [number for batch in before + after[0] for number in batch]
    assert len(set(numbers)) == len(numbers)
    # Nor is an epoch like the one before, nor a run of another seed.
    steps = len(loader)
    epochs = draws_of(make(corpus, **options), 2 * steps)
    assert epochs[:3] == before
    assert not set(map(tuple, epochs[:steps])) & set(map(tuple, epochs[steps:]))
    other = draws_of(make(corpus, config=config_of(num_lanes=2, lookahead=4, seed=1), **options), 3)
    assert other != before


def test_a_worker_that_dies_while_it_hands_a_batch_over_is_told_too() -> None:
    context = multiprocessing.get_context("fork")
    living = context.Process(target=time.sleep, args=(60,))
    dying = context.Process(target=os._exit, args=(3,))
    living.start()
    dying.start()
    try:
        message = describe_dead([living, dying], ConnectionResetError("reset by peer"))
        assert message is not None
        assert f"worker 1 (pid {dying.pid}) that exited with code 3" in message
        assert describe_dead([living], RuntimeError("something else")) is None
    finally:
        living.kill()
        living.join()
        dying.join()
