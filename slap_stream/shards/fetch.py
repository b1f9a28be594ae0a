"""Fetches and verifies shards ahead of the sampler, in threads, and withdraws the bad ones."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from slap_stream.config import OnBadShard
from slap_stream.errors import ConfigError, ShardError
from slap_stream.shards.cache import ShardCache
from slap_stream.types import IntArray

logger = logging.getLogger(__name__)

_REQUIRED, _HINTED, _STOP = 0, 1, 2
CLOSE_SECONDS = 5.0


@dataclass(slots=True)
class _Job:
    """One shard to fetch; may be queued twice, when a hinted shard becomes required."""

    shard_id: int
    future: Future[int] = field(default_factory=Future)
    claim: threading.Lock = field(default_factory=threading.Lock)


_Queue = queue.PriorityQueue[tuple[int, int, _Job | None]]


class ShardFetcher:
    """Makes sure that shards are on disk and whole before their candidates are offered.

    A shard is verified once per process: size, MDS header, and a hash if its index has one. Holds
    which shards are verified, which are withdrawn, and what is being fetched; nothing of it is
    saved, since a resumed run verifies again. To be called from one thread.

    Args:
        dataset: The `StreamingDataset`.
        on_bad_shard: `raise` stops at a shard that stays bad; `skip` withdraws it, logged.
        deadline_seconds: Time after which a shard that has not arrived raises, also with `skip`: a
            remote that does not answer says nothing about the shard.
        num_threads: Shards fetched at the same time.
        ranks_on_node: Ranks that share the node's `cache_limit`.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        on_bad_shard: OnBadShard = "raise",
        deadline_seconds: float = 600.0,
        num_threads: int = 4,
        ranks_on_node: int = 1,
    ) -> None:
        if on_bad_shard not in ("raise", "skip"):
            raise ConfigError(f"on_bad_shard must be one of raise, skip, got {on_bad_shard!r}.")
        if not deadline_seconds > 0:
            raise ConfigError(f"deadline_seconds must be positive, got {deadline_seconds!r}.")
        if num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {num_threads!r}.")
        self.on_bad_shard = on_bad_shard
        self.deadline_seconds = deadline_seconds
        self._cache = ShardCache(dataset)
        self._jobs: dict[int, _Job] = {}
        self._verified: set[int] = set()
        self._held: set[int] = set()
        self._room_bytes = self._cache.room_bytes(ranks_on_node)
        self._bad: set[int] = set()
        self._fetched = 0
        self._bytes_fetched = 0
        self._wait_seconds = 0.0
        self._queue: _Queue = queue.PriorityQueue()
        self._ticket = itertools.count()
        # Daemon threads: a download that hangs must not keep the process from ending. They know
        # the queue and not the fetcher, so that a forgotten fetcher ends them.
        self._threads = [
            threading.Thread(
                target=_work,
                args=(self._queue, self._cache, deadline_seconds),
                name=f"slap-fetch-{index}",
                daemon=True,
            )
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._queue, num_threads)
        # Not at exit: daemon threads just end, and a forked child must not wait for their lock.
        self._finalizer.atexit = False

    def hint(self, shard_ids: IntArray) -> None:
        """Start fetching these shards in the background; returns at once.

        With a `cache_limit` it does nothing: `hold` knows whether there is room.

        Args:
            shard_ids: (n,) shards in the order they will be needed.
        """
        if self.limited:
            return
        for shard_id in shard_ids.tolist():
            self._submit(shard_id, _HINTED)

    @property
    def limited(self) -> bool:
        """Whether shards are evicted, so that `hold` must be told which are needed."""
        return self._room_bytes is not None

    def hold(self, now: IntArray, soon: IntArray) -> None:
        """Keep shards from being evicted, and fetch the next ones as far as they fit beside them.

        Eviction by last use alone would throw away what was fetched ahead and not read yet.

        Args:
            now: (n,) shards of candidates and samples that wait to be read.
            soon: (m,) shards in the order they will be needed.
        """
        if self._room_bytes is None:
            return
        held = set(now.tolist())
        left = self._room_bytes - sum(map(self._cache.max_bytes, held))
        ahead = []
        for shard_id in soon.tolist():
            if shard_id not in held:
                left -= self._cache.max_bytes(shard_id)
                if left < 0:
                    break
                held.add(shard_id)
            ahead.append(shard_id)
        # Anew each time: another rank of the node may have released what this one needs.
        self._cache.pin(list(held), list(self._held - held))
        self._held = held
        for shard_id in ahead:
            self._submit(shard_id, _HINTED)

    def require(self, shard_ids: IntArray) -> IntArray:
        """Wait until these shards are on disk and verified.

        Args:
            shard_ids: (n,) shards.

        Returns:
            (num_bad,) those of them to withdraw, ascending; empty unless `on_bad_shard` is `skip`.

        Raises:
            ShardError: If a shard is bad and to be raised, or has not arrived by the deadline.
        """
        started = monotonic()
        wanted = [int(shard_id) for shard_id in shard_ids]
        waiting = [job for job in (self._submit(s, _REQUIRED) for s in wanted) if job is not None]
        for job in waiting:
            self._settle(job, started)
        self._wait_seconds += monotonic() - started
        return np.array(sorted(self._bad.intersection(wanted)), np.int64)

    def metrics(self) -> dict[str, float]:
        """Counts since the start; seconds are those that `require` made its caller wait."""
        return {
            "shards_verified": float(len(self._verified)),
            "shards_fetched": float(self._fetched),
            "shards_bad": float(len(self._bad)),
            "shard_bytes_fetched": float(self._bytes_fetched),
            "shard_wait_seconds": self._wait_seconds,
        }

    def close(self) -> None:
        """End the threads; what is queued is dropped, what is being fetched may finish."""
        self._finalizer()
        end = monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))

    def _submit(self, shard_id: int, priority: int) -> _Job | None:
        """Queue a shard unless it is at hand or withdrawn; the job to wait for, if any."""
        if not self._finalizer.alive:
            raise ShardError("fetcher must be open, got a closed one; make another.")
        if shard_id in self._bad:
            return None
        # Presence is looked up every time, since `cache_limit` may have evicted the shard.
        job = self._jobs.get(shard_id)
        if job is not None and _arrived(job) and not self._cache.present(shard_id):
            job = None
        if job is None:
            if shard_id in self._verified and self._cache.present(shard_id):
                self._cache.touch(shard_id)
                return None
            job = self._jobs[shard_id] = _Job(shard_id)
        elif priority == _HINTED or job.claim.locked():
            return job
        self._queue.put((priority, next(self._ticket), job))
        return job

    def _settle(self, job: _Job, started: float) -> None:
        """Wait for a job and note how it ended."""
        left = self.deadline_seconds - (monotonic() - started)
        try:
            added = job.future.result(timeout=max(0.0, left))
        except TimeoutError as error:
            raise ShardError(
                f"shard {job.shard_id} must arrive within {self.deadline_seconds:g} seconds, got "
                "no answer; check the remote and the network, or raise deadline_seconds."
            ) from error
        except ShardError as error:
            # Forgotten, so that a caller who mends the shard can require it again.
            del self._jobs[job.shard_id]
            self._verified.discard(job.shard_id)
            if isinstance(error.__cause__, TimeoutError):
                raise
            if self.on_bad_shard == "raise":
                raise ShardError(
                    f"{str(error).rstrip('.')}, or withdraw it with on_bad_shard='skip'."
                ) from error.__cause__
            logger.warning("a bad shard's candidates are withdrawn: %s", error)
            self._bad.add(job.shard_id)
            return
        self._jobs.pop(job.shard_id, None)
        self._verified.add(job.shard_id)
        self._fetched += added > 0
        self._bytes_fetched += added


def _arrived(job: _Job) -> bool:
    return job.future.done() and job.future.exception() is None


def _work(jobs: _Queue, cache: ShardCache, deadline_seconds: float) -> None:
    while True:
        _, _, job = jobs.get()
        if job is None:
            return
        if not job.claim.acquire(blocking=False):
            continue
        try:
            job.future.set_result(cache.ensure(job.shard_id, monotonic() + deadline_seconds))
        except BaseException as error:
            job.future.set_exception(error)


def _stop(jobs: _Queue, num_threads: int) -> None:
    try:
        while True:
            jobs.get_nowait()
    except queue.Empty:
        for index in range(num_threads):
            jobs.put((_STOP, index, None))
