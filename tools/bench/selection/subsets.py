"""Baselines that choose once, before any training: which records of a corpus are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.selection.dirt import MIXED, Record, answers

# Jaccard similarity of word triples, and cosine of embeddings, from which on one is a copy.
MINHASH_SIMILARITY, MINHASH_PERMUTATIONS, WORDS = 0.7, 128, 3
COSINE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What a baseline may look at.

    Attributes:
        records: (n,) records with `messages` and `kind`.
        embeddings: (n, d) float32 unit vectors.
        keep: Share that those with a budget keep.
        aim: Task that the model is to become good at, if any.
        nearness: Makes (n,) mean similarities to the nearest of the task's examples.
        instruction_difficulty: Makes (n,) losses of the answers given their prompts over those of
            the answers alone, with the model that is to be trained; its tokens are paid for.
    """

    records: Sequence[Record]
    embeddings: NDArray[np.float32]
    keep: float
    aim: str | None
    nearness: Callable[[], NDArray[np.float64]]
    instruction_difficulty: Callable[[], NDArray[np.float64]]


def by_minhash(known: Known) -> NDArray[np.bool_]:
    """The first of each group of near-copies by MinHash (datasketch), and all that have none."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=MINHASH_SIMILARITY, num_perm=MINHASH_PERMUTATIONS)
    left = np.ones(len(known.records), np.bool_)
    for number, record in enumerate(known.records):
        words = " ".join(turn["content"] for turn in record["messages"]).lower().split()
        last = max(1, len(words) - WORDS + 1)
        sketch = MinHash(num_perm=MINHASH_PERMUTATIONS)
        sketch.update_batch([" ".join(words[at : at + WORDS]).encode() for at in range(last)])
        if index.query(sketch):
            left[number] = False
        else:
            index.insert(number, sketch)
    return left


def by_embedding(known: Known) -> NDArray[np.bool_]:
    """The first of each group of near-copies by the embeddings that slap has, too."""
    like = known.embeddings @ known.embeddings.T > COSINE
    left = np.ones(len(like), np.bool_)
    for number in range(len(like)):
        left[number] = not (like[number, :number] & left[:number]).any()
    return left


def truth(known: Known) -> NDArray[np.bool_]:
    """What is not dirty: one of each record that was copied, and no answer that was spoilt."""
    dirty = {*MIXED, "copy", "shuffled"}
    return np.array([record["kind"] not in dirty for record in known.records])


def longest(known: Known) -> NDArray[np.bool_]:
    """Those with the longest answers (Zhao et al., "Long Is More for Alignment", ICML 2024)."""
    sizes = [sum(map(len, answers(record))) for record in known.records]
    return _top(np.array(sizes, np.float64), known.keep)


def top_ifd(known: Known) -> NDArray[np.bool_]:
    """Those whose prompt helps least (Li et al., "From Quantity to Quality", NAACL 2024).

    As there, answers that are likelier without their prompt are left out as mismatched.
    """
    ratio = known.instruction_difficulty()
    return _top(np.where(ratio < 1.0, ratio, -ratio), known.keep)


def nearest(known: Known) -> NDArray[np.bool_]:
    """Those whose embeddings are nearest to what the model is to become good at."""
    return _top(known.nearness(), known.keep)


def of_task(known: Known) -> NDArray[np.bool_]:
    """All that is of the task that the model is to become good at, whatever its share."""
    return np.array([record["source"] == known.aim for record in known.records])


def _top(scores: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    left = np.zeros(len(scores), np.bool_)
    left[np.argsort(-scores, kind="stable")[: round(share * len(scores))]] = True
    return left


CHOICES: dict[str, Callable[[Known], NDArray[np.bool_]]] = {
    "minhash": by_minhash,
    "embedding": by_embedding,
    "truth": truth,
    "longest": longest,
    "top_ifd": top_ifd,
    "nearest": nearest,
    "of_task": of_task,
}


def auc(scores: NDArray[Any], positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> float:
    """How often a positive scores above a negative, ties half; NaN where either is missing."""
    from scipy.stats import mannwhitneyu

    if not positive.any() or not negative.any():
        return float("nan")
    more = mannwhitneyu(scores[positive], scores[negative]).statistic
    return float(more / (positive.sum() * negative.sum()))
