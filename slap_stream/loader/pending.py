"""Batches between the sampler that composes them and the loop that trains on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np

from slap_stream.core.background import BackgroundThread
from slap_stream.core.saved import Saved
from slap_stream.loader.dealing import deal_by_length
from slap_stream.selection.sampler import SlapSampler
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.types import IntArray, State


@dataclass(frozen=True, slots=True, eq=False)
class ComposedBatch:
    """A batch of this rank.

    Attributes:
        number: Of the batch, counted over all that this loader has had.
        ids: (batch,) sample ids.
        progress: Share of the epoch that is done after it.
        dealt: Whether its samples are final: those of an optimizer step are dealt once all of its
            batches are composed.
    """

    number: int
    ids: IntArray
    progress: float
    dealt: bool


class PendingBatches:
    """Composed and undelivered batches, as the batch sampler that torch's DataLoader pulls from.

    Batch t + lookahead is composed once batch t is asked for, from feedback through batch t - 1: in
    the background, while batch t is trained on. Torch pulls ahead by its prefetch, which is never
    more than that, so how far it has pulled changes nothing. With `length_grouping` the batches of
    an optimizer step are composed together, so that some come earlier: those up to the end of the
    step that batch t + lookahead belongs to.

    The sampler is its owner's: whatever reads or changes it is called in that thread. The thread
    alone says which batches are composed, by a new tuple each time, which any other may read. The
    training loop's thread alone says which of them was delivered last, by a single assignment: so
    an interrupt finds a batch either pending or delivered.

    Args:
        sampler: Composes the batches.
        owner: The thread that owns the sampler.
        composed: Is told of each batch that is composed, in that thread, how long it has taken.

    Attributes:
        delivered: The batch delivered last; one of no samples at the start of an epoch.
        epoch: Epoch of the batches composed last, counted from 0.
    """

    def __init__(
        self,
        sampler: SlapSampler,
        owner: BackgroundThread,
        composed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._sampler, self._owner, self._told = sampler, owner, composed
        self._lookahead = sampler.config.lookahead
        self._window = sampler.config.length_grouping
        # Batch of the epoch from which on every `_window` batches are an optimizer step.
        self._origin = 0
        self._composed: tuple[ComposedBatch, ...] = ()
        self._failed: BaseException | None = None
        self.epoch = sampler.epoch
        self.delivered = _nothing(-1, 0.0)
        # Number of the batch that torch pulls next.
        self._next = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[IntArray]:
        """Hand out the undelivered batches from the first on."""
        self._next = self.delivered.number + 1
        return self

    def __next__(self) -> IntArray:
        batch = self._numbered(self._next)
        if batch is None:
            # Torch wants the one that would have been composed in the background.
            delivered = self.delivered.number
            self._owner.call(partial(self._compose, delivered + self._lookahead + 1, delivered))
            batch = self._numbered(self._next)
        if batch is None:
            raise StopIteration
        self._next += 1
        return batch.ids

    @property
    def undelivered(self) -> tuple[ComposedBatch, ...]:
        """Batches composed and not delivered yet, the oldest first."""
        # Read once: the owner may make another tuple meanwhile.
        delivered = self.delivered.number
        return tuple(batch for batch in self._composed if batch.number > delivered)

    @property
    def finished(self) -> bool:
        """Whether the epoch's last batch has been delivered."""
        return not self.undelivered and self._owner.call(self._at_end)

    def _at_end(self) -> bool:
        return not self.undelivered and self._sampler.exhausted

    @property
    def ids(self) -> IntArray:
        """(n,) sample ids of the batches composed and not delivered yet."""
        return np.concatenate([np.zeros(0, np.int64), *(b.ids for b in self.undelivered)])

    def hold_shards(self, fetcher: ShardFetcher) -> None:
        """Under a `cache_limit`, say which shards composed and pooled samples still need."""
        if fetcher.limited:
            self._owner.call(lambda: fetcher.hold(*self.shards_in_use()))

    def shards_in_use(self) -> tuple[IntArray, IntArray]:
        """Shards that composed and pooled samples still need, and those of the blocks after; the
        owner calls it."""
        first_id = self._sampler.table.first_id
        pending = np.searchsorted(first_id, self.ids, side="right") - 1
        in_use = [lane.intake.shards_in_use() for lane in self._sampler.lanes]
        pooled, soon = zip(*in_use, strict=True)
        return np.unique(np.concatenate([pending, *pooled])), np.concatenate(soon)

    def begin(self) -> int:
        """Compose up to the lookahead; begins the next epoch if this one is all delivered. The
        owner calls it.

        Returns:
            Batches of the epoch that are delivered.
        """
        if self._at_end():
            self._sampler.start_next_epoch()
            self.epoch = self._sampler.epoch
            self.delivered = _nothing(self.delivered.number, 0.0)
            self._origin = 0
        done = self._sampler.step - len(self.undelivered)
        self._compose(self.delivered.number + self._lookahead, self.delivered.number)
        return done

    def oldest(self) -> ComposedBatch | None:
        """The batch to be delivered next, once it is composed; None after the epoch's last.

        Raises:
            Exception: What composing has failed with, also in the background.
        """
        delivered = self.delivered.number
        last = delivered + max(1, self._lookahead)
        if self._numbered(last) is None:
            self._owner.call(partial(self._compose, last, delivered))
        return self._numbered(delivered + 1)

    def compose_ahead(self) -> None:
        """The oldest pending batch is about to be delivered: have what is due then composed in the
        background."""
        if self._lookahead:
            delivered = self.delivered.number
            last = delivered + 1 + self._lookahead
            self._owner.post(partial(self._compose_quietly, last, delivered))

    def _compose_quietly(self, last: int, delivered: int) -> None:
        """Compose; who asks for the next batch is told what fails."""
        try:
            self._compose(last, delivered)
        except BaseException as error:
            self._failed = error

    def _compose(self, last: int, delivered: int) -> None:
        """Compose until batch `last` is there, or the epoch has no more; let go of those up to
        batch `delivered`, which is certain to stay so."""
        self._composed = tuple(batch for batch in self._composed if batch.number > delivered)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        while (self._last_number < last or self._undealt) and not self._sampler.exhausted:
            began = perf_counter()
            ids = self._sampler.compose()
            if ids is not None:
                seconds = perf_counter() - began
                number, progress = self._last_number + 1, self._sampler.progress
                self._composed = (*self._composed, ComposedBatch(number, ids, progress, False))
                # Only now: if that fails, the batch is not lost.
                self._told(seconds)
            # Without ids: a refresh has found that there are none left.
            whole = (self._sampler.step - self._origin) % self._window == 0
            if whole or self._sampler.exhausted:
                self._deal()

    @property
    def _undealt(self) -> int:
        return sum(not batch.dealt for batch in self._composed)

    def _deal(self) -> None:
        """The batches of an optimizer step are all there: deal their samples by length."""
        count = self._undealt
        first = len(self._composed) - count
        batches = self._composed[first:]
        if count > 1:
            ids = deal_by_length(
                np.stack([batch.ids for batch in batches]),
                self._sampler.latest_lengths(count),
                len(self._sampler.lanes),
            )
            batches = tuple(replace(b, ids=row) for b, row in zip(batches, ids, strict=True))
        dealt = (replace(batch, dealt=True) for batch in batches)
        self._composed = (*self._composed[:first], *dealt)

    @property
    def _last_number(self) -> int:
        return self._composed[-1].number if self._composed else self.delivered.number

    def _numbered(self, number: int) -> ComposedBatch | None:
        """The batch of this number, None until it is composed and dealt."""
        found = (batch for batch in self._composed if batch.number == number and batch.dealt)
        return next(found, None)

    def state_dict(self) -> State:
        """The pending batches, verbatim, and how much of the epoch is done; the owner calls it."""
        pending = self.undelivered
        return {
            "pending": [batch.ids.copy() for batch in pending],
            "pending_progress": [batch.progress for batch in pending],
            "progress": self.delivered.progress,
            "grouping": {
                "window": self._window,
                "origin": self._origin,
                "undealt": self._undealt,
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Take over this rank's part of saved pending batches, which are those of all lanes; the
        owner calls it, once the sampler has been loaded."""
        size = self._sampler.batch_size
        mine = slice(self._sampler.rank * size, (self._sampler.rank + 1) * size)
        batches = [np.array(batch, np.int64)[mine] for batch in state["pending"]]
        shares = map(float, state["pending_progress"])
        grouping = Saved(state["grouping"])
        self._origin, undealt = grouping.whole("origin"), grouping.whole("undealt")
        if grouping.whole("window") != self._window:
            # What is pending stays as it is. Steps are counted from here, as the loop will.
            self._origin, undealt = self._sampler.step - len(batches), 0
        dealt = [place < len(batches) - undealt for place in range(len(batches))]
        self._failed = None
        self.epoch = self._sampler.epoch
        self.delivered = _nothing(-1, float(state["progress"]))
        self._composed = tuple(map(ComposedBatch, range(len(batches)), batches, shares, dealt))


def _nothing(number: int, progress: float) -> ComposedBatch:
    return ComposedBatch(number, np.zeros(0, np.int64), progress, True)


def join_pending(states: Sequence[State]) -> State:
    """One state of all ranks' pending batches, whose lanes follow each other as the ranks do.

    Args:
        states: Each rank's `PendingBatches.state_dict()`, by rank.
    """
    batches = zip(*(state["pending"] for state in states), strict=True)
    return {**states[0], "pending": [np.concatenate(parts) for parts in batches]}
