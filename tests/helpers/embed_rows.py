"""Rows that tell their own sample id, for the tests of the stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.embeddings.layout import StoreLayout
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.embeddings.store import EmbeddingStore, EmbeddingWriter
from slap_stream.types import Rows


def make_rows(count: int, dim: int = 4, *, first: int = 0) -> Rows:
    """Rows that tell their own sample id in every column."""
    ids = np.arange(first, first + count)
    return Rows(
        embedding=np.repeat(ids[:, None], dim, axis=1).astype(np.float16),
        length=ids.astype(np.int32) + 1,
        feature=np.stack([ids, -ids], axis=1).astype(np.float16),
        source=(ids % 3).astype(np.int16),
    )


def make_layout(num_samples: int = 20, **changes: Any) -> StoreLayout:
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "dim": 4,
        "index_digest": "d" * 64,
        "encoder": {"name": "hashing", "version": "1", "dim": 4},
        "length_unit": "tokens",
        "feature_names": ("up", "down"),
        "source_names": ("a", "b", "c"),
        "command": "slap-embed corpus",
        "rows_per_chunk": 8,
    }
    return StoreLayout(**(settings | changes))


def write_store(path: Path, layout: StoreLayout) -> EmbeddingStore:
    writer = EmbeddingWriter(path, layout)
    with writer.open() as blocks:
        for block in reversed(blocks):
            start, stop = layout.block(block)
            writer.write(block, make_rows(stop - start, layout.dim, first=start))
    return EmbeddingStore(path)


def array_store(count: int = 20) -> ArrayStore:
    rows = make_rows(count)
    return ArrayStore(
        rows.embedding,
        lengths=rows.length,
        features=rows.feature,
        sources=rows.source,
        feature_names=("up", "down"),
        source_names=("a", "b", "c"),
    )


def assert_rows_are(rows: Rows, ids: np.ndarray) -> None:
    np.testing.assert_array_equal(rows.embedding[:, 0], ids)
    np.testing.assert_array_equal(rows.length, ids + 1)
    np.testing.assert_array_equal(rows.feature, np.stack([ids, -ids], axis=1))
    np.testing.assert_array_equal(rows.source, ids % 3)
