"""Cheap columns that say much about a sample before any model has read it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from slap_stream.text.sample import TextSample
from slap_stream.types import Float32Array, IntArray

FEATURE_NAMES = (
    "log_length",
    "target_share",
    "prompt_target_cosine",
    "target_compression",
    "target_given_prompt",
    "target_rarity",
)

# Words, but one token per character for scripts that put no spaces between words (Thai, Lao,
# Khmer, kana, CJK), and one per punctuation mark: it tells code, tables and dialogue apart.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
TOKEN_PATTERN = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"
NUM_BUCKETS = 2**18
# Most samples that the document frequencies are counted on; more change them by little.
FIT_SAMPLES = 20_000
# Bytes of prompt and of target that are looked at: deflate's window, and a bound on the time that
# one book-length sample takes.
_COMPRESSED_BYTES = 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedPairs:
    """Hashed TF-IDF vectors of prompts and targets.

    Attributes:
        prompt: (n, NUM_BUCKETS) CSR float32, unit rows; a row is empty if the text has no token.
        target: (n, NUM_BUCKETS) CSR float32, unit rows.
        rarity: (n,) float32, mean inverse document frequency of the target's tokens.
    """

    prompt: Any
    target: Any
    rarity: Float32Array

    def stacked(self, below: HashedPairs) -> HashedPairs:
        """These rows, and others below them."""
        from scipy.sparse import vstack

        return HashedPairs(
            prompt=vstack([self.prompt, below.prompt], format="csr"),
            target=vstack([self.target, below.target], format="csr"),
            rarity=np.concatenate([self.rarity, below.rarity]),
        )

    def taken(self, at: IntArray) -> HashedPairs:
        """The rows at these places."""
        return HashedPairs(prompt=self.prompt[at], target=self.target[at], rarity=self.rarity[at])


_find_tokens = re.compile(TOKEN_PATTERN).findall


def words_and_pairs(text: str) -> list[str]:
    """Tokens of a text, and pairs of neighbours: what scikit-learn's analyser finds, and sooner."""
    tokens = _find_tokens(text.lower())
    return [*tokens, *map(" ".join, pairwise(tokens))]


class HashedTfidf:
    """Hashed word and word-pair counts, weighted by inverse document frequency.

    State: `idf`, (NUM_BUCKETS,) float32. Buckets are fixed by the hash, so that nothing but the
    frequencies is learned, and a bucket never seen counts as rarest.
    """

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._counter = HashingVectorizer(
            n_features=NUM_BUCKETS,
            analyzer=words_and_pairs,
            alternate_sign=False,
            norm=None,
            dtype=np.float32,
        )
        self.idf: Float32Array = np.ones(NUM_BUCKETS, dtype=np.float32)

    def fit(self, samples: Iterable[TextSample]) -> None:
        """Count document frequencies."""
        frequency = np.zeros(NUM_BUCKETS, dtype=np.int64)
        taken, total = iter(samples), 0
        while batch := list(islice(taken, 1024)):
            counts = self._counter.transform([sample.text for sample in batch])
            frequency += np.bincount(counts.indices, minlength=NUM_BUCKETS)
            total += len(batch)
        self.idf = (np.log((1 + total) / (1 + frequency)) + 1).astype(np.float32)

    def transform(self, samples: Sequence[TextSample]) -> HashedPairs:
        """Weigh and normalise the counts of prompts and targets."""
        prompt, _ = self._weighted([sample.prompt for sample in samples])
        target, rarity = self._weighted([sample.target for sample in samples])
        return HashedPairs(prompt=prompt, target=target, rarity=rarity)

    def _weighted(self, texts: Sequence[str]) -> tuple[Any, Float32Array]:
        counts = self._counter.transform(texts)
        rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        weight = self.idf[counts.indices]
        total = np.bincount(rows, counts.data, minlength=len(texts))
        weighted = np.bincount(rows, counts.data * weight, minlength=len(texts))
        rarity = (weighted / np.maximum(total, 1)).astype(np.float32)
        # Logarithmic counts: a word said ten times is not ten times the topic.
        counts.data = (1 + np.log(counts.data)) * weight
        squares = np.bincount(rows, counts.data**2, minlength=len(texts))
        norm = np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny)).astype(np.float32)
        counts.data /= norm[rows]
        return counts, rarity


def feature_columns(samples: Sequence[TextSample], pairs: HashedPairs) -> Float32Array:
    """The columns of `FEATURE_NAMES`, all of order one.

    log_length: natural logarithm of the length. target_share: part of the characters that is
    target. prompt_target_cosine: of the TF-IDF vectors; low when a target answers another prompt.
    target_compression: deflated over raw bytes of the target; low when it repeats itself.
    target_given_prompt: the same when the compressor has read the prompt; near zero when the
    target copies it. target_rarity: mean inverse document frequency of its words.

    Args:
        samples: n samples.
        pairs: Their hashed vectors.

    Returns:
        (n, len(FEATURE_NAMES)) finite.
    """
    columns = np.empty((len(samples), len(FEATURE_NAMES)), dtype=np.float32)
    columns[:, 0] = np.log([sample.length for sample in samples])
    columns[:, 1] = [
        len(sample.target) / max(1, len(sample.prompt) + len(sample.target)) for sample in samples
    ]
    columns[:, 2] = np.asarray(pairs.prompt.multiply(pairs.target).sum(axis=1)).reshape(-1)
    for row, sample in enumerate(samples):
        columns[row, 3] = compression(sample.target)
        columns[row, 4] = compression(sample.target, sample.prompt)
    columns[:, 5] = pairs.rarity
    return columns


def compression(text: str, read_before: str = "") -> float:
    """Deflated over raw bytes, the end marker's cost taken off; 1 for an empty text.

    Args:
        text: What is compressed; of a book-length one the beginning.
        read_before: What the compressor has read before; of a long one the end.
    """
    raw = text.encode()[:_COMPRESSED_BYTES]
    if not raw:
        return 1.0
    before = read_before.encode()[-_COMPRESSED_BYTES:]
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY, before)
    size = len(packer.compress(raw)) + len(packer.flush())
    return min(max(size - 2, 0) / len(raw), 2.0)
