"""Strata: source x embedding cluster, by online spherical k-means."""

from __future__ import annotations

import logging

import numpy as np

from slap_stream.core.kernels import sum_by_group, weigh
from slap_stream.core.linear import normalised
from slap_stream.core.rng import Purpose, generator
from slap_stream.core.saved import Saved
from slap_stream.types import Float32Array, FloatArray, IntArray, State

logger = logging.getLogger(__name__)

# A stratum that holds fewer candidates than this at a time offers no choice inside itself.
MIN_POOL_OF_STRATUM = 16
LLOYD_ROUNDS = 5


class Strata:
    """Assigns a stratum to each candidate when it is offered.

    Sources and clusters are dropped where the pool would be too thin for them: clusters first,
    then sources, so that there is something to choose from inside every stratum.

    Args:
        num_sources: Sources of the dataset.
        num_clusters: Clusters asked for.
        pool_size: Candidates in a lane's pool.

    Attributes:
        centroids: (clusters, dim) float32 unit vectors; zero until `seed` was called.
        by_source: Whether the source is part of the stratum.
        num_sources: Sources that are told apart; 1 if they are not.
    """

    def __init__(self, *, num_sources: int, num_clusters: int, pool_size: int, dim: int) -> None:
        most = max(1, pool_size // MIN_POOL_OF_STRATUM)
        self.by_source = 1 < num_sources <= most
        self.num_sources = num_sources if self.by_source else 1
        clusters = max(1, min(num_clusters, most // self.num_sources))
        self.centroids: Float32Array = np.zeros((clusters, dim), np.float32)
        # Samples a centroid stands for: how much a refresh may move it.
        self._mass: FloatArray = np.zeros(clusters, np.float64)
        if num_sources > most:
            logger.info(
                "%d sources are too many for a pool of %d candidates: strata are clusters of the "
                "embeddings alone. A larger batch or pool_batches would keep them apart.",
                num_sources,
                pool_size,
            )

    @property
    def num_strata(self) -> int:
        """Strata, empty ones included."""
        return self.num_sources * len(self.centroids)

    def seed(self, embedding: Float32Array, seed: int) -> None:
        """Place the centroids by k-means++ and a few rounds of Lloyd's algorithm.

        Args:
            embedding: (n, dim) the first block's embeddings.
            seed: Seed of the run.

        Reference: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007;
            on the unit sphere, with 1 - cosine as the squared distance.
        """
        rows = normalised(embedding.astype(np.float64))
        rng = generator(seed, Purpose.CENTROIDS)
        rows = rows[rng.permutation(len(rows))[:4096]]
        chosen = [rows[0]]
        distance = np.full(len(rows), np.inf)
        while len(chosen) < len(self.centroids):
            distance = np.minimum(distance, np.maximum(0.0, 1.0 - rows @ chosen[-1]))
            total = distance.sum()
            # Fewer distinct rows than clusters: what is left starts as a copy and stays empty.
            pick = int(rng.choice(len(rows), p=distance / total)) if total > 0 else 0
            chosen.append(rows[pick])
        centroids = np.stack(chosen)
        for _ in range(LLOYD_ROUNDS):
            nearest = np.argmax(rows @ centroids.T, axis=1)
            sums = np.stack([rows[nearest == c].sum(axis=0) for c in range(len(centroids))])
            centroids = np.where(np.any(sums != 0, axis=1)[:, None], normalised(sums), centroids)
        self.centroids = centroids.astype(np.float32)
        self._mass = np.bincount(nearest, minlength=len(centroids)).astype(np.float64)

    def assign(self, embedding: Float32Array, source: IntArray) -> IntArray:
        """(n,) strata of candidates with (n, dim) embeddings and (n,) sources."""
        cluster = self.clusters(embedding)
        if not self.by_source:
            return cluster
        return source.astype(np.int64) * len(self.centroids) + cluster

    def sources_of(self, stratum: IntArray) -> IntArray:
        """(n,) sources that (n,) strata are part of; zeros where they are not told apart."""
        return stratum // len(self.centroids)

    def clusters(self, embedding: Float32Array) -> IntArray:
        """(n,) nearest centroids by cosine; ties go to the lower index."""
        nearest: IntArray = np.argmax(weigh(embedding, self.centroids), axis=1)
        return nearest

    def move(self, sums: FloatArray, counts: FloatArray, decay: float) -> None:
        """Move the centroids towards what was offered since the last refresh.

        Args:
            sums: (clusters, dim) sums of the unit embeddings assigned to each centroid.
            counts: (clusters,) how many.
            decay: Factor on what a centroid stood for before.
        """
        weight = self._mass * decay
        moved = self.centroids * weight[:, None] + sums
        some = counts > 0
        self.centroids = np.where(some[:, None], normalised(moved), self.centroids).astype(
            np.float32
        )
        self._mass = weight + counts

    def state_dict(self) -> State:
        """Centroids and their masses."""
        return {"centroids": self.centroids.copy(), "mass": self._mass.copy()}

    def load_state_dict(self, state: Saved) -> None:
        """Take over saved centroids."""
        self.centroids = state.numbers32("centroids", *self.centroids.shape)
        self._mass = state.numbers("mass", len(self.centroids), least=0.0)


def cluster_sums(
    embedding: Float32Array, cluster: IntArray, num_clusters: int
) -> tuple[FloatArray, FloatArray]:
    """Sums (clusters, dim) of (n, dim) unit embeddings by cluster, and counts (clusters,)."""
    sums = sum_by_group(embedding, cluster, num_clusters)
    return sums, np.bincount(cluster, minlength=num_clusters).astype(np.float64)
