"""Batches between the sampler that composes them and the loader that delivers them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from slap_stream.interrupts import undisturbed
from slap_stream.sampler import SlapSampler
from slap_stream.types import IntArray, State

# What a state says of pending batches.
PENDING = ("pending", "pending_progress", "progress")


class PendingBatches:
    """Composed and undelivered batches, as the batch sampler that torch's DataLoader pulls from.

    Batch t + lookahead is composed when batch t is asked for. Torch pulls ahead by its prefetch,
    which is never more than that, so how far it has pulled changes nothing.

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

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[IntArray]:
        """Hand out the undelivered batches from the first on."""
        self._pulled = 0
        return self

    def __next__(self) -> IntArray:
        if self._pulled >= len(self._pending):
            raise StopIteration
        self._pulled += 1
        return self._pending[self._pulled - 1][0]

    @property
    def undelivered(self) -> int:
        """Batches composed and not delivered yet."""
        return len(self._pending)

    @property
    def ids(self) -> IntArray:
        """(n,) sample ids of the batches composed and not delivered yet."""
        return np.concatenate([np.zeros(0, np.int64), *(batch for batch, _ in self._pending)])

    def begin(self) -> None:
        """Compose up to the lookahead; begins the next epoch if this one is all delivered."""
        if not self._pending and self._sampler.exhausted:
            self._sampler.start_next_epoch()
            self.progress = 0.0
        self._compose(self._lookahead)

    def ask(self) -> bool:
        """Compose what is due when the next batch is asked for; whether there is one."""
        self._compose(self._lookahead + 1)
        return bool(self._pending)

    def deliver(self) -> IntArray:
        """The oldest pending batch has been delivered; its (batch,) sample ids."""
        ids, self.progress = self._pending.popleft()
        self._pulled -= 1
        return ids

    def _compose(self, ahead: int) -> None:
        while len(self._pending) < ahead and not self._sampler.exhausted:
            # An interrupt after a batch was composed, and before it is here, would lose it.
            with undisturbed():
                batch = self._sampler.compose()
                if batch is None:
                    break
                self._pending.append((batch, self._sampler.progress))

    def state_dict(self) -> State:
        """The pending batches, verbatim, and how much of the epoch is done."""
        return {
            "pending": [batch.copy() for batch, _ in self._pending],
            "pending_progress": [progress for _, progress in self._pending],
            "progress": self.progress,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over this rank's part of saved pending batches, which are those of all lanes."""
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
