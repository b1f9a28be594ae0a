"""Fetches and verifies shards ahead of the sampler, in threads; withdraws the damaged ones."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from slap_stream.config import OnBadShard
from slap_stream.errors import DamagedShardError, ShardError
from slap_stream.shards.cache import DEADLINE_SECONDS, ShardCache
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

    Only a shard that failed its verification is ever withdrawn. One that cannot be fetched (no
    network, no credentials, no file of that name, no room) is tried again for a while, then raised:
    that says nothing about the shard, and may be so of all of them.

    Args:
        dataset: The `StreamingDataset`.
        counts: (num_shards,) candidates that an epoch offers from each; None: every sample once.
        on_bad_shard: `raise` stops at a damaged shard; `skip` withdraws it, logged.
        max_withdrawn: Fraction of the dataset's candidates, in [0, 1], beyond which so many are in
            damaged shards that this process has met that it stops.
        deadline_seconds: Time after which a shard that has not arrived raises.
        num_threads: Shards fetched at the same time.
        ranks_on_node: Ranks that share the node's `cache_limit`.
        embedded: Hashes of what was embedded, by shards of which the index has none.
    """

    def __init__(
        self,
        dataset: Any,
        counts: IntArray | None = None,
        *,
        on_bad_shard: OnBadShard = "raise",
        max_withdrawn: float = 0.01,
        deadline_seconds: float = DEADLINE_SECONDS,
        num_threads: int = 4,
        ranks_on_node: int = 1,
        embedded: Mapping[int, str] | None = None,
    ) -> None:
        self.on_bad_shard = on_bad_shard
        self.max_withdrawn = max_withdrawn
        self.deadline_seconds = deadline_seconds
        self._counts = np.asarray(dataset.samples_per_shard if counts is None else counts, np.int64)
        self._cache = ShardCache(dataset, deadline_seconds, embedded)
        self._jobs: dict[int, _Job] = {}
        self._verified: set[int] = set()
        self._held: set[int] = set()
        self._room_bytes = self._cache.room_bytes(ranks_on_node)
        self._withdrawn: set[int] = set()
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
                args=(self._queue, self._cache),
                name=f"slap-fetch-{index}",
                daemon=True,
            )
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._queue, self._cache, num_threads)
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
            DamagedShardError: If a shard is damaged and to be raised.
            AlignmentError: If one is not what was embedded.
            ShardError: If a shard cannot be fetched or has not arrived by the deadline, or if too
                many candidates are withdrawn.
        """
        started = monotonic()
        wanted = [int(shard_id) for shard_id in shard_ids]
        waiting = [job for job in (self._submit(s, _REQUIRED) for s in wanted) if job is not None]
        for job in waiting:
            self._settle(job, started)
        self._wait_seconds += monotonic() - started
        # Also when nothing has just been withdrawn: who goes on after the error meets it again.
        lost, total = self._withdrawn_candidates(), int(self._counts.sum())
        if lost > self.max_withdrawn * total:
            raise ShardError(
                f"withdrawn candidates must be at most max_withdrawn = {self.max_withdrawn:g} of "
                f"the dataset's, got {lost} of {total} in {len(self._withdrawn)} damaged shards, "
                f"first {sorted(self._withdrawn)[:5]}; restore these shards, or go on from the "
                "last state with a larger max_withdrawn."
            )
        return np.array(sorted(self._withdrawn.intersection(wanted)), np.int64)

    @property
    def withdrawn_fraction(self) -> float:
        """Of the dataset's candidates, in [0, 1]."""
        return self._withdrawn_candidates() / max(1, int(self._counts.sum()))

    def metrics(self) -> dict[str, float]:
        """Counts since the start; seconds are those that `require` made its caller wait."""
        return {
            "shards_verified": float(len(self._verified)),
            "shards_fetched": float(self._fetched),
            "shards_withdrawn": float(len(self._withdrawn)),
            "shard_retries": float(self._cache.retries),
            "shard_bytes_fetched": float(self._bytes_fetched),
            "shard_wait_seconds": self._wait_seconds,
            "withdrawn_fraction": self.withdrawn_fraction,
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
        if shard_id in self._withdrawn:
            return None
        job = self._jobs.get(shard_id)
        if job is not None and job.future.done() and self._outdated(job, priority):
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

    def _outdated(self, job: _Job, priority: int) -> bool:
        """Whether how a job ended says nothing about now."""
        error = job.future.exception()
        if error is None:
            # `cache_limit` may have evicted the shard.
            return not self._cache.present(job.shard_id)
        # What kept a hinted shard away may be over by the time it is required.
        return priority == _REQUIRED and not isinstance(error, DamagedShardError)

    def _settle(self, job: _Job, started: float) -> None:
        """Wait for a job and note how it ended."""
        shard_id = job.shard_id
        if not wait([job.future], max(0.0, self.deadline_seconds - (monotonic() - started))).done:
            raise ShardError(
                f"shard {shard_id} must arrive within {self.deadline_seconds:g} seconds, got no "
                "answer; check the remote and the network, and go on from the last state."
            )
        # Forgotten however it ended, so that who mends the shard can require it again.
        self._jobs.pop(shard_id, None)
        self._verified.discard(shard_id)
        try:
            added = job.future.result()
        except DamagedShardError as error:
            if self.on_bad_shard == "raise":
                raise
            logger.warning(
                "shard %d is damaged, its %d candidates are withdrawn: %s",
                shard_id,
                self._counts[shard_id],
                error.__cause__,
            )
            self._withdrawn.add(shard_id)
            return
        self._verified.add(shard_id)
        self._fetched += added > 0
        self._bytes_fetched += added

    def _withdrawn_candidates(self) -> int:
        return int(self._counts[list(self._withdrawn)].sum())


def _work(jobs: _Queue, cache: ShardCache) -> None:
    while (job := jobs.get()[2]) is not None:
        if job.claim.acquire(blocking=False):
            try:
                job.future.set_result(cache.ensure(job.shard_id))
            except BaseException as error:
                job.future.set_exception(error)
        # Its error holds the frames that it was raised through, and so a loader perhaps.
        del job


def _stop(jobs: _Queue, cache: ShardCache, num_threads: int) -> None:
    cache.stop()
    try:
        while True:
            jobs.get_nowait()
    except queue.Empty:
        for index in range(num_threads):
            jobs.put((_STOP, index, None))
