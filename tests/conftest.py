"""Settings of the whole suite: no network, one thread, deterministic Hypothesis."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Models here are tiny, and threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

settings.register_profile(
    "slap",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("slap")


def pytest_configure() -> None:
    """Have Ctrl-C reach the processes of tests also where the suite runs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported is no garbage: collecting it takes half a second, time and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _datasets_have_names_of_their_own() -> Iterator[None]:
    """Number the shared memory of datasets from somewhere else than zero, as streaming does.

    Several suites may run on a machine, and two datasets that are made at the same moment may take
    the same number. It also leaves a lock file behind for every number, and looks through all of
    them for the next: on a machine of some age that takes longer than most tests.
    """
    from streaming.base.shared import prefix

    numbers = itertools.count(10**6 + 1000 * int.from_bytes(os.urandom(3), "big"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_each_prefix_int", lambda: numbers)
        yield


@pytest.fixture(autouse=True, scope="module")
def _shared_memory_is_let_go() -> Iterator[None]:
    """Close the shared memory of a module's datasets.

    streaming keeps all of it open until the process ends, which is fine for a training run; a suite
    makes hundreds of datasets and would run out of file descriptors.
    """
    module = sys.modules.get("streaming.base.shared.memory")
    if module is None:
        yield
        return
    made: list[Any] = []
    original = module.SharedMemory.__init__

    def recorded(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SharedMemory, "__init__", recorded)
        yield
    gc.collect()
    for thread in threading.enumerate():
        # Of a loader that is gone; what it fetches lies in this memory.
        if thread.name.startswith("slap-fetch"):
            thread.join(0.2)
    for memory in made:
        # A dataset that a longer-lived fixture still holds keeps its own.
        with suppress(BufferError):
            memory.cleanup()
