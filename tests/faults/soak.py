"""Two ranks train for minutes while something goes wrong every few seconds.

    python -m tests.faults.soak --minutes 10            # by hand

The ranks are one node: they share a cache that has room for half of the corpus, and fetch the rest
from a store that answers as S3 does, through streaming's own downloader. What goes wrong: whatever
the store can do (`tests/helpers/fault_server.py`), shards that are deleted, cut, emptied or spoilt
on disk, a worker that is killed, an interrupt, a rank that stands still, a disk that is full. No
process of a rank ever ends, so that memory, files, threads and shared memory can be watched.

Prints JSON: how often what went wrong, how many errors the training loops were told of, how many
samples were lost or doubled against an undisturbed run, and the resources in each
fifth of the time, of which the first is quiet.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from streaming import Stream, StreamingDataset
from streaming.base.shared import prefix

from slap_stream.errors import FeedbackError, SlapStreamError
from tests.helpers.fault_server import FAULTS, FaultServer, serving
from tests.helpers.forked import forked
from tests.helpers.killed_ranks import description_of
from tests.laws import config_of
from tests.loader.test_loader import BATCH, LOSSES, make, vectors, write_corpus

RANKS, SAMPLES = 2, 1600
STEP_SECONDS = 0.01
STALL_SECONDS = 1.0
# Of the time, for each of which the median of the resources is told; the first is quiet.
PARTS = 5


class Rank:
    """What one process does.

    Args:
        rank: Which one.
        folder: Where everything lies.
        say: File descriptor that batches and errors are written to.
        end: Shared memory: number of batches after which it ends, 0 for none yet.
    """

    def __init__(self, rank: int, folder: Path, say: int, end: mmap.mmap) -> None:
        self.rank, self.folder, self.say, self.end = rank, folder, say, end
        # While a batch is told of, nothing interrupts: what would be lost is this script's.
        self.busy = True

    def run(self) -> None:
        """Train until told to end."""
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(RANKS)}
        os.environ |= {"LOCAL_RANK": str(self.rank), "LOCAL_WORLD_SIZE": str(RANKS)}
        store = f"file://{self.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=self.rank, world_size=RANKS)
        corpus, local = self.folder / "corpus", self.folder / "local"
        total = sum(path.stat().st_size for path in corpus.iterdir())
        stream = Stream(
            remote="s3://corpus/", local=str(local), download_retry=1, download_timeout=60
        )
        dataset = StreamingDataset(
            streams=[stream], batch_size=BATCH // RANKS, cache_limit=total // 2
        )
        # Ranks may be slow to begin; shards are not waited for like that.
        stream.download_timeout = 1
        loader = make(
            corpus,
            dataset=dataset,
            embeddings=vectors(SAMPLES),
            batch_size=BATCH // RANKS,
            config=config_of(num_lanes=RANKS, lookahead=4),
            num_workers=1,
        )
        iter(loader)  # Torch's handler is there from now on.
        dies = signal.getsignal(signal.SIGCHLD)
        signal.signal(
            signal.SIGCHLD,
            lambda number, frame: None if self._spared(frame) else dies(number, frame),  # type: ignore
        )
        signal.signal(signal.SIGINT, self._interrupt)
        self._train(loader)
        self._say({"metrics": loader.metrics()})
        loader.close()

    def _train(self, loader: Any) -> None:
        told, done, batches = None, 0, None
        while not (last := struct.unpack("q", self.end[:8])[0]) or done < last:
            try:
                self.busy = False
                batches = batches or iter(loader)
                batch = next(batches, None)
                if batch is None:
                    batches = None
                else:
                    time.sleep(STEP_SECONDS)
                    self._observe(loader, batch["sample_id"])
                self.busy = True
            except (KeyboardInterrupt, RuntimeError, SlapStreamError) as error:
                self.busy = True
                batches = None
                self._say({"error": type(error).__name__, "text": str(error)[-300:]})
            delivered = loader._pending.delivered
            if delivered is not told and delivered.ids is not None and len(delivered.ids):
                told, done = delivered, done + 1
                # After an interrupt either nothing was taken in, or all of it was.
                with suppress(FeedbackError):
                    self._observe(loader, torch.tensor(delivered.ids))
                self._say({"epoch": loader._pending.epoch, "ids": delivered.ids.tolist()})

    @staticmethod
    def _observe(loader: Any, ids: torch.Tensor) -> None:
        loader.observe(ids, torch.tensor(LOSSES)[ids])

    def _interrupt(self, number: int, frame: Any) -> None:
        if not self._spared(frame):
            raise KeyboardInterrupt

    def _spared(self, frame: Any) -> bool:
        """Whether nothing may be raised here: in this script's own lines, and where Python, which
        has just forked a worker, gives logging's lock back: it ignores what is raised there, and
        all who log wait for ever."""
        return self.busy or (frame is not None and frame.f_code.co_name == "_releaseLock")

    def _say(self, what: dict[str, Any]) -> None:
        os.write(self.say, f"{json.dumps(what)}\n".encode())


class Faults:
    """What may go wrong, and how it is made to.

    Args:
        server: The store.
        local: The ranks' cache.
        pids: The ranks.
        draws: Where, and how long.

    Attributes:
        done: How often each has happened.
    """

    def __init__(
        self, server: FaultServer, local: Path, pids: list[int], draws: random.Random
    ) -> None:
        self._server, self._local, self._pids, self._draws = server, local, pids, draws
        self.done: Counter[str] = Counter()
        self._kinds = {
            **{f"store: {fault}": self._store(fault) for fault in FAULTS},
            "shards deleted": self._harm(lambda path: path.unlink(missing_ok=True)),
            "shards cut": self._harm(lambda path: os.truncate(path, path.stat().st_size // 2)),
            "shards emptied": self._harm(lambda path: os.truncate(path, 0)),
            "shards spoilt": self._harm(_spoil),
            "worker killed": self._kill_worker,
            "interrupt": lambda: os.kill(self._draws.choice(self._pids), signal.SIGINT),
            "rank stands still": self._stall,
            "disk full": self._fill,
        }
        self._next: list[str] = []

    def strike(self) -> None:
        """The next fault; all kinds come equally often."""
        if not self._next:
            self._next = list(self._kinds)
            self._draws.shuffle(self._next)
        kind = self._next.pop()
        # Gone meanwhile: a shard that was evicted, a worker that has read its last batch.
        with suppress(FileNotFoundError, psutil.NoSuchProcess, ProcessLookupError, IndexError):
            self._kinds[kind]()
            self.done[kind] += 1

    def _store(self, fault: str) -> Callable[[], None]:
        return lambda: self._server.plan.extend([fault] * self._draws.randint(1, 3))

    def _harm(self, harm: Callable[[Path], None]) -> Callable[[], None]:
        def strike() -> None:
            shards = sorted(self._local.glob("shard.*.mds"))
            for path in self._draws.sample(shards, min(3, len(shards))):
                with suppress(FileNotFoundError):
                    harm(path)

        return strike

    def _kill_worker(self) -> None:
        rank = psutil.Process(self._draws.choice(self._pids))
        workers = [
            child
            for child in rank.children()
            if not {"resource_tracker", psutil.STATUS_ZOMBIE} & {*description_of(child)}
        ]
        self._draws.choice(workers).kill()

    def _stall(self) -> None:
        pid = self._draws.choice(self._pids)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STALL_SECONDS)
        os.kill(pid, signal.SIGCONT)

    def _fill(self) -> None:
        pid = self._draws.choice(self._pids)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, before[1]))
        time.sleep(STALL_SECONDS)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def _spoil(path: Path) -> None:
    """No text any more: what is in it cannot be decoded."""
    data = path.read_bytes().replace(b"word", b"w\xffrd")
    with path.open("r+b") as file:
        file.write(data)


def resources(pids: list[int], first: int) -> dict[str, float]:
    """What the ranks hold, added up; shared memory is what streaming has made for them."""
    ranks = [psutil.Process(pid) for pid in pids]
    segments = [
        name for name in os.listdir("/dev/shm") if name[:6].isdigit() and int(name[:6]) == first
    ]
    return {
        # Not what is private: that jumps whenever a worker, which shares the most of it, is gone.
        "memory_mb": sum(rank.memory_info().rss for rank in ranks) / 2**20,
        "files": sum(rank.num_fds() for rank in ranks),
        "threads": sum(rank.num_threads() for rank in ranks),
        "shared_memory": len(segments),
    }


def main(minutes: float, seed: int, every_seconds: float) -> dict[str, Any]:
    """Run the soak."""
    # No TemporaryDirectory: the ranks, which are forks, would remove it at their end.
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        write_corpus(folder / "corpus", count=SAMPLES)
        with serving(folder / "corpus", silence_seconds=2.0) as server:
            os.environ |= server.environment
            return soak(folder, server, minutes * 60, random.Random(seed), every_seconds)
    finally:
        shutil.rmtree(folder)


def soak(
    folder: Path, server: FaultServer, seconds: float, draws: random.Random, every_seconds: float
) -> dict[str, Any]:
    """A quiet fifth of the time, then faults, then some batches more to see that all is well."""
    # Other suites may run on this machine.
    first = 900_000 + os.getpid() % 90_000
    prefix._each_prefix_int = lambda: iter(range(first, first + 5))
    end = mmap.mmap(-1, 8)
    said: list[list[dict[str, Any]]] = [[] for _ in range(RANKS)]
    pids, readers = [], []
    for rank in range(RANKS):
        out, into = os.pipe()
        pids.append(forked(Rank(rank, folder, into, end).run, own_session=True))
        os.close(into)
        readers.append(threading.Thread(target=_listen, args=(out, said[rank])))
    for reader in readers:
        reader.start()
    try:
        while not all(said):
            time.sleep(0.1)
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            assert not any(os.waitid(os.P_PID, pid, options) for pid in pids), "a rank has ended"
        began = time.monotonic()
        faults = Faults(server, folder / "local", pids, draws)
        watched: list[dict[str, float]] = []
        counts: list[tuple[float, int]] = []
        struck = began + seconds / PARTS
        while (now := time.monotonic()) < began + seconds:
            counts.append((now, _batches(said)))
            watched.append(resources(pids, first))
            if now >= struck:
                faults.strike()
                struck = now + draws.uniform(0.5, 1.5) * every_seconds
            time.sleep(min(1.0, every_seconds / 2))
        counts.append((time.monotonic(), _batches(said)))
        server.plan.clear()
        end[:8] = struct.pack("q", _batches(said) + 20)
        for pid in pids:
            assert os.waitpid(pid, 0)[1] == 0, "a rank has failed"
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    for reader in readers:
        reader.join()
    parts = [
        watched[len(watched) * k // PARTS : len(watched) * (k + 1) // PARTS] for k in range(PARTS)
    ]
    quiet = [at for at in counts if at[0] <= began + seconds / PARTS]
    return {
        "seconds": round(seconds),
        "faults": dict(sorted(faults.done.items())),
        "faults_injected": sum(faults.done.values()),
        "store_answers_spoilt": len(server.done),
        "errors_told": dict(Counter(w["error"] for each in said for w in each if "error" in w)),
        **compared(folder / "corpus", said),
        "batches_per_second": {
            "quiet": _rate(quiet),
            "with faults": _rate(counts[len(quiet) - 1 :]),
        },
        "resources": {
            name: {
                str(part): round(median(w[name] for w in parts[part]), 1) for part in range(PARTS)
            }
            for name in watched[0]
        },
        "withdrawn": sum(
            w["metrics"]["samples_withdrawn"] + w["metrics"]["shards_withdrawn"]
            for each in said
            for w in each
            if "metrics" in w
        ),
    }


def _listen(out: int, said: list[dict[str, Any]]) -> None:
    with os.fdopen(out) as lines:
        for line in lines:
            said.append(json.loads(line))


def _batches(said: list[list[dict[str, Any]]]) -> int:
    return max(sum("ids" in what for what in each) for each in said)


def _rate(counts: list[tuple[float, int]]) -> float:
    (start, before), (stop, after) = counts[0], counts[-1]
    return round((after - before) / max(1e-9, stop - start), 1)


def compared(corpus: Path, said: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What was trained on, beside what one undisturbed process trains on."""
    made = [[w for w in each if "ids" in w] for each in said]
    whole = [a["ids"] + b["ids"] for a, b in zip(*made, strict=True)]
    seen = Counter((w["epoch"], i) for each in made for w in each for i in w["ids"])
    loader = make(
        corpus,
        embeddings=vectors(SAMPLES),
        config=config_of(num_lanes=RANKS, lookahead=4),
    )
    unbroken: list[list[int]] = []
    expected: Counter[tuple[int, int]] = Counter()
    while len(unbroken) < len(whole):
        for batch in loader:
            unbroken.append(batch["sample_id"].tolist())
            expected.update((loader._pending.epoch, i) for i in unbroken[-1])
            Rank._observe(loader, batch["sample_id"])
            if len(unbroken) == len(whole):
                break
    return {
        "batches": len(whole),
        "equal": whole == unbroken,
        "samples_lost": sum((expected - seen).values()),
        "samples_doubled": sum((seen - expected).values()),
    }


if __name__ == "__main__":
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    line.add_argument("--minutes", type=float, default=10.0)
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--every-seconds", type=float, default=2.0)
    arguments = line.parse_args()
    print(json.dumps(main(arguments.minutes, arguments.seed, arguments.every_seconds), indent=1))
