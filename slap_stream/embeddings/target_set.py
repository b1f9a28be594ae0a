"""The column `relevance`: is a sample of the kind that a target set shows?

A classifier learns to tell the target set's examples from the corpus, by the embedding and the
cheap columns. Its odds are those of a sample being an example rather than any sample of the corpus,
t(x) / o(x). If a share c of the corpus is of the examples' kind, then o = c t + (1 - c) r, and a
sample is of that kind with probability c t(x) / o(x). Where hardly anything else looks like the
examples, what does is all of their kind, so c is the smallest ratio of the corpus to the examples
above any threshold of the odds.

So examples that were drawn from the corpus itself change nothing: the odds are even, and c is 1.

Reference: learning from positive and unlabelled samples is Elkan and Noto, KDD 2008; the share by
    the smallest ratio is Blanchard, Lee and Scott, JMLR 2010. That similar embeddings are what
    serves a target set best is Ivison et al., arXiv:2503.01807; here a classifier takes the place
    of their nearest neighbours, which find less of what is of a kind (docs/selection.md).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.peeking import read_records
from slap_stream.corpus.tokenising import load_tokenizer, take_tokens, tokenise
from slap_stream.embeddings.corpus_texts import CorpusTexts, describe_corpus
from slap_stream.embeddings.features import FEATURE_NAMES
from slap_stream.embeddings.pairing import text_digests
from slap_stream.errors import CorpusError
from slap_stream.shards.index import INDEX_NAME, corpus_columns, corpus_size
from slap_stream.text.sample import TextSample, from_messages, from_tokens
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray

logger = logging.getLogger(__name__)

# With fewer different examples nothing can be learnt; more than so many say nothing more.
LEAST_EXAMPLES, MOST_EXAMPLES = 10, 10_000
# A sample is judged by a classifier that has seen neither it nor its exact copies.
FOLDS = 5
# Penalty of the classifier, over the whole weight of the samples.
PENALTY = 0.01
# A column that varies counts as much as this part of the embedding: told apart by columns alone,
# what is of the same length would be of the same kind.
COLUMN_WEIGHT = 0.1
# Parts of the examples below the thresholds at which they are compared with the corpus.
TAILS = (0.2, 0.3, 0.4)
# Penalty of a slope that nothing else would bound: no other sample scores as the examples do.
STIFFNESS = 1e-5
# From this share on the examples are hardly told from the corpus.
ALL_OF_IT = 0.9
# With fewer samples of their kind among those that were looked at there is little to choose from.
FEW = 5
# The length is left out, because it is in another unit where examples and corpus are not both
# tokens; and how rare words are, because those of the corpus were counted and those of the examples
# were not.
COLUMNS = tuple(name for name in FEATURE_NAMES if name not in ("log_length", "target_rarity"))

# (n,) samples to their (n, dim) embeddings and (n, columns) feature columns.
Describe = Callable[[Sequence[TextSample]], tuple[Float32Array, Float32Array]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What the model is to become good at.

    Attributes:
        samples: (n,) all different, in an order that does not depend on that of the records.
        digest: Of their texts.
    """

    samples: tuple[TextSample, ...]
    digest: str

    @classmethod
    def of(cls, samples: Sequence[TextSample]) -> Examples:
        """The different ones of some samples.

        Raises:
            CorpusError: If they are too few.
        """
        digests, first = np.unique(text_digests(samples), return_index=True)
        if len(first) < LEAST_EXAMPLES:
            raise CorpusError(
                f"target must hold at least {LEAST_EXAMPLES} different records, got {len(first)}; "
                "what a kind of samples has in common is not told by fewer."
            )
        digest = hashlib.sha256(digests.tobytes()).hexdigest()
        return cls(samples=tuple(samples[at] for at in first.tolist()), digest=digest[:16])


def read_examples(target: str | Path, texts: CorpusTexts) -> Examples:
    """The examples of a target set, made to text as the corpus is.

    Args:
        target: A directory of MDS shards with the corpus's columns, or JSON lines, Parquet or a
            dataset saved to disk, in any shape that `convert` takes.
        texts: Reads the corpus.

    Raises:
        CorpusError: If it cannot be read, a record cannot be used, or there are too few or too
            many.
    """
    path = Path(target)
    if not path.exists():
        raise CorpusError(
            f"target must be a file or a directory, got {str(target)!r}; name examples of what the "
            "model is to become good at."
        )
    found = _of_shards(path, texts) if (path / INDEX_NAME).is_file() else _of_records(path, texts)
    samples = list(islice(found, MOST_EXAMPLES + 1))
    if len(samples) > MOST_EXAMPLES:
        raise CorpusError(
            f"target must hold at most {MOST_EXAMPLES} records, got more in {str(path)!r}; a part "
            "of them, drawn by chance, says as much."
        )
    if not samples:
        raise CorpusError(f"target must hold records, got none in {str(path)!r}.")
    if texts.tokenizer is not None:
        samples = [_tokenised(sample, texts, at) for at, sample in enumerate(samples)]
    return Examples.of(samples)


def _of_shards(path: Path, texts: CorpusTexts) -> Iterator[TextSample]:
    # Messages are read without a tokenizer, and made to tokens afterwards.
    unnamed = "input_ids" in corpus_columns(path) and "tokenizer" not in describe_corpus(path)
    theirs = CorpusTexts(
        corpus_dir=path,
        text_column=texts.text_column,
        prompt_column=texts.prompt_column,
        completion_column=texts.completion_column,
        source_column=None,
        tokenizer=texts.tokenizer if unnamed else None,
    ).found()
    yield from theirs.read(0, corpus_size(path))


def _of_records(path: Path, texts: CorpusTexts) -> Iterator[TextSample]:
    # Token ids say nothing to a corpus of texts.
    tokenised = texts.tokenizer is not None
    for number, record in enumerate(read_records(path, tokenised=tokenised)):
        if isinstance(record, RecordDropped):
            raise _unusable(number, record) from record
        if "messages" in record:
            yield from_messages(record["messages"], None)
            continue
        name = str(texts.tokenizer)
        take = partial(take_tokens, name, record, truncate="right", masked=False)
        yield _cut_as_there(take, texts, number)


def _tokenised(sample: TextSample, texts: CorpusTexts, number: int) -> TextSample:
    """As it would stand in the corpus: cut as there, and with what its template adds."""
    if sample.messages is None:
        return sample
    messages = [*map(dict, sample.messages)]
    return _cut_as_there(partial(tokenise, str(texts.tokenizer), messages), texts, number)


def _cut_as_there(
    make: Callable[..., tuple[dict[str, Any], Any]], texts: CorpusTexts, number: int
) -> TextSample:
    """Of what `make(max_length=...)` gives, as the corpus cuts its samples."""
    tokenizer = load_tokenizer(str(texts.tokenizer))
    most = describe_corpus(texts.corpus_dir).get("max_length")
    try:
        try:
            columns, _ = make(max_length=most)
        except RecordDropped as dropped:
            if dropped.reason not in (DropReason.TOO_LONG, DropReason.NOTHING_SUPERVISED):
                raise
            # The corpus would leave it out; it still shows what is wanted.
            columns, _ = make(max_length=None)
    except RecordDropped as dropped:
        raise _unusable(number, dropped) from dropped
    return from_tokens(
        columns, None, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
    )


def _unusable(number: int, dropped: RecordDropped) -> CorpusError:
    return CorpusError(
        f"target must hold records that can be learnt from, got one that cannot, number {number} "
        f"({dropped}); take it out."
    )


class Relevance:
    """How likely samples are of the examples' kind.

    State: for each fold the weights of a linear classifier; how its odds are to be read.

    Args:
        examples: The examples.

    Attributes:
        share: Share of the corpus that is of their kind.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.share = 1.0
        self._digests = text_digests(examples.samples)
        self._shift: FloatArray = np.zeros(0)
        self._factor: FloatArray = np.zeros(0)
        self._weights: FloatArray = np.zeros((0, FOLDS))
        # Everything is, unless something else is shown.
        self._line = 0.0, np.inf

    def __getstate__(self) -> dict[str, Any]:
        # Texts, which nobody needs who does not fit.
        return {name: value for name, value in vars(self).items() if name != "examples"}

    def fit(self, samples: Sequence[TextSample], describe: Describe) -> None:
        """Learn what tells the examples from n samples of the corpus."""
        with threadpool_limits(limits=1):
            self._fit(samples, describe)

    def _fit(self, samples: Sequence[TextSample], describe: Describe) -> None:
        corpus, mine = (np.hstack(describe(some)) for some in (samples, self.examples.samples))
        dim = corpus.shape[1] - len(COLUMNS)
        self._shift = corpus.mean(axis=0, dtype=np.float64)
        spread = corpus.std(axis=0, dtype=np.float64)
        # The embedding's directions keep their proportions; together they have power one.
        spread[:dim] = np.sqrt(np.sum(spread[:dim] ** 2))
        spread[dim:] /= COLUMN_WEIGHT
        self._factor = np.where(spread > 1e-6, 1.0 / np.maximum(spread, 1e-6), 0.0)
        rows, examples = self._inputs(corpus), self._inputs(mine)
        fold, fold_of_mine = self._folds(text_digests(samples)), self._folds(self._digests)
        self._weights = np.zeros((rows.shape[1], FOLDS))
        for f in range(FOLDS):
            seen = examples[fold_of_mine != f], rows[fold != f]
            self._weights[:, f] = _classifier(*seen)
        found, given = self._scores(rows, fold), self._scores(examples, fold_of_mine)
        self.share = kindred_share(found, given)
        if self.share < 1.0:
            self._line = _odds(found, given, self.share)
        if self.share >= ALL_OF_IT:
            logger.warning(
                "the target set looks like all of the corpus, so that nothing will be pruned for "
                "it: %.0f %% are of its kind.",
                100 * self.share,
            )
        elif self.share * len(rows) < FEW:
            logger.warning(
                "next to nothing of the corpus is of the target set's kind (%.2f %%), so that what "
                "is trained on will hardly be chosen for it.",
                100 * self.share,
            )

    def relevance(
        self, samples: Sequence[TextSample], embedding: Float32Array, columns: Float32Array
    ) -> Float32Array:
        """(n,) probability in [0, 1] that a sample is of the examples' kind.

        Args:
            samples: n samples.
            embedding: (n, dim) as `describe` of `fit` gave them.
            columns: (n, columns) likewise.
        """
        from scipy.special import expit

        rows = self._inputs(np.hstack([embedding, columns]))
        score = self._scores(rows, self._folds(text_digests(samples)))
        slope, level = self._line
        probability: Float32Array = expit(slope * score + level).astype(np.float32)
        return probability

    def _inputs(self, described: Float32Array) -> FloatArray:
        """(n, dim + columns + 1) centred and scaled, and a one for the level."""
        scaled = (described - self._shift) * self._factor
        return np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)

    def _folds(self, digests: IntArray) -> IntArray:
        """(n,) an example's copies in its fold; the examples evenly over all."""
        place = np.searchsorted(self._digests, digests)
        known: BoolArray = self._digests[np.minimum(place, len(self._digests) - 1)] == digests
        folds: IntArray = np.where(known, place, digests) % FOLDS
        return folds

    def _scores(self, rows: FloatArray, fold: IntArray) -> FloatArray:
        score: FloatArray = np.einsum("nk,kn->n", rows, self._weights[:, fold])
        return score


def kindred_share(found: FloatArray, given: FloatArray) -> float:
    """Share in (0, 1] of a corpus that must be of the examples' kind.

    Args:
        found: (n,) scores of the corpus's samples; the higher, the more like an example.
        given: (m,) scores of the examples.
    """
    # One more of the corpus: that none of it was seen there does not say that there is none.
    ratios = [
        (np.count_nonzero(found >= least) + 1) / (len(found) + 1) / np.mean(given >= least)
        for least in np.quantile(given, TAILS)
    ]
    return float(min(1.0, *ratios))


def _odds(found: FloatArray, given: FloatArray, share: float) -> tuple[float, float]:
    """Slope and level of the log odds of being of the examples' kind.

    Of all that rise with the score: those by which that share of the corpus is of their kind, and
    what is scores on average as they do. This is logistic regression with the risk of du Plessis,
    Niu and Sugiyama, ICML 2015, where all that is not labelled may be of the kind, too.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    start, scale = np.array([1.0, np.log(share / (1.0 - share))]), max(1e-9, float(found.std()))
    standing, mean = found / scale, float(given.mean()) / scale

    def risk(line: FloatArray) -> tuple[float, FloatArray]:
        log_odds = line[0] * standing + line[1]
        probability = expit(log_odds)
        loss = np.logaddexp(0.0, log_odds).mean() - share * (line[0] * mean + line[1])
        pull = probability.mean() - share, (probability * standing).mean() - share * mean
        return (
            float(loss) + STIFFNESS * float(line[0] ** 2),
            np.array([pull[1] + 2 * STIFFNESS * line[0], pull[0]]),
        )

    slope, level = minimize(risk, start, jac=True, bounds=[(0.0, None), (None, None)]).x
    return float(slope) / scale, float(level)


def _classifier(examples: FloatArray, rows: FloatArray) -> FloatArray:
    """(columns,) weights that tell rows of both kinds apart, the last that of the ones."""
    fitted = _logistic(examples[:, :-1], rows[:, :-1], PENALTY)
    return np.append(fitted.coef_[0], fitted.intercept_)


def _logistic(examples: FloatArray, rows: FloatArray, penalty: float) -> Any:
    """Logistic regression in which examples and rows have the same weight, one in all."""
    from sklearn.linear_model import LogisticRegression

    counts = [len(examples), len(rows)]
    return LogisticRegression(C=1.0 / penalty, max_iter=1_000).fit(
        np.concatenate([examples, rows]),
        np.repeat([1, 0], counts),
        sample_weight=np.repeat(0.5 / np.array(counts), counts),
    )
