"""What is in a corpus, from its shards and embeddings alone: before any training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.kernels import unit_rows
from slap_stream.core.linear import single_threaded
from slap_stream.embeddings.store import EmbeddingStore
from slap_stream.selection.scoring import copy_likelihood, neighbour_distance
from slap_stream.types import MISMATCH_COLUMN, BoolArray, Float32Array, FloatArray, IntArray

# Samples that nearest neighbours are looked for of: as many as so many products allow.
_PRODUCTS = 4e11
_MOST_QUERIES, _LEAST_QUERIES = 20_000, 1_000
_ROWS_AT_ONCE = 16_384
# As in selection: what has no copy is this far from its nearest neighbour, nine times in ten, among
# so many candidates.
_WINDOW, _NOT_COPIED = 1024, 0.9
_CLUSTERS, _CLUSTER_ROWS = 16, 20_000
_EXAMPLES, _SUSPECTS, _PAIRS = 2, 30, 30
_LENGTH_BINS = _DISTANCE_BINS = 40
LEAST_SHOWN = 0.5


@dataclass(kw_only=True, slots=True)
class Part:
    """Samples of a source, or of a cluster.

    Attributes:
        name: Of the source, or number of the cluster.
        count: Samples.
        median_length: In the store's unit.
        copies: Share of those asked about that nearly repeat an earlier sample; NaN if none was.
        mismatched: Share whose target may belong to another prompt; NaN if nobody knows.
        examples: Sample ids in the middle of it.
    """

    name: str
    count: int
    median_length: float
    copies: float
    mismatched: float
    examples: list[int]


@dataclass(kw_only=True, slots=True)
class Pair:
    """A sample that nearly repeats an earlier one.

    Attributes:
        sample_id: The later one.
        earlier: The earlier one.
        distance: Between their unit embeddings.
    """

    sample_id: int
    earlier: int
    distance: float


class CorpusFacts:
    """What a page says of a corpus.

    Args:
        store: Its embeddings.
        seed: Decides which samples are asked about.

    Attributes:
        num_samples: Samples.
        length_unit: What lengths are in.
        lengths: (num_samples,) lengths.
        asked: (n,) samples whose nearest earlier neighbour was looked for, ascending.
        distance: (n,) distance to it.
        apart: Distance to the nearest neighbour of what has no copy.
        copy_rate: Share of the samples asked about that nearly repeat an earlier one.
        copy_error: Half of its 95 % interval.
        mismatch: (num_samples,) how much speaks for the target being another prompt's, in [0, 1];
            None where nobody knows. As a probability it is too high: it takes for misplaced all
            that may be.
        sources: By source, the largest first.
        clusters: By cluster of the embeddings, the largest first.
        pairs: Some that are nearly the same, the nearest first.
        suspects: Samples for whose target that most speaks, the strongest first.
        odd: By what is odd about them, sample ids.
    """

    def __init__(self, store: EmbeddingStore, *, seed: int = 0) -> None:
        self._store = store
        self.num_samples, dim = store.shape
        self.length_unit = store.length_unit
        rng = np.random.default_rng(seed)
        lengths, sources, features = [], [], []
        for start, stop in _ranges(self.num_samples):
            rows = store.read(start, stop)
            lengths.append(np.asarray(rows.length, np.int64))
            sources.append(np.asarray(rows.source, np.int64))
            features.append(np.asarray(rows.feature, np.float16))
        self.lengths: IntArray = np.concatenate(lengths)
        source: IntArray = np.concatenate(sources)
        feature: NDArray[Any] = np.concatenate(features)
        names = list(store.feature_names)
        self.mismatch: FloatArray | None = None
        if MISMATCH_COLUMN in names:
            self.mismatch = feature[:, names.index(MISMATCH_COLUMN)].astype(np.float64)
        wanted = max(_LEAST_QUERIES, int(_PRODUCTS / (self.num_samples * dim)))
        count = min(self.num_samples, _MOST_QUERIES, wanted)
        self.asked: IntArray = np.sort(rng.choice(self.num_samples, count, replace=False))
        self.apart = self._yardstick(rng)
        self.distance, self._earlier = self._nearest_earlier()
        likely = copy_likelihood(self.distance / self.apart)
        self._copied: BoolArray = likely >= LEAST_SHOWN
        self.copy_rate = float(self._copied.mean())
        spread = self.copy_rate * (1.0 - self.copy_rate) / count
        left = 1.0 - count / self.num_samples
        self.copy_error = 1.96 * float(np.sqrt(spread * left))
        cluster, middle = self._clustered(rng)
        self.sources = self._parts(source, list(store.source_names), {})
        self.clusters = self._parts(cluster, [str(n) for n in range(len(middle))], middle)
        order = np.argsort(self.distance, kind="stable")
        order = order[self._copied[order]][:_PAIRS]
        self.pairs = [
            Pair(
                sample_id=int(self.asked[at]),
                earlier=int(self._earlier[at]),
                distance=float(self.distance[at]),
            )
            for at in order
        ]
        self.suspects = self._suspects()
        self.odd = self._odd(feature, names)

    @property
    def misplaced_share(self) -> float | None:
        """Share of the targets that seem to belong to other prompts, as slap-embed found."""
        found: float | None = self._store.attributes.get("misplaced_share")
        return found

    @property
    def marked_share(self) -> float:
        """Share of the targets for which at least as much speaks as is shown; NaN if unknown."""
        if self.mismatch is None:
            return float("nan")
        return float(np.mean(self.mismatch >= LEAST_SHOWN))

    def source_of(self, ids: list[int]) -> list[str]:
        """(n,) names of the sources of (n,) samples."""
        names = self._store.source_names
        return [names[int(source)] for source in self._store.read_ids(np.array(ids)).source]

    def length_histogram(self) -> tuple[FloatArray, IntArray]:
        """(n + 1,) edges, equally far apart in logarithms, and (n,) counts."""
        longest = max(2.0, float(self.lengths.max()) + 1)
        edges = np.unique(np.round(np.geomspace(1, longest, _LENGTH_BINS + 1)))
        counts, _ = np.histogram(self.lengths, edges)
        return edges, counts

    def distance_histogram(self) -> tuple[FloatArray, IntArray]:
        """(n + 1,) edges, in units of `apart`, and (n,) counts."""
        edges = np.linspace(0, 1.5, _DISTANCE_BINS + 1)
        counts, _ = np.histogram(np.clip(self.distance / self.apart, 0, 1.499), edges)
        return edges, counts

    def _unit(self, ids: IntArray) -> Float32Array:
        return unit_rows(np.asarray(self._store.read_ids(ids).embedding, np.float32))

    def _yardstick(self, rng: np.random.Generator) -> float:
        some = rng.choice(self.num_samples, min(self.num_samples, _WINDOW), replace=False)
        strata = np.zeros(len(some), np.int64)
        return neighbour_distance(self._unit(np.sort(some)), strata, _NOT_COPIED)

    def _nearest_earlier(self) -> tuple[FloatArray, IntArray]:
        """(n,) distances of those asked about to the nearest earlier sample, and (n,) which; inf
        and -1 for the first sample."""
        queries = self._unit(self.asked)
        best = np.full(len(queries), -np.inf, np.float32)
        nearest = np.full(len(queries), -1, np.int64)
        for start, stop in _ranges(self.num_samples):
            rows = unit_rows(np.asarray(self._store.read(start, stop).embedding, np.float32))
            # Those before the block have no earlier sample in it.
            first = int(np.searchsorted(self.asked, start, side="right"))
            for low in range(first, len(queries), 2048):
                high = min(low + 2048, len(queries))
                cosine = queries[low:high] @ rows.T
                ids = np.arange(start, stop)
                if self.asked[low] < stop:
                    cosine[ids >= self.asked[low:high, None]] = -np.inf
                at = np.argmax(cosine, axis=1)
                value = cosine[np.arange(high - low), at]
                nearer = value > best[low:high]
                best[low:high][nearer] = value[nearer]
                nearest[low:high][nearer] = ids[at[nearer]]
        distance: FloatArray = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * best.astype(np.float64)))
        return distance, nearest

    def _clustered(self, rng: np.random.Generator) -> tuple[IntArray, dict[int, list[int]]]:
        """(num_samples,) clusters, and by cluster the samples nearest to its middle."""
        from sklearn.cluster import MiniBatchKMeans

        count = min(self.num_samples, _CLUSTER_ROWS)
        some = np.sort(rng.choice(self.num_samples, count, replace=False))
        rows = self._unit(some)
        clusters = min(_CLUSTERS, max(1, count // 8))
        # One thread: scikit-learn's own takes turns with OpenBLAS's and waits for it.
        with single_threaded():
            fitted = MiniBatchKMeans(clusters, random_state=0, n_init=1, max_iter=20).fit(rows)
        centres = unit_rows(np.asarray(fitted.cluster_centers_, np.float32))
        cluster = np.empty(self.num_samples, np.int64)
        for start, stop in _ranges(self.num_samples):
            block = unit_rows(np.asarray(self._store.read(start, stop).embedding, np.float32))
            cluster[start:stop] = np.argmax(block @ centres.T, axis=1)
        closeness = rows @ centres.T
        middle = {}
        for number in range(clusters):
            mine = np.flatnonzero(cluster[some] == number)
            order = np.argsort(-closeness[mine, number], kind="stable")[:_EXAMPLES]
            middle[number] = some[mine[order]].tolist()
        return cluster, middle

    def _parts(
        self, group: IntArray, names: list[str], examples: dict[int, list[int]]
    ) -> list[Part]:
        of_asked, parts = group[self.asked], []
        for number, name in enumerate(names):
            mine = group == number
            if not mine.any():
                continue
            copied = self._copied[of_asked == number]
            wrong = None if self.mismatch is None else self.mismatch[mine] >= LEAST_SHOWN
            parts.append(
                Part(
                    name=name,
                    count=int(mine.sum()),
                    median_length=float(np.median(self.lengths[mine])),
                    copies=float(copied.mean()) if len(copied) else float("nan"),
                    mismatched=float("nan") if wrong is None else float(wrong.mean()),
                    examples=examples.get(number, []),
                )
            )
        return sorted(parts, key=lambda part: -part.count)

    def _suspects(self) -> list[int]:
        if self.mismatch is None:
            return []
        order = np.argsort(-self.mismatch, kind="stable")[:_SUSPECTS]
        return [int(n) for n in order if self.mismatch[n] >= LEAST_SHOWN]

    def _odd(self, feature: NDArray[Any], names: list[str]) -> dict[str, list[int]]:
        odd = {
            "longest": np.argsort(-self.lengths, kind="stable")[:_EXAMPLES].tolist(),
            "shortest": np.argsort(self.lengths, kind="stable")[:_EXAMPLES].tolist(),
        }
        if "target_compression" in names:
            column = feature[:, names.index("target_compression")]
            order = np.argsort(column, kind="stable")
            odd["target repeats itself most"] = order[:_EXAMPLES].tolist()
        return odd

    def warnings(self) -> list[str]:
        """What somebody should look into, in whole sentences."""
        found = []
        for part in self.sources:
            if part.count >= 50 and part.copies > 0.5:
                found.append(
                    f"{part.copies:.0%} of the source {part.name!r} nearly repeat an earlier "
                    "sample."
                )
            if part.count >= 50 and part.mismatched > 0.2:
                found.append(
                    f"Up to {part.mismatched:.0%} of the targets of {part.name!r} may belong to "
                    "other prompts, or are answers that go with many."
                )
        if self.mismatch is None:
            found.append(
                "The embeddings have no column mismatch, so targets of other prompts are not "
                "found. slap-embed makes it."
            )
        elif self.misplaced_share is None:
            found.append(
                "Whether targets belong to their prompts could not be found out: too few samples, "
                "or words that do not tell."
            )
        return found


def _ranges(num_samples: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_samples, _ROWS_AT_ONCE):
        yield start, min(start + _ROWS_AT_ONCE, num_samples)
