"""Settings of the whole suite: no network, one thread, deterministic Hypothesis."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# streaming leaves a lock file behind for every dataset, and looks through all that ever were before
# it makes another: on a machine of some age that takes longer than most tests.
_TEMPORARY = tempfile.gettempdir()
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _TEMPORARY)
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="slap-stream-tests-")

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


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """What was imported is no garbage: collecting it takes half a second, time and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _datasets_are_made_in_turn() -> Iterator[None]:
    """Several suites may run on a machine, and streaming's names for shared memory collide."""
    from filelock import FileLock
    from streaming import StreamingDataset

    original = StreamingDataset.__init__
    turn = FileLock(Path(_TEMPORARY, "slap_stream_tests.lock"), mode=0o666)

    def in_turn(self: Any, *arguments: Any, **options: Any) -> None:
        with turn:
            original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamingDataset, "__init__", in_turn)
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
    for memory in made:
        # A dataset that a longer-lived fixture still holds keeps its own.
        with suppress(BufferError):
            memory.cleanup()
