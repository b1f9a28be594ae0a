"""The order in which a lane is offered its candidates, made block by block.

Only arrays over shards are kept; candidates exist one block at a time. Every candidate of an epoch
is offered exactly once, by exactly one lane; where an epoch takes several passes, once in each.

A shard that is offered more often than it has samples is visited several times; visit k offers
occurrence k of its samples. Visits of one shard are spread evenly over the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slap_stream.core.rng import Purpose, generator, uniforms
from slap_stream.types import IntArray

# Rows of embeddings that are in memory together: 50 MB of those that slap-embed makes.
MAX_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTable:
    """The shards of a dataset, and how many candidates an epoch offers from each.

    Attributes:
        sizes: (num_shards,) samples in each shard.
        counts: (num_shards,) candidates that an epoch offers from it; samples repeat when this is
            larger than the size, a subset drawn anew each epoch is offered when it is smaller.
        first_id: (num_shards,) sample id of each shard's first sample.
        num_samples: Samples in the dataset.
        num_candidates: Candidates that an epoch offers.
        max_occurrences: How often an epoch offers its most repeated sample.
    """

    sizes: IntArray
    counts: IntArray
    first_id: IntArray
    # Asked for with every batch, and there may be very many shards.
    num_samples: int = field(init=False)
    num_candidates: int = field(init=False)
    max_occurrences: int = field(init=False)

    def __post_init__(self) -> None:
        some = self.sizes > 0
        most = -(-self.counts[some] // self.sizes[some])
        for name, value in (
            ("num_samples", self.sizes.sum()),
            ("num_candidates", self.counts.sum()),
            ("max_occurrences", most.max(initial=0)),
        ):
            object.__setattr__(self, name, int(value))

    @classmethod
    def of(cls, sizes: IntArray, counts: IntArray | None = None) -> ShardTable:
        """Table from sizes and optional counts, both (num_shards,).

        Raises:
            ValueError: If a size or count is negative, shapes differ, candidates are asked for
                from an empty shard, or nothing would be offered at all.
        """
        sizes = np.asarray(sizes, np.int64)
        counts = sizes if counts is None else np.asarray(counts, np.int64)
        if sizes.ndim != 1 or sizes.shape != counts.shape:
            raise ValueError(
                "shard_sizes and shard_counts must have the same (num_shards,) shape, got "
                f"{sizes.shape} and {counts.shape}."
            )
        if np.any(sizes < 0) or np.any(counts < 0):
            raise ValueError("shard_sizes and shard_counts must not be negative.")
        empty = np.flatnonzero((sizes == 0) & (counts > 0))
        if len(empty):
            raise ValueError(
                f"shard_counts must be 0 for empty shards, got more for {len(empty)} of them, "
                f"first {empty[:5].tolist()}."
            )
        if not counts.sum():
            raise ValueError("shard_counts must offer at least one candidate, got none.")
        first_id = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)[:-1]])
        return cls(sizes=sizes, counts=counts, first_id=first_id)


def lane_bounds(num_candidates: int, num_lanes: int) -> IntArray:
    """(num_lanes + 1,) positions at which the run's order is cut; lanes differ by at most one."""
    return np.arange(num_lanes + 1, dtype=np.int64) * num_candidates // num_lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Candidates that are interleaved with each other.

    Attributes:
        sample_id: (n,) sample ids in the order offered.
        occurrence: (n,) which copy of the sample each is.
    """

    sample_id: IntArray
    occurrence: IntArray


class LaneOrder:
    """One lane's candidates of one epoch, in blocks.

    Args:
        table: The dataset's shards.
        seed: Seed of the run.
        epoch: Epoch.
        lane: Which lane, in [0, num_lanes).
        num_lanes: Lanes of the run.
        shards_per_block: Shard visits in a block, at least.
        min_block: Candidates in a block, at least (but for the last).
        max_block: Candidates in a block, about; of more, several blocks are made, each with a part
            of each of the same shards. Never less than would make one smaller than `min_block`.
        passes: How often all of it is offered: each time in blocks of its own, so that nothing
            comes again before all have come, with the shards in the same order.

    Attributes:
        epoch: Epoch.
        num_candidates: Candidates of this lane in this epoch, those of all passes.
        block_start: (num_blocks + 1,) candidates before each block.
        turns: For samples whose occurrences are split between lanes, the lanes that share it as
            (first, how many): at step t only lane first + t % how_many may train on it, so that
            two occurrences never meet in a global batch.
    """

    def __init__(
        self,
        table: ShardTable,
        *,
        seed: int,
        epoch: int,
        lane: int,
        num_lanes: int,
        shards_per_block: int,
        min_block: int,
        max_block: int = MAX_BLOCK,
        passes: int = 1,
    ) -> None:
        self._table = table
        self._seed = seed
        self.epoch = epoch
        self._lane = lane
        self._passes = passes
        shards = generator(seed, Purpose.SHARDS_OF_RUN).permutation(len(table.sizes))
        ends = np.cumsum(table.counts[shards])
        bounds = lane_bounds(int(ends[-1]), num_lanes)
        low, high = int(bounds[lane]), int(bounds[lane + 1])
        self.num_candidates = (high - low) * passes
        self.turns: dict[int, tuple[int, int]] = {}

        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        mine = shards[first : last + 1] if self.num_candidates else shards[:0]
        # Positions of this lane inside each of its shards: all of it, but for the two ends.
        part_low = np.zeros(len(mine), np.int64)
        part_high = table.counts[mine].copy()
        if len(mine):
            part_low[0] = low - (ends[first] - table.counts[mine[0]])
            part_high[-1] = high - (ends[last] - table.counts[mine[-1]])
            for edge, position in ((mine[0], low), (mine[-1], high)):
                self._share_turns(int(edge), position, shards, ends, bounds)
        self._lay_out_visits(mine, part_low, part_high)
        self._cut_blocks(shards_per_block, min_block, max_block)

    @property
    def num_blocks(self) -> int:
        """Blocks of this lane in this epoch."""
        return len(self.block_start) - 1

    @property
    def visits_per_block(self) -> int:
        """Shard visits in the largest block."""
        return int(np.diff(self._group_start).max(initial=0))

    def shards_of_block(self, index: int) -> IntArray:
        """(num_shards_of_block,) shards that a block needs, ascending."""
        group = int(self._block_group[index])
        visits = slice(self._group_start[group], self._group_start[group + 1])
        shard_ids: IntArray = np.unique(self._visit_shard[visits])
        return shard_ids

    def block(self, index: int) -> Block:
        """Make one block: O(its candidates) time and memory, O(shard) where shards are shared."""
        sample_id, occurrence = [], []
        group = int(self._block_group[index])
        part, parts = int(self._block_part[index]), int(self._parts[group])
        for visit in range(int(self._group_start[group]), int(self._group_start[group + 1])):
            shard, number = int(self._visit_shard[visit]), int(self._visit_number[visit])
            low, high = int(self._visit_low[visit]), int(self._visit_high[visit])
            first, last = (low + (high - low) * edge // parts for edge in (part, part + 1))
            offsets = np.arange(first, last)
            if high - low < self._table.sizes[shard]:
                offsets = self._permutation(shard)[first:last]
            sample_id.append(offsets + self._table.first_id[shard])
            occurrence.append(np.full(last - first, number, np.int64))
        ids, copies = np.concatenate(sample_id), np.concatenate(occurrence)
        order = generator(self._seed, Purpose.BLOCK, self.epoch, self._lane, index).permutation(
            len(ids)
        )
        return Block(sample_id=ids[order], occurrence=copies[order])

    def _permutation(self, shard: int) -> IntArray:
        rng = generator(self._seed, Purpose.SAMPLES_OF_SHARD, self.epoch, shard)
        permutation: IntArray = rng.permutation(int(self._table.sizes[shard]))
        return permutation

    def _lay_out_visits(self, shards: IntArray, low: IntArray, high: IntArray) -> None:
        """Cut each shard's part into visits and spread these over the epoch.

        A shard's candidates are numbered sample by sample (all occurrences of the first sample
        of its permutation, then of the second, ...), so that a cut between two lanes splits the
        occurrences of one sample at most.
        """
        sizes, counts = self._table.sizes[shards], self._table.counts[shards]
        visits = -(-counts // np.maximum(sizes, 1))
        index = np.repeat(np.arange(len(shards)), visits)
        number = np.arange(len(index)) - np.repeat(np.cumsum(visits) - visits, visits)
        whole, extra = counts[index] // sizes[index], counts[index] % sizes[index]
        start = _samples_before(low[index], number, whole, extra, sizes[index])
        stop = _samples_before(high[index], number, whole, extra, sizes[index])
        draws = uniforms(self._seed, Purpose.VISITS_OF_EPOCH, self.epoch, shards[index], number)
        when = (number + draws) / visits[index]
        some = np.flatnonzero(stop > start)
        order = some[np.argsort(when[some], kind="stable")]
        # Every pass in the same order: so all come back after as long as can be.
        done = np.repeat(np.arange(self._passes), len(order))
        order = np.tile(order, self._passes)
        self._visit_shard = shards[index][order]
        self._visit_number = number[order] + done * visits[index][order]
        self._visit_low, self._visit_high = start[order], stop[order]

    def _cut_blocks(self, shards_per_block: int, min_block: int, max_block: int) -> None:
        sizes = self._visit_high - self._visit_low
        starts, shards, candidates = [0], 0, 0
        per_pass = len(sizes) // self._passes
        for end, size in enumerate(sizes.tolist(), 1):
            shards, candidates = shards + 1, candidates + size
            if shards >= shards_per_block and candidates >= min_block:
                starts.append(end)
                shards, candidates = 0, 0
            elif not end % per_pass and end < len(sizes):
                # The end of a pass. Too little for a block goes with the one before: a small block
                # between others would leave little to choose from.
                if candidates < min_block and starts[-1] > end - per_pass:
                    starts.pop()
                starts.append(end)
                shards, candidates = 0, 0
        if starts[-1] != len(sizes):
            starts.append(len(sizes))
        # Groups of visits; a block is a part of each visit of a group, so that it sees as many
        # shards as an undivided one would.
        self._group_start = np.asarray(starts, np.int64)
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        visits = np.diff(self._group_start)
        # A part of a visit may be one candidate short: no block is smaller than `min_block`.
        limit = np.maximum(max_block, 2 * (min_block + visits))
        self._parts = -(-np.diff(total[self._group_start]) // limit)
        self._block_group = np.repeat(np.arange(len(self._parts)), self._parts)
        first = np.cumsum(self._parts) - self._parts
        self._block_part = np.arange(len(self._block_group)) - first[self._block_group]
        # One entry for each block and visit of its group.
        visits = visits[self._block_group]
        begin = np.cumsum(visits) - visits
        block = np.repeat(np.arange(len(visits)), visits)
        group, part = self._block_group[block], self._block_part[block]
        size = sizes[self._group_start[group] + np.arange(len(block)) - begin[block]]
        parts = self._parts[group]
        taken = size * (part + 1) // parts - size * part // parts
        sizes_of_blocks = np.add.reduceat(taken, begin) if len(begin) else taken
        self.block_start: IntArray = np.concatenate([total[:1], np.cumsum(sizes_of_blocks)])

    def _share_turns(
        self, shard: int, position: int, shards: IntArray, ends: IntArray, bounds: IntArray
    ) -> None:
        size, count = int(self._table.sizes[shard]), int(self._table.counts[shard])
        whole, extra = divmod(count, size)
        if count <= size:
            return
        begin = int(ends[np.flatnonzero(shards == shard)[0]]) - count
        inside = position - begin
        if not 0 < inside < count:
            return
        # The sample whose occurrences lie on both sides of the cut, if the cut splits one.
        in_extra = inside < extra * (whole + 1)
        width = whole + 1 if in_extra else whole
        offset = 0 if in_extra else extra * (whole + 1)
        sample, split = divmod(inside - offset, width)
        if not split:
            return
        sample += 0 if in_extra else extra
        start = begin + inside - split
        lanes = np.searchsorted(bounds, [start, start + width - 1], side="right") - 1
        sample_id = int(self._table.first_id[shard] + self._permutation(shard)[sample])
        self.turns[sample_id] = (int(lanes[0]), int(lanes[1] - lanes[0] + 1))


def _samples_before(
    position: IntArray, number: IntArray, whole: IntArray, extra: IntArray, size: IntArray
) -> IntArray:
    """How many samples have occurrence `number` before `position` of their shard's candidates.

    The first `extra` samples of the shard have whole + 1 occurrences, the others `whole`; samples
    are laid out one after the other.
    """
    wide = extra * (whole + 1)
    in_wide = np.minimum(-(-(position - number) // (whole + 1)), extra)
    in_narrow = extra + -(-(position - wide - number) // np.maximum(whole, 1))
    # Occurrence `whole` exists for the first `extra` samples only.
    limit = np.where(number < whole, size, extra)
    before = np.where(position <= wide, in_wide, in_narrow)
    return np.clip(before, 0, limit).astype(np.int64)
