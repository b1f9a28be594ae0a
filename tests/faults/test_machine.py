"""A machine that has no room, no rights or no memory to share, and processes that are not alone."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import Stream, StreamingDataset

from slap_stream.errors import ShardError, WorkerError
from slap_stream.shards import cache as shard_cache
from tests.faults.test_shards import until_it_fails
from tests.helpers.forked import run_forked
from tests.loader.conftest import corpus as corpus  # fixtures
from tests.loader.conftest import let_go_soon as let_go_soon
from tests.loader.conftest import unbroken as unbroken
from tests.loader.test_loader import BATCH, make, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.001)


def _loader(corpus: Path, local: Path) -> Any:
    stream = Stream(remote=str(corpus), local=str(local), download_retry=1)
    return make(corpus, dataset=StreamingDataset(streams=[stream], batch_size=BATCH))


def _no_room(local: Path) -> Callable[[], None]:
    """Let no file grow beyond 100 bytes, as on a full disk; gives what makes room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _read_only(local: Path) -> Callable[[], None]:
    """Have the cache be somebody else's; root, who may write everywhere, becomes nobody."""
    if os.getuid() == 0:
        for path in (local.parent, *local.parent.parents):
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
        os.seteuid(65534)
        return lambda: os.seteuid(0)
    local.chmod(0o555)
    return lambda: local.chmod(0o755)


@pytest.mark.parametrize("deny", [_no_room, _read_only])
def test_a_cache_that_cannot_be_written_is_one_clear_error_and_nothing_is_lost(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path, deny: Callable[[Path], Any]
) -> None:
    local = tmp_path / "local"

    def train(rank: int) -> None:
        loader = _loader(corpus, local)
        ids = run(loader, 3)
        # What is ahead must be fetched again.
        for path in local.glob("shard.*"):
            path.unlink()
        allow = deny(local)
        with pytest.raises(ShardError, match=r"said: (OSError|PermissionError).*and disk"):
            until_it_fails(loader, ids)
        allow()
        assert ids + run(loader, 12) == unbroken[: len(ids) + 12]

    # In a process of its own: the limits and the user are the process's.
    assert run_forked(1, train) == 0


def test_whatever_a_forked_child_asks_of_its_parents_loader_it_does_not_wait(
    corpus: Path, unbroken: list[list[int]]
) -> None:
    loader = make(corpus)
    ids = run(loader, 2)
    state, batch = loader.state_dict(), {"sample_id": torch.tensor(ids[-1])}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def ask() -> None:
        for call in (
            lambda: iter(loader),
            lambda: loader.observe(batch["sample_id"], torch.ones(BATCH)),
            lambda: loader.load_state_dict(state),
            lambda: loader.sampler,
            lambda: loader.note(loss=1.0),
            lambda: loader.probe_host().probe_budget(),
            loader.close,
        ):
            try:
                call()
                sender.send("was done")
            except RuntimeError as error:
                sender.send(str(error))
        sender.send("end")

    child = context.Process(target=ask)
    child.start()
    try:
        said = []
        while not said or said[-1] != "end":
            assert receiver.poll(20.0), f"waits after {said}"
            said.append(receiver.recv())
        child.join(20.0)
        assert child.exitcode == 0, "and it ends"
    finally:
        child.kill()
        child.join()
    assert len(said) == 8
    assert all("must be used in the process that has its thread" in text for text in said[:-1])
    assert ids + run(loader, 3) == unbroken[:5]


# Where there is room for what workers hand over.
_ROOM = multiprocessing.get_context("fork").Event()


def _collate(samples: list[Any]) -> dict[str, Any]:
    batch = {"number": torch.tensor([sample["number"] for sample in samples])}
    # What torch does where shared memory is full happens here too: handing over fails.
    return batch if _ROOM.is_set() else batch | {"not to be pickled": lambda: None}


@pytest.mark.usefixtures("let_go_soon")
def test_a_batch_that_cannot_be_handed_over_is_not_waited_for_for_ever(
    corpus: Path, unbroken: list[list[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    loader = make(corpus, num_workers=1, collate_fn=_collate, worker_init_fn=started.append)
    _ROOM.clear()
    with pytest.raises(WorkerError, match=r"could not hand a batch over.*enlarge /dev/shm"):
        next(iter(loader))
    _ROOM.set()
    assert "pickle" in capfd.readouterr().err
    assert run(loader, 3) == unbroken[:3]
