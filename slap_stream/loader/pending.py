"""Batches between the sampler that composes them and the loader that delivers them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from slap_stream.core.background import Background, BackgroundThread
from slap_stream.core.interrupts import undisturbed
from slap_stream.selection.sampler import SlapSampler
from slap_stream.types import IntArray, State


class PendingBatches:
    """Composed and undelivered batches, as the batch sampler that torch's DataLoader pulls from.

    Batch t + lookahead is composed once batch t is asked for, from feedback through batch t - 1: in
    the background, while batch t is trained on. Torch pulls ahead by its prefetch, which is never
    more than that, so how far it has pulled changes nothing.

    Args:
        sampler: Composes the batches.

    Attributes:
        progress: Share of the epoch that is done after the batch delivered last.
    """

    def __init__(self, sampler: SlapSampler) -> None:
        self._sampler = sampler
        self._lookahead = sampler.config.lookahead
        # Each with the share of the epoch that is done after it.
        self._pending: deque[tuple[IntArray, float]] = deque()
        self.progress = 0.0
        self._pulled = 0
        self._background = BackgroundThread("slap-compose-ahead")
        self._ahead: Background[list[tuple[IntArray, float]]] | None = None
        self._settling = threading.Lock()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[IntArray]:
        """Hand out the undelivered batches from the first on."""
        self._pulled = 0
        return self

    def __next__(self) -> IntArray:
        if self._pulled >= len(self._pending):
            # Torch wants the one that would have been composed in the background.
            self._compose(self._lookahead + 1)
        if self._pulled >= len(self._pending):
            raise StopIteration
        self._pulled += 1
        return self._pending[self._pulled - 1][0]

    @property
    def undelivered(self) -> int:
        """Batches composed and not delivered yet."""
        self.settle()
        return len(self._pending)

    @property
    def finished(self) -> bool:
        """Whether the epoch's last batch has been delivered."""
        if self._pending:
            return False
        self.settle()
        return not self._pending and self._sampler.exhausted

    @property
    def ids(self) -> IntArray:
        """(n,) sample ids of the batches composed and not delivered yet."""
        self.settle()
        return np.concatenate([np.zeros(0, np.int64), *(batch for batch, _ in self._pending)])

    def begin(self) -> None:
        """Compose up to the lookahead; begins the next epoch if this one is all delivered."""
        if self.finished:
            self._sampler.start_next_epoch()
            self.progress = 0.0
        self._compose(self._lookahead)

    def ask(self) -> bool:
        """Have the next batch at hand; whether there is one."""
        self._compose(max(1, self._lookahead))
        return bool(self._pending)

    @contextmanager
    def delivering(self) -> Iterator[IntArray]:
        """Context that gives the oldest pending batch's (batch,) sample ids; after it the batch has
        been delivered, and what has been due since it was asked for is composed in the background.

        After an error or an interrupt the batch is still pending.
        """
        before, oldest = self.progress, self._pending[0]
        try:
            with undisturbed():
                ids, self.progress = self._pending.popleft()
                yield ids
                self._pulled -= 1
                self._compose_ahead()
        except BaseException:
            # Whoever iterates anew pulls from the first on; this iteration has ended.
            self._pending.appendleft(oldest)
            self.progress = before
            raise

    def _compose_ahead(self) -> None:
        due = len(self._pending) < self._lookahead and not self._sampler.exhausted
        if due and self._ahead is None:
            self._ahead = self._background.start(self._composed)

    def settle(self) -> None:
        """Wait for what is composed in the background.

        If that has failed, this does not raise: who asks for the next batch is told.
        """
        ahead = self._ahead
        if ahead is not None and ahead.wait():
            # Another thread may ask for metrics.
            with undisturbed(), self._settling:
                if self._ahead is ahead:
                    self._ahead = None
                    self._pending.extend(ahead.get())

    def _compose(self, count: int) -> None:
        """Compose until so many batches are pending, or the epoch has no more."""
        self.settle()
        if self._ahead is not None:
            failed, self._ahead = self._ahead, None
            failed.get()
        while len(self._pending) < count and not self._sampler.exhausted:
            # An interrupt after a batch was composed, and before it is here, would lose it.
            with undisturbed():
                composed = self._composed()
                self._pending.extend(composed)
            if not composed:
                break

    def _composed(self) -> list[tuple[IntArray, float]]:
        """The next batch and the share of the epoch that is done after it; none if a refresh has
        found that there are none left."""
        batch = self._sampler.compose()
        return [] if batch is None else [(batch, self._sampler.progress)]

    def state_dict(self) -> State:
        """The pending batches, verbatim, and how much of the epoch is done."""
        self.settle()
        return {
            "pending": [batch.copy() for batch, _ in self._pending],
            "pending_progress": [progress for _, progress in self._pending],
            "progress": self.progress,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over this rank's part of saved pending batches, which are those of all lanes."""
        self._ahead = None
        size = self._sampler.batch_size
        mine = slice(self._sampler.rank * size, (self._sampler.rank + 1) * size)
        batches = [np.array(batch, np.int64)[mine] for batch in state["pending"]]
        self._pending = deque(zip(batches, map(float, state["pending_progress"]), strict=True))
        self.progress = float(state["progress"])


def join_pending(states: Sequence[State]) -> State:
    """One state of all ranks' pending batches, whose lanes follow each other as the ranks do.

    Args:
        states: Each rank's `PendingBatches.state_dict()`, by rank.
    """
    batches = zip(*(state["pending"] for state in states), strict=True)
    return {**states[0], "pending": [np.concatenate(parts) for parts in batches]}
