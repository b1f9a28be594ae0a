"""A lane's candidates as they arrive: blocks opened in order, their rows read once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np

from slap_stream.core.background import Background, BackgroundThread
from slap_stream.core.saved import Saved
from slap_stream.embeddings.rows import take
from slap_stream.selection.loss_model import checked_rows, design_rows
from slap_stream.selection.order import Block, LaneOrder, ShardTable
from slap_stream.selection.state import Lookup
from slap_stream.types import BoolArray, Float32Array, IntArray, Rows, RowStore, ShardGate, State

logger = logging.getLogger(__name__)

# The rows of a block that the next one may be read beside; two that are larger would hold too much
# memory. Those of a block of `MAX_BLOCK` rows, as slap-embed makes them by default, are not.
AHEAD_BYTES = 56 << 20

# A block, its unique sample ids, and their rows.
_Opened = tuple[Block, IntArray, Rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered:
    """Candidates taken from the order.

    Attributes:
        sample_id: (n,) sample ids.
        occurrence: (n,) which copy of the sample each is.
        source: (n,) sources.
        x: (n, columns) design rows.
        block: Block they belong to.
    """

    sample_id: IntArray
    occurrence: IntArray
    source: IntArray
    x: Float32Array
    block: int


class Intake:
    """Reads a lane's order block by block; holds the rows of one block, and of the next while they
    are read ahead.

    Args:
        table: The dataset's shards.
        store: Embeddings, lengths, features and sources by sample id.
        gate: Who makes sure that shards are on disk before their candidates are offered.
        order_options: Arguments of `LaneOrder` that stay the same over the run.

    Attributes:
        position: Candidates of the epoch's order that were taken or withdrawn.
        withdrawn: Candidates withdrawn this epoch because their shard is bad.
        nonfinite_rows: Candidates this epoch whose embedding or features held NaN or infinity,
            which count as zero.
        block_index: Block being read; -1 before the first.
    """

    def __init__(
        self,
        table: ShardTable,
        store: RowStore,
        gate: ShardGate | None,
        order_options: dict[str, int],
    ) -> None:
        self.gate = gate
        self._table, self._store, self._options = table, store, order_options
        self._reader = BackgroundThread("slap-read-ahead")
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.order = LaneOrder(self._table, epoch=epoch, **self._options)
        self.position = 0
        self.withdrawn = self.nonfinite_rows = 0
        self.block_index = -1
        self._rows: Rows | None = None
        self._ahead: Background[_Opened] | None = None
        self._bad_shards: IntArray = np.zeros(0, np.int64)

    @property
    def remaining(self) -> int:
        """Candidates of the epoch that were not taken yet."""
        return self.order.num_candidates - self.position

    @property
    def fillable(self) -> int:
        """The same, without those of the open block that are known to be withdrawn."""
        if not len(self._bad_shards) or self.block_index < 0:
            return self.remaining
        start = self.position - int(self.order.block_start[self.block_index])
        return self.remaining - int(np.count_nonzero(self._is_bad(self._block.sample_id[start:])))

    @property
    def next_block(self) -> int:
        """Block that the next candidate belongs to."""
        return int(np.searchsorted(self.order.block_start, self.position, side="right")) - 1

    @property
    def left_in_block(self) -> int:
        """Candidates between the position and the next block; none before the first block."""
        return int(self.order.block_start[self.block_index + 1]) - self.position

    @property
    def in_last_block(self) -> bool:
        """Whether no block follows the one being read."""
        return self.block_index + 1 == self.order.num_blocks

    def shards_in_use(self) -> tuple[IntArray, IntArray]:
        """Shards of the blocks that pooled candidates may be of, and those of the next block."""
        blocks = range(max(0, self.block_index - 1), self.block_index + 1)
        now = [self.order.shards_of_block(block) for block in blocks]
        none = np.zeros(0, np.int64)
        soon = none if self.in_last_block else self.order.shards_of_block(self.block_index + 1)
        return np.concatenate([none, *now]), soon

    def take(self, most: int) -> Offered:
        """Take at most `most` candidates, all of one block; opens the block if it is the next.

        Raises:
            ShardError: If a shard of the block is bad and bad shards are not to be skipped.
        """
        if self.next_block != self.block_index:
            self._open(self.next_block)
        start = self.position - int(self.order.block_start[self.block_index])
        stop = start + min(most, self.left_in_block)
        self.position += stop - start
        ids = self._block.sample_id[start:stop]
        occurrence = self._block.occurrence[start:stop]
        if len(self._bad_shards):
            fine = ~self._is_bad(ids)
            self.withdrawn += int(np.count_nonzero(~fine))
            ids, occurrence = ids[fine], occurrence[fine]
        at = np.searchsorted(self._ids, ids)
        assert self._rows is not None
        rows = take(self._rows, at)
        x, spoilt = checked_rows(rows)
        if spoilt and not self.nonfinite_rows:
            logger.warning(
                "embeddings or features of %d of %d samples hold NaN or infinity, which count as "
                "zero; embed the corpus again. More are counted in nonfinite_rows.",
                spoilt,
                len(ids),
            )
        self.nonfinite_rows += spoilt
        return Offered(
            sample_id=ids,
            occurrence=occurrence,
            source=rows.source.astype(np.int64),
            x=x,
            block=self.block_index,
        )

    def rows_of(self, ids: IntArray) -> Float32Array:
        """(n, columns) design rows of (n,) sample ids, read from the store."""
        return design_rows(self._store.read_ids(ids))

    def first_rows(self) -> Float32Array:
        """(n, columns) design rows of the epoch's first block, at most 4096 of them."""
        return self.rows_of(np.unique(self.order.block(0).sample_id[:4096]))

    def finish_reading(self) -> None:
        """Wait until nothing is read ahead; whether that has failed is told when it is needed."""
        if self._ahead is not None:
            self._ahead.wait()

    def _is_bad(self, ids: IntArray) -> BoolArray:
        shard = np.searchsorted(self._table.first_id, ids, side="right") - 1
        return np.isin(shard, self._bad_shards)

    def _open(self, index: int) -> None:
        if self.gate is not None:
            if index + 1 < self.order.num_blocks:
                self.gate.hint(self.order.shards_of_block(index + 1))
            bad = self.gate.require(self.order.shards_of_block(index))
            self._bad_shards = np.union1d(self._bad_shards, bad)
        # The rows before go first, so that no more than one block is in memory beside a read.
        self._rows = None
        if self._ahead is None:
            opened = self._load(index)
        else:
            ahead, self._ahead = self._ahead, None
            opened = ahead.get()
        self._block, self._ids, self._rows = opened
        self.block_index = index
        if self._may_read_ahead():
            self._ahead = self._reader.post(partial(self._load, index + 1))

    def _load(self, index: int) -> _Opened:
        """A block, its (n,) unique sample ids and their rows."""
        block = self.order.block(index)
        ids = np.unique(block.sample_id)
        return block, ids, self._store.read_ids(ids)

    def _may_read_ahead(self) -> bool:
        assert self._rows is not None
        size = self._rows.embedding.nbytes + self._rows.feature.nbytes
        return self._store.thread_safe and not self.in_last_block and size <= AHEAD_BYTES

    def state_dict(self) -> State:
        """Position, and what was withdrawn."""
        return {
            "epoch": self.order.epoch,
            "position": self.position,
            "withdrawn": self.withdrawn,
            "nonfinite_rows": self.nonfinite_rows,
            "block_index": self.block_index,
            # Fewer would look whole.
            "num_bad_shards": len(self._bad_shards),
            "bad_shards": self._bad_shards,
        }

    def load_state_dict(self, state: Saved, lookup: Lookup) -> None:
        """Go to a saved position; reads the block it is in."""
        self.start_epoch(state.whole("epoch"))
        block = state.whole("block_index", least=-1, most=self.order.num_blocks - 1)
        # Before the first block there is one position only.
        start, stop = self.order.block_start[[max(0, block), block + 1]].tolist()
        self.position = state.whole("position", least=start, most=stop)
        num_shards = len(self._table.sizes)
        bad = state.whole("num_bad_shards", most=num_shards)
        self._bad_shards = state.wholes("bad_shards", bad, below=num_shards)
        self.withdrawn = state.whole("withdrawn", most=self.position)
        self.nonfinite_rows = state.whole("nonfinite_rows")
        if block >= 0:
            self._open(block)
