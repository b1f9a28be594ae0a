"""Shape, columns and origin of an embedding store, fixed before its first row is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream.errors import CorpusError
from slap_stream.types import MAX_SOURCES

STORE_NAME = "embeddings.zarr"
# What a Zarr group says of itself, and what makes one that is uploaded whole.
METADATA_NAME = "zarr.json"
FORMAT = "slap_stream.embeddings.store"
FORMAT_VERSION = 2
# Rows of one file: what is written, and after a kill written again, at once.
ROWS_PER_CHUNK = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLayout:
    """Shape, columns and origin of an `embeddings.zarr`.

    Attributes:
        num_samples: Rows, as many as the dataset has samples.
        dim: Length of an embedding.
        index_digest: `file_digest` of the dataset's index.json.
        encoder: Name, version and dimension of the encoder, and of a reference model, as JSON.
        length_unit: `tokens`, or `characters / 4`.
        feature_names: Names of the feature columns.
        source_names: Names of the sources; empty if the dataset has none.
        command: What the store was made with.
        shard_hashes: (num_shards,) of the dataset, as `unhashed_contents` gives them: where its
            index says nothing of what is in its shards, this does.
        rows_per_chunk: Rows of one file.
    """

    num_samples: int
    dim: int
    index_digest: str
    encoder: dict[str, Any]
    length_unit: str
    feature_names: tuple[str, ...] = ()
    source_names: tuple[str, ...] = ()
    command: str = ""
    shard_hashes: tuple[str, ...] = ()
    rows_per_chunk: int = ROWS_PER_CHUNK

    def __post_init__(self) -> None:
        for name in ("num_samples", "dim", "rows_per_chunk"):
            if getattr(self, name) < 1:
                raise CorpusError(
                    f"{name} must be at least 1, got {getattr(self, name)!r}; there would be "
                    "nothing to write."
                )
        if len(self.source_names) > MAX_SOURCES:
            raise CorpusError(
                f"source_names must be at most {MAX_SOURCES}, got {len(self.source_names)}; embed "
                "without the source column, or merge sources."
            )

    def columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype of each column, and shape of what a row has in it."""
        return {
            "embedding": ("float16", (self.dim,)),
            "length": ("int32", ()),
            "feature": ("float16", (len(self.feature_names),)),
            "source": ("int16", ()),
        }

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        absent = () if self.source_names else ("source",)
        return sum(
            np.dtype(dtype).itemsize * math.prod(tail)
            for name, (dtype, tail) in self.columns().items()
            if name not in absent
        )

    def attributes(self) -> dict[str, Any]:
        """The group's attributes."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "index_digest": self.index_digest,
            "encoder": self.encoder,
            "length_unit": self.length_unit,
            "feature_names": list(self.feature_names),
            "source_names": list(self.source_names),
            "command": self.command,
            "rows_per_chunk": self.rows_per_chunk,
            **({"shard_hashes": list(self.shard_hashes)} if self.shard_hashes else {}),
        }

    def plan(self) -> dict[str, Any]:
        """What stores have in common that may stand for each other: all but the command."""
        return {key: value for key, value in self.attributes().items() if key != "command"}

    def require_same(self, attributes: Mapping[str, Any], where: str) -> None:
        """Refuse a store that is there and is none of this layout.

        Args:
            attributes: Of that store.
            where: Its place, for the error.

        Raises:
            CorpusError: If it is another one.
        """
        require_embeddings(attributes, where)
        plan = self.plan()
        different = [key for key, value in plan.items() if attributes.get(key) != value]
        if different:
            raise CorpusError(
                f"embeddings must not exist yet or have the same settings, got {where!r} with "
                f"another {', '.join(different)}; pass overwrite to replace them."
            )

    @property
    def num_blocks(self) -> int:
        """Files per array."""
        return -(-self.num_samples // self.rows_per_chunk)

    def block(self, index: int) -> tuple[int, int]:
        """Half-open range of rows of one block."""
        start = index * self.rows_per_chunk
        return start, min(start + self.rows_per_chunk, self.num_samples)


def attributes_in(described: bytes) -> dict[str, Any]:
    """What a Zarr group says about itself in its zarr.json; {} if that is none."""
    try:
        attributes = json.loads(described)["attributes"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def require_embeddings(attributes: Mapping[str, Any], where: str) -> None:
    """Refuse to replace what is no embeddings.

    Args:
        attributes: Of what is there.
        where: Its place, for the error.

    Raises:
        CorpusError: If slap-embed has not made it.
    """
    if attributes.get("format") != FORMAT:
        raise CorpusError(
            f"embeddings must not replace anything but embeddings, got {where!r}, which slap-embed "
            "did not make; choose another place."
        )
