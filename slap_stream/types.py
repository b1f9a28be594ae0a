"""Shapes that travel between modules: arrays, rows of the embedding store, protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
State = dict[str, Any]

# Label of a token that the model is not to learn, as torch's and transformers' losses have it.
IGNORED_LABEL = -100

# Sources that a corpus may tell apart: embeddings keep them as int16.
MAX_SOURCES = 1 << 15

# Feature column with the probability that the target belongs to another prompt.
MISMATCH_COLUMN = "mismatch"
# Feature column with the losses of a model that was trained on clean data.
REFERENCE_COLUMN = "reference_loss"
# Feature column with the losses of a model that has only read the beginnings of targets.
JUDGE_COLUMN = "judge_loss"
# Feature column with the probability that a sample is of the kind that a target set shows.
RELEVANCE_COLUMN = "relevance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What the store knows about a contiguous range of samples.

    Attributes:
        embedding: (rows, dim) float16 or float32.
        length: (rows,) int32, in the store's `length_unit`.
        feature: (rows, num_features) float16 or float32; may have zero columns.
        source: (rows,) int16 index into the store's `source_names`; zeros if unknown.
    """

    embedding: NDArray[Any]
    length: NDArray[np.int32]
    feature: NDArray[Any]
    source: NDArray[np.int16]

    def __len__(self) -> int:
        return int(self.embedding.shape[0])


class RowStore(Protocol):
    """Anything that hands out `Rows` by contiguous range of sample ids."""

    @property
    def shape(self) -> tuple[int, int]:
        """(num_samples, dim)."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the feature columns, in order."""
        ...

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; at least one."""
        ...

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read at the same time."""
        ...

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open), one contiguous read."""
        ...

    def read_ids(self, ids: IntArray) -> Rows:
        """Rows of (n,) sample ids in any order, grouped into few contiguous reads."""
        ...


class ShardGate(Protocol):
    """Who makes sure that shards are on disk before their candidates are offered."""

    def hint(self, shard_ids: IntArray) -> None:
        """Start fetching these shards in the background; returns at once."""
        ...

    def require(self, shard_ids: IntArray) -> IntArray:
        """Wait until these shards are on disk and verified.

        Returns:
            (num_bad,) ids of damaged shards to withdraw; empty unless they are to be skipped.

        Raises:
            ShardError: If a shard cannot be fetched, or is damaged and not to be skipped, or if
                more candidates would be withdrawn than a run may lose.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a rank is in its run when it talks to the others.

    Attributes:
        epoch: Epoch.
        step: Batches composed in it.
        digest: Checksum of the batches composed since the last refresh.
    """

    epoch: int
    step: int
    digest: int


class LaneExchange(Protocol):
    """Who adds up what the lanes of all ranks have counted, and tells what came out."""

    def sum_lanes(
        self, rows: FloatArray, least: int, position: Position
    ) -> tuple[FloatArray | None, int]:
        """Add over all lanes of all ranks, in lane order; every rank calls it at the same step.

        Args:
            rows: (local lanes, size) numbers of this rank's lanes.
            least: A whole number, of which the smallest over all ranks is wanted.
            position: Where this rank is.

        Returns:
            (size,) sums on the rank that is to learn from them, None on all others; and the
            smallest number.
        """
        ...

    def tell(self, data: bytes | None, position: Position) -> bytes:
        """What the rank that was given the sums has for all; every rank calls it after
        `sum_lanes`.

        Args:
            data: On that rank, what it has; None on all others.
            position: Where this rank is.
        """
        ...
