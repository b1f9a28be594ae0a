"""A corpus of any size that is stored nowhere: rows are cut from a small table that goes round."""

from __future__ import annotations

import numpy as np

from slap_stream.embeddings.rows import ReadsIds
from slap_stream.types import Float32Array, FloatArray, IntArray, Rows

CLUSTERS = 48
# Share of the rows that repeat one of the `REACH` rows before them, nearly.
COPIES, REACH = 0.15, 2000


class VirtualCorpus(ReadsIds):
    """Clustered unit embeddings with near-copies, features, lengths, sources, losses, sketches.

    Row i of the corpus is row i mod `table_rows` of the table; all is a function of the id.

    Args:
        num_samples: Samples of the corpus.
        dim: Dimensions of an embedding.
        table_rows: Rows that differ; they take 2 bytes for each dimension.
    """

    feature_names = ("compression", "cosine", "target_share", "mismatch")
    source_names = ("source_0", "source_1", "source_2", "source_3")

    def __init__(self, num_samples: int, *, dim: int = 384, table_rows: int = 65_536) -> None:
        rng = np.random.default_rng(0)
        self.shape = num_samples, dim
        rows = self._table_rows = min(table_rows, num_samples)
        embedding = np.empty((rows, dim), np.float32)
        centres = rng.normal(size=(CLUSTERS, dim)).astype(np.float32)
        for start in range(0, rows, REACH):
            part = embedding[start : start + REACH]
            part[:] = centres[rng.integers(0, CLUSTERS, len(part))]
            part += 1.2 * rng.normal(size=part.shape)
        copies = np.flatnonzero(rng.random(rows) < COPIES)
        originals = np.maximum(0, copies - rng.integers(1, REACH, len(copies)))
        embedding[copies] = embedding[originals] + 0.15 * rng.normal(size=(len(copies), dim))
        embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
        self._embedding = embedding.astype(np.float16)
        self._length = rng.integers(20, 2000, rows).astype(np.int32)
        feature = rng.random((rows, len(self.feature_names)))
        feature[:, -1] **= 8
        self._feature = feature.astype(np.float16)
        self._source = rng.integers(0, len(self.source_names), rows).astype(np.int16)
        direction = rng.normal(size=dim).astype(np.float32)
        self._loss = np.exp(0.3 * (embedding @ direction)) + 0.2 * rng.gamma(2.0, 1.0, rows)
        self._gradient = rng.normal(size=(dim, 512)).astype(np.float32)

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (half-open)."""
        at = np.arange(start, stop) % self._table_rows
        return Rows(
            embedding=self._embedding[at],
            length=self._length[at],
            feature=self._feature[at],
            source=self._source[at],
        )

    def losses(self, ids: IntArray) -> FloatArray:
        """(n,) losses of (n,) samples, no two quite alike."""
        losses: FloatArray = self._loss[ids % self._table_rows] + 1e-4 * (ids % 97)
        return losses

    def sketches(self, ids: IntArray, sketch_dim: int) -> Float32Array:
        """(n, sketch_dim) gradient sketches of (n,) samples; sketch_dim is at most 512."""
        rows = self._embedding[ids % self._table_rows].astype(np.float32)
        sketches: Float32Array = rows @ self._gradient[:, :sketch_dim]
        return sketches


def shards_of(num_samples: int) -> IntArray:
    """(num_shards,) sizes of at most 100,000 equal shards of at least 1,000 samples."""
    size = max(1000, -(-num_samples // 100_000))
    sizes = np.full(num_samples // size, size, np.int64)
    rest = num_samples - int(sizes.sum())
    return np.append(sizes, rest) if rest else sizes
