"""Hypothesis inputs: empty strata, one sample, ties, zero weights, repeats, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

Array = NDArray[Any]

seeds = st.integers(0, 2**32 - 1)


def floats(low: float = -8.0, high: float = 8.0, *, width: int = 64) -> st.SearchStrategy[float]:
    """Finite numbers; often from a coarse grid, so that ties are common."""
    grid = st.integers(int(low), int(high)).map(float)
    return grid | st.floats(low, high, width=width, allow_subnormal=False)  # type: ignore[arg-type]


def tables(rows: int, columns: int) -> st.SearchStrategy[Array]:
    """(rows, columns) float32."""
    return hnp.arrays(np.float32, (rows, columns), elements=floats(width=32))


@st.composite
def products(draw: st.DrawFn) -> tuple[Array, Array]:
    """(n, inner) and (inner, outer) float32, any of which may be zero."""
    n, inner, outer = (draw(st.integers(0, 6)) for _ in range(3))
    return draw(tables(n, inner)), draw(tables(inner, outer))


@st.composite
def deficits(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """What strata are owed, their stock (often none), and slots the stock can fill."""
    num_strata = draw(st.integers(1, 6))
    deficit = draw(hnp.arrays(np.float64, num_strata, elements=floats(-5.0, 5.0)))
    stock = draw(hnp.arrays(np.int64, num_strata, elements=st.integers(0, 6)))
    return deficit, stock, draw(st.integers(0, int(stock.sum())))


def unit_vectors(seed: int, n: int, dim: int, *, copies: bool = False) -> Array:
    """(n, dim) float32 random unit vectors; with `copies` about half repeat an earlier one."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, dim))
    if copies and n > 1:
        z = z[np.where(rng.random(n) < 0.5, rng.integers(0, n, n), np.arange(n))]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z.astype(np.float32)


@st.composite
def shortlists(draw: st.DrawFn, most: int = 12) -> dict[str, Any]:
    """Arguments of the greedy composition; strata may be empty, scores tie, weights be zero."""
    # Drawn by seed, not value by value: Hypothesis' love of small numbers makes tiny batches.
    rng = np.random.default_rng(draw(seeds))
    n, num_strata = draw(st.integers(0, most)), draw(st.integers(1, 4))
    stratum = rng.integers(0, num_strata, n)
    have = np.bincount(stratum, minlength=num_strata)
    z = unit_vectors(draw(seeds), n, draw(st.integers(1, 4)), copies=draw(st.booleans()))
    ties = draw(st.booleans())
    score = rng.integers(-2, 3, n).astype(float) if ties else rng.normal(size=n)
    nearest = rng.integers(0, 3, n) / 2.0 if ties else rng.uniform(0.0, 2.0, n)
    weight = st.sampled_from([0.0, 1.0, 5.0])
    return {
        "score": score,
        "gram": z @ z.T,
        "distance": np.where(rng.random(n) < 0.2, np.inf, nearest),
        "stratum": stratum,
        "quota": rng.integers(0, have + 1) if draw(st.booleans()) else have // 2,
        "curvature": draw(weight),
        "diversity": draw(weight),
        "typical": draw(st.sampled_from([0.1, 1.0])),
        "cap": draw(st.sampled_from([0.5, 1.0, 1e3])),
    }


@st.composite
def shard_tables(
    draw: st.DrawFn, *, most_shards: int = 8, most_samples: int = 25
) -> tuple[list[int], list[int]]:
    """Sizes and counts of shards that offer something: empty, left out, thinned, repeated ones."""
    sizes = draw(st.lists(st.integers(0, most_samples), min_size=1, max_size=most_shards))
    share = st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.0, 2.0, 3.4])
    counts = [round(draw(share) * size) for size in sizes]
    if not sum(counts):
        sizes, counts = [*sizes, 1], [*counts, draw(st.integers(1, 4))]
    return sizes, counts


@st.composite
def repeated(draw: st.DrawFn, most: int = 30) -> tuple[Array, Array]:
    """(n,) sample ids and occurrences, no pair twice, in any order."""
    pairs = draw(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=most))
    shuffled = draw(st.permutations(sorted(pairs)))
    table = np.array(shuffled, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@st.composite
def labelled(draw: st.DrawFn, *, most: int = 30) -> tuple[Array, Array]:
    """(n,) values with ties, and (n,) strata of which some are thin."""
    n = draw(st.integers(0, most))
    values = draw(hnp.arrays(np.float64, n, elements=floats(-3.0, 3.0)))
    return values, draw(hnp.arrays(np.int64, n, elements=st.sampled_from([0, 0, 0, 1, 4])))


@st.composite
def raw_columns(draw: st.DrawFn) -> dict[str, Array]:
    """Columns of a store as bad as they come: NaN, infinities, zero and huge values."""
    n, dim, features = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    bad = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 6e4])
    cell = floats(width=16) | bad
    return {
        "embedding": draw(hnp.arrays(np.float16, (n, dim), elements=cell)),
        "feature": draw(hnp.arrays(np.float16, (n, features), elements=cell)),
        "length": draw(hnp.arrays(np.int32, n, elements=st.integers(-1, 2**31 - 1))),
        "source": np.zeros(n, np.int16),
    }
