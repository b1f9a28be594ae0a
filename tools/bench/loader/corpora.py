"""Corpora that the loader benchmark makes for itself, and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.core.files import file_digest
from slap_stream.embeddings.layout import StoreLayout
from slap_stream.embeddings.store import EmbeddingWriter
from slap_stream.shards.writer import open_writer
from slap_stream.types import Rows

SEED = 7
DIM = 384
# Embeddings lie around this many centres, as those of real texts do.
CENTRES = 64
# Shards of a corpus, about: enough that a block of eight is a small part of it.
NUM_SHARDS = 100
ALPHABET = "etaoin shrdlu cmfwyp vbgkqj xz,. "

Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of corpus.

    Attributes:
        columns: Column name to MDS encoding.
        mean_bytes: Mean size of a sample, to make shards of about equal number.
        make: Makes sample `number` from a generator and a long text to cut pieces from.
    """

    columns: dict[str, str]
    mean_bytes: int
    make: Callable[[np.random.Generator, str, int], Sample]


def _cut(rng: np.random.Generator, text: str, size: int) -> str:
    start = int(rng.integers(len(text) - size))
    return text[start : start + size]


def _short(rng: np.random.Generator, text: str, number: int) -> Sample:
    return {"text": _cut(rng, text, int(rng.integers(300, 700)))}


def _tokens(rng: np.random.Generator, text: str, number: int) -> Sample:
    return {"input_ids": rng.integers(0, 50_000, 2048, np.int32)}


def _mixed(rng: np.random.Generator, text: str, number: int) -> Sample:
    size = int(100 * 200.0 ** rng.random())
    return {
        "id": f"mixed-{number}",
        "text": _cut(rng, text, size),
        "meta": {"source": number % 5, "score": round(float(rng.random()), 3)},
    }


KINDS = {
    "short": Kind(columns={"text": "str"}, mean_bytes=500, make=_short),
    "tokens": Kind(columns={"input_ids": "ndarray:int32"}, mean_bytes=8200, make=_tokens),
    "mixed": Kind(
        columns={"id": "str", "text": "str", "meta": "json"}, mean_bytes=3850, make=_mixed
    ),
}


def samples(name: str, count: int) -> Iterator[Sample]:
    """The samples of a corpus, always the same."""
    rng = np.random.default_rng(SEED)
    text = "".join(rng.choice(list(ALPHABET), 1 << 18))
    for number in range(count):
        yield KINDS[name].make(rng, text, number)


def write_corpus(data: Path, name: str, count: int) -> Path:
    """Shards and `embeddings.zarr` of a corpus, unless they are there already."""
    out = data / f"{name}-{count}"
    kind = KINDS[name]
    if not (out / "index.json").is_file():
        shard_bytes = max(4096, kind.mean_bytes * count // NUM_SHARDS)
        with open_writer(out, kind.columns, shard_bytes=shard_bytes) as writer:
            for sample in samples(name, count):
                writer.write(sample)
    _write_embeddings(out, count)
    return out


def _write_embeddings(corpus: Path, count: int) -> None:
    layout = StoreLayout(
        num_samples=count,
        dim=DIM,
        index_digest=file_digest(corpus / "index.json"),
        encoder={"name": "synthetic", "version": 1, "dim": DIM},
        length_unit="tokens",
    )
    writer = EmbeddingWriter(corpus / "embeddings.zarr", layout)
    if writer.is_finished():
        return
    centres = np.random.default_rng(SEED).normal(size=(CENTRES, DIM))
    with writer.open() as blocks:
        for block in blocks:
            start, stop = layout.block(block)
            rng = np.random.default_rng([SEED, block])
            rows = centres[rng.integers(CENTRES, size=stop - start)]
            rows = rows + rng.normal(size=rows.shape)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            writer.write(
                block,
                Rows(
                    embedding=rows.astype(np.float32),
                    length=rng.integers(64, 2048, stop - start).astype(np.int32),
                    feature=np.zeros((stop - start, 0), np.float32),
                    source=np.zeros(stop - start, np.int16),
                ),
            )
