"""The probability that a target belongs to another prompt, learnt from the corpus itself.

A classifier learns to tell the corpus's pairs of prompt and target from pairs in which the target
was taken from another sample of the same source. It needs no labels and no language model: only
what the words say. The classifier's odds are those of a pair being as found rather than shuffled,
o(x) / n(x). If a share c of the pairs found is itself shuffled, then o = (1 - c) p + c n, and a
pair with features x is shuffled with probability c n(x) / o(x). Where real pairs hardly ever look
like shuffled ones the found pairs that do are all shuffled, so c is the smallest ratio
of found to shuffled pairs below any threshold of the odds.

So nothing is held against a clean corpus, whatever it looks like: c is then near zero.

Reference: telling data from noise is noise-contrastive estimation (Gutmann and Hyvarinen, AISTATS
    2010); the share by the smallest ratio is Blanchard, Lee and Scott, "Semi-supervised novelty
    detection", JMLR 2010; their use together for misplaced targets is this project's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from slap_stream.core.linear import normalised
from slap_stream.embeddings.encoders import sparse_projection
from slap_stream.embeddings.features import (
    FEATURE_NAMES,
    HashedPairs,
    HashedTfidf,
    compression,
    feature_columns,
)
from slap_stream.text.sample import TextSample
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray

logger = logging.getLogger(__name__)

# A sample is judged by a classifier that was not trained on it, nor on its exact copies.
FOLDS = 4
# With fewer different samples nothing is learnt and nothing is held against a pair.
MIN_SAMPLES = 400
# Samples that name no source are paired inside this many clusters of their prompts: a dialogue with
# a translation's target would be too easy to tell, and say nothing of targets shuffled among
# dialogues.
CLUSTERS = 16
# Sources with fewer samples share one estimate of how much is misplaced.
MIN_OF_SOURCE = 300
# Part of the shuffled pairs below the thresholds at which found and shuffled pairs are compared:
# enough of them for a steady ratio, few enough that hardly a real pair is among them.
TAILS = (0.1, 0.2, 0.3)
# A larger share says that the words cannot tell pairs apart, not that most are misplaced.
MAX_SHARE = 0.5
# Chance that a found pair has higher odds than a shuffled one from which on a source's own ratio
# is trusted. Below, it is too high (a quarter of clean translations), and the share over all
# sources is taken if that is less.
TELLING = 0.8
# Characters that are looked at of the end of a prompt and of the beginning of a target.
SIDE_CHARACTERS = 1_000
# Dimensions in which a target is predicted from its prompt.
PROJECTED_DIM = 256
# Entries per bucket of the projection: fewer than an encoder's, for memory.
PROJECTED_ENTRIES = 2
# Ridge penalty, in mean eigenvalues.
PENALTY = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sides:
    """Prompts and targets of n samples, ready to be paired in any way."""

    samples: Sequence[TextSample]
    pairs: HashedPairs
    features: Float32Array
    prompt: Float32Array
    target: Float32Array


class PairModel:
    """Tells pairs that belong together from shuffled ones.

    State: for each fold a linear map from projected prompts to projected targets, and a classifier;
    the misplaced share of each source.

    Args:
        tfidf: Hashes the words; fitted.

    Attributes:
        share: Share of the targets that are misplaced, over all sources; None if that could not be
            found out.
        share_of: What is assumed of each source with enough samples, by name.
        assumed: Share of the targets that is assumed by source, which `mismatch` comes to; None if
            nothing could be found out. A source may show what all of them together hide.
    """

    def __init__(self, tfidf: HashedTfidf) -> None:
        self._tfidf = tfidf
        self._projection = sparse_projection(PROJECTED_DIM, PROJECTED_ENTRIES)
        self._maps: list[Float32Array] = []
        self._centre: Float32Array = np.zeros(PROJECTED_DIM, np.float32)
        self._classifiers: list[Any] = []
        self.share_of: dict[str, float] = {}
        self.share: float | None = None
        self.assumed: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The projection is megabytes, and follows from the dimension.
        return {name: value for name, value in vars(self).items() if name != "_projection"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _projection=sparse_projection(PROJECTED_DIM, PROJECTED_ENTRIES))

    @property
    def fitted(self) -> bool:
        """Whether there were samples enough to learn from."""
        return bool(self._classifiers)

    def fit(self, samples: Sequence[TextSample]) -> None:
        """Learn from n samples, cut by `cut_sides`; from too few different ones nothing is."""
        with _one_thread():
            self._fit(samples)

    def _fit(self, samples: Sequence[TextSample]) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        digests = text_digests(samples)
        distinct = len(np.unique(digests))
        if distinct < MIN_SAMPLES:
            logger.info(
                "%d different samples are too few to learn which targets belong to which prompts: "
                "the column mismatch is 0 for all.",
                distinct,
            )
            return
        sides = self._sides(samples)
        fold = digests % FOLDS
        source = np.array([sample.source or "" for sample in samples])
        partner = _partners(_kinds(source, sides.prompt))
        self._centre = sides.target.mean(axis=0)
        self._maps = [
            _ridge(sides.prompt[fold != f], sides.target[fold != f]) for f in range(FOLDS)
        ]
        found = self._columns(sides, fold)
        shuffled = self._columns(sides, fold, partner)
        odds: FloatArray = np.zeros((2, len(samples)))
        for f in range(FOLDS):
            train, held = fold != f, fold == f
            rows = np.concatenate([found[train], shuffled[train]])
            label = np.repeat([1, 0], int(train.sum()))
            classifier = HistGradientBoostingClassifier(
                max_iter=150,
                learning_rate=0.06,
                min_samples_leaf=40,
                early_stopping=False,
                random_state=0,
            ).fit(rows, label)
            self._classifiers.append(classifier)
            if held.any():
                odds[0, held] = classifier.decision_function(found[held])
                odds[1, held] = classifier.decision_function(shuffled[held])
        self.share = misplaced_share(odds[0], odds[1])
        if self.share is None:
            logger.info(
                "what the words say cannot tell targets of other prompts apart, or most targets "
                "are: the column mismatch is 0 where a source does not tell by itself."
            )
        for name in np.unique(source):
            mine = source == name
            if np.count_nonzero(mine) >= MIN_OF_SOURCE:
                share = misplaced_share(*odds[:, mine]) or 0.0
                telling = _chance_above(*odds[:, mine]) >= TELLING
                self.share_of[str(name)] = share if telling else min(share, self.share or 0.0)
        assumed = float(np.mean([self._share_of(sample) for sample in samples]))
        if assumed or self.share is not None:
            self.assumed = assumed

    def _share_of(self, sample: TextSample) -> float:
        return self.share_of.get(sample.source or "", self.share or 0.0)

    def mismatch(
        self, samples: Sequence[TextSample], pairs: HashedPairs, features: Float32Array
    ) -> Float32Array:
        """(n,) probability in [0, 1] that a sample's target belongs to another prompt.

        Args:
            samples: n samples.
            pairs: Their hashed vectors.
            features: (n, len(FEATURE_NAMES)) as `feature_columns` gives them.
        """
        share = np.array([self._share_of(sample) for sample in samples])
        if not (self.fitted and share.any()):
            return np.zeros(len(samples), np.float32)
        # What was hashed and compressed whole serves where whole is what is looked at.
        cut = [cut_sides(sample) for sample in samples]
        with _one_thread():
            sides = self._sides(cut, *_of_cut(self._tfidf, samples, cut, pairs, features))
            fold = text_digests(cut) % FOLDS
            columns = self._columns(sides, fold)
            odds = np.zeros(len(samples))
            for f, classifier in enumerate(self._classifiers):
                if (fold == f).any():
                    odds[fold == f] = classifier.decision_function(columns[fold == f])
        probability: Float32Array = np.minimum(1.0, share * np.exp(-odds)).astype(np.float32)
        return probability

    def _sides(
        self,
        samples: Sequence[TextSample],
        pairs: HashedPairs | None = None,
        features: Float32Array | None = None,
    ) -> _Sides:
        pairs = self._tfidf.transform(samples) if pairs is None else pairs
        return _Sides(
            samples=samples,
            pairs=pairs,
            features=feature_columns(samples, pairs) if features is None else features,
            prompt=normalised((pairs.prompt @ self._projection).toarray()),
            target=normalised((pairs.target @ self._projection).toarray()),
        )

    def _columns(
        self, sides: _Sides, fold: IntArray, partner: IntArray | None = None
    ) -> Float32Array:
        """(n, 6) what is told of each prompt with its own target, or with its partner's."""
        cosine, packed, alone = (
            sides.features[:, FEATURE_NAMES.index(name)]
            for name in ("prompt_target_cosine", "target_given_prompt", "target_compression")
        )
        at = np.arange(len(fold))
        if partner is not None:
            at, alone = partner, alone[partner]
            cosine = np.asarray(sides.pairs.prompt.multiply(sides.pairs.target[at]).sum(1))
            packed = np.array(
                [
                    compression(sides.samples[other].target, sample.prompt)
                    for sample, other in zip(sides.samples, at.tolist(), strict=True)
                ]
            )
        likeness = np.zeros(len(fold))
        centred = sides.target[at] - self._centre
        for f, linear in enumerate(self._maps):
            mine = fold == f
            if mine.any():
                predicted = _with_one(sides.prompt[mine]) @ linear - self._centre
                likeness[mine] = np.sum(normalised(predicted) * normalised(centred[mine]), axis=1)
        columns = (
            cosine.reshape(-1),
            likeness,
            np.log1p([len(sample.prompt) for sample in sides.samples]),
            np.log1p([len(sides.samples[other].target) for other in at.tolist()]),
            packed,
            alone,
        )
        # All in one precision: told apart by rounding, shuffled pairs would never look like found.
        return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)


def _of_cut(
    tfidf: HashedTfidf,
    samples: Sequence[TextSample],
    cut: Sequence[TextSample],
    pairs: HashedPairs,
    features: Float32Array,
) -> tuple[HashedPairs, Float32Array]:
    """Vectors and columns of n samples, anew for those only that were cut."""
    other = [n for n, sample in enumerate(samples) if cut[n] is not sample]
    if not other:
        return pairs, features
    fresh = [cut[n] for n in other]
    hashed = tfidf.transform(fresh)
    at = np.arange(len(samples))
    at[other] = len(samples) + np.arange(len(other))
    columns = np.concatenate([features, feature_columns(fresh, hashed)])[at]
    return pairs.stacked(hashed).taken(at), columns


def _one_thread() -> AbstractContextManager[object]:
    """Context without further threads: each process of several has a core, and a bounded memory."""
    context: AbstractContextManager[object] = threadpool_limits(limits=1)
    return context


def cut_sides(sample: TextSample) -> TextSample:
    """The sample with the end of its prompt and the beginning of its target, if they are long."""
    if max(len(sample.prompt), len(sample.target)) <= SIDE_CHARACTERS:
        return sample
    return TextSample(
        prompt=sample.prompt[-SIDE_CHARACTERS:],
        target=sample.target[:SIDE_CHARACTERS],
        length=sample.length,
        source=sample.source,
    )


def misplaced_share(found: FloatArray, shuffled: FloatArray) -> float | None:
    """Share of found pairs that must be shuffled ones, from the odds of both.

    Args:
        found: (n,) log odds of the pairs as found.
        shuffled: (m,) log odds of shuffled pairs.

    Returns:
        Share in [0, `MAX_SHARE`]; None if more than that would have to be: then either the odds do
        not tell pairs apart, or most are shuffled, and nothing tells these two cases apart.
    """
    ratios = [
        float(np.mean(found <= threshold) / np.mean(shuffled <= threshold))
        for threshold in np.quantile(shuffled, TAILS)
    ]
    share = min(ratios)
    return share if share <= MAX_SHARE else None


def _chance_above(found: FloatArray, shuffled: FloatArray) -> float:
    """Chance that one of the first is larger than one of the second; ties count half."""
    ordered = np.sort(shuffled)
    below = np.searchsorted(ordered, found, side="left") + np.searchsorted(
        ordered, found, side="right"
    )
    return float(below.mean()) / (2.0 * len(ordered))


def text_digests(samples: Sequence[TextSample]) -> IntArray:
    """(n,) a number of each sample, the same for samples with the same words."""
    digests = [xxhash.xxh3_64_intdigest(f"{s.prompt}\n{s.target}".encode()) for s in samples]
    return (np.array(digests, np.uint64) >> np.uint64(1)).astype(np.int64)


def _kinds(source: NDArray[np.str_], prompt: Float32Array) -> NDArray[np.str_]:
    """(n,) sources, and clusters of the prompts where no source is named."""
    unnamed = np.flatnonzero(source == "")
    if len(unnamed) < 2 * CLUSTERS:
        return source
    from sklearn.cluster import MiniBatchKMeans

    clusters = MiniBatchKMeans(CLUSTERS, random_state=0, n_init=3).fit_predict(prompt[unnamed])
    kinds = source.astype(object)
    kinds[unnamed] = [f" {cluster}" for cluster in clusters]
    return kinds.astype(str)


def _partners(kind: NDArray[np.str_]) -> IntArray:
    """(n,) another sample of the same kind for each, of any kind where it is the only one."""
    rng = np.random.default_rng(0)
    partner = np.arange(len(kind))
    for name in np.unique(kind):
        mine = rng.permutation(np.flatnonzero(kind == name))
        partner[mine] = np.roll(mine, 1)
    alone: BoolArray = partner == np.arange(len(kind))
    partner[alone] = rng.integers(0, len(kind), int(alone.sum()))
    return partner


def _ridge(prompt: Float32Array, target: Float32Array) -> Float32Array:
    """(dim + 1, dim) linear map that predicts targets from prompts."""
    rows = _with_one(prompt).astype(np.float64)
    gram = rows.T @ rows
    gram[np.diag_indices_from(gram)] += PENALTY * np.trace(gram) / len(gram)
    solved: Float32Array = np.linalg.solve(gram, rows.T @ target).astype(np.float32)
    return solved


def _with_one(rows: Float32Array) -> Float32Array:
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
