"""Orders of candidates: quick where nothing ties, the same where something does."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.sorting import first_of_each, place_in_group, sort_candidates
from tests.strategies import seeds


@settings(max_examples=80)
@given(seed=seeds, n=st.integers(0, 20), ties=st.booleans(), wide=st.booleans())
def test_candidates_are_sorted_by_group_then_score_then_ties(
    seed: int, n: int, ties: bool, wide: bool
) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, n).astype(float) if ties else rng.normal(size=n)
    if n > 1 and ties:
        # Zero equals minus zero.
        score[:2] = 0.0, -0.0
    # Groups beyond what two bytes hold are sorted another way.
    group = rng.integers(0, 3, n) * (70_000 if wide else 1)
    first, second = rng.integers(0, 3, n), rng.integers(0, 3, n)

    def expected(group: np.ndarray) -> list[int]:
        return sorted(range(n), key=lambda i: (group[i], score[i], first[i], second[i], i))

    order = sort_candidates(score, first, second, group=group)
    assert order.tolist() == expected(group)
    assert sort_candidates(score, first, second).tolist() == expected(np.zeros(n))


@settings(max_examples=40)
@given(group=st.lists(st.integers(0, 4), max_size=12).map(sorted))
def test_places_count_equal_entries_before(group: list[int]) -> None:
    expected = [group[:i].count(name) for i, name in enumerate(group)]
    assert place_in_group(np.array(group, np.int64)).tolist() == expected


def test_first_of_each_gives_what_there_is() -> None:
    stratum = np.array([0, 0, 0, 2, 2, 3])
    order = np.array([9, 8, 7, 6, 5, 4])
    assert first_of_each(stratum, np.array([2, 5, 0, 3]), order).tolist() == [9, 8, 4]
