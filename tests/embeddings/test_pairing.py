"""Which targets belong to which prompts: told from the words alone, and not told where they do not
tell."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from slap_stream.embeddings.features import HashedTfidf, feature_columns
from slap_stream.embeddings.pairing import (
    MAX_SHARE,
    MIN_SAMPLES,
    SIDE_CHARACTERS,
    PairModel,
    cut_sides,
    misplaced_share,
)
from slap_stream.text.sample import TextSample
from tests.strategies import Array

SIZE = 1600


def pairs_of(
    count: int, *, seed: int = 0, telling: bool = True, source: str | None = "a"
) -> list[TextSample]:
    """Prompts about three of 40 things, and targets that speak of the same or of any."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        things = rng.choice(40, 3, replace=False)
        said = things if telling else rng.choice(40, 3, replace=False)
        samples.append(
            TextSample(
                prompt=". ".join(f"thing{thing}" for thing in things),
                # Some words of the prompt, and others of which it must be learnt what they go with.
                target=". ".join(
                    f"{'thing' if rng.random() < 0.5 else 'said'}{thing}" for thing in said
                ),
                length=20,
                source=source,
            )
        )
    return samples


def shuffle(samples: list[TextSample], share: float) -> tuple[list[TextSample], Array]:
    """Give some samples each other's targets; which ones is the second result."""
    rng = np.random.default_rng(1)
    at = np.flatnonzero(rng.random(len(samples)) < share)
    result, wrong = list(samples), np.zeros(len(samples), bool)
    for mine, theirs in zip(at, np.roll(at, 1), strict=True):
        old = samples[mine]
        result[mine] = TextSample(
            prompt=old.prompt, target=samples[theirs].target, length=20, source=old.source
        )
        wrong[mine] = samples[theirs].target != old.target
    return result, wrong


def learn(samples: list[TextSample]) -> tuple[PairModel, Array]:
    """A model of these samples, and what it says of them."""
    tfidf = HashedTfidf()
    tfidf.fit(samples)
    model = PairModel(tfidf)
    model.fit(samples)
    pairs = tfidf.transform(samples)
    return model, model.mismatch(samples, pairs, feature_columns(samples, pairs))


def auc(score: Array, positive: Array) -> float:
    """Chance that a positive one scores higher than another."""
    ranks = np.argsort(np.argsort(score))
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (len(score) - count)))


def test_misplaced_targets_are_found_and_counted() -> None:
    samples, wrong = shuffle(pairs_of(SIZE), 0.2)
    model, mismatch = learn(samples)
    assert np.all((mismatch >= 0) & (mismatch <= 1))
    assert auc(mismatch, wrong) > 0.95
    assert model.share == pytest.approx(wrong.mean(), abs=0.06)
    # It is a probability: as many are misplaced as it says.
    assert mismatch.mean() == pytest.approx(wrong.mean(), abs=0.06)
    assert mismatch[~wrong].mean() < 0.08


def test_nothing_is_held_against_a_clean_corpus() -> None:
    model, mismatch = learn(pairs_of(SIZE))
    assert model.share < 0.02
    assert mismatch.mean() < 0.02


def test_where_words_do_not_tell_pairs_apart_nothing_is_said() -> None:
    model, mismatch = learn(pairs_of(SIZE, telling=False))
    assert model.share is None
    assert model.assumed is None
    assert not mismatch.any()


def test_a_source_is_judged_by_itself() -> None:
    dirty, wrong = shuffle(pairs_of(SIZE, source="dirty"), 0.3)
    samples = dirty + pairs_of(SIZE, seed=5, source="clean")
    model, mismatch = learn(samples)
    assert model.share_of["dirty"] == pytest.approx(wrong.mean(), abs=0.08)
    assert model.share_of["clean"] < 0.03
    assert mismatch[SIZE:].mean() < 0.03
    # What is told is what is held against them, whatever all sources together show.
    assert model.assumed == pytest.approx(mismatch.mean(), abs=0.04)


def test_a_source_whose_words_do_not_tell_is_judged_by_the_others() -> None:
    samples = pairs_of(SIZE) + pairs_of(500, telling=False, source="mute")
    model, mismatch = learn(samples)
    assert model.share is not None
    assert model.share_of["mute"] <= model.share + 1e-12
    assert mismatch.mean() < 0.1


def test_too_few_samples_teach_nothing_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    samples, _ = shuffle(pairs_of(MIN_SAMPLES - 1), 0.5)
    with caplog.at_level(logging.INFO):
        model, mismatch = learn(samples)
    assert not model.fitted
    assert not mismatch.any()
    assert f"{MIN_SAMPLES - 1} different samples are too few" in caplog.text


@pytest.mark.parametrize("distinct", [1, 2, 10, 300])
def test_copies_of_few_samples_teach_nothing(distinct: int) -> None:
    samples = pairs_of(distinct) * (SIZE // distinct)
    model, mismatch = learn(samples)
    assert model.share is None
    assert not mismatch.any()


def test_without_sources_targets_are_compared_with_those_of_similar_prompts() -> None:
    # Two kinds of task that share no word; targets were shuffled inside each.
    first, wrong_first = shuffle(pairs_of(SIZE, source=None), 0.2)
    second, wrong_second = shuffle(
        [
            TextSample(prompt=f"other {s.prompt}".replace("thing", "other"),
                       target=s.target.replace("thing", "other").replace("said", "told"),
                       length=20)
            for s in pairs_of(SIZE, seed=9, source=None)
        ],
        0.2,
    )  # fmt: skip
    wrong = np.concatenate([wrong_first, wrong_second])
    model, mismatch = learn(first + second)
    assert model.share == pytest.approx(wrong.mean(), abs=0.1)
    assert auc(mismatch, wrong) > 0.9


def test_a_corpus_without_sources_and_samples_alone_in_theirs_are_learnt_from() -> None:
    samples = pairs_of(SIZE)
    lone = [
        TextSample(prompt=s.prompt, target=s.target, length=20, source=str(n) if n < 3 else None)
        for n, s in enumerate(samples)
    ]
    model, mismatch = learn(lone)
    assert model.fitted
    assert mismatch.mean() < 0.02


def test_a_sample_is_judged_alike_in_any_company_and_after_a_journey() -> None:
    samples, _ = shuffle(pairs_of(SIZE), 0.2)
    tfidf = HashedTfidf()
    tfidf.fit(samples)
    model, mismatch = learn(samples)
    some = samples[100:140]
    pairs = tfidf.transform(some)
    features = feature_columns(some, pairs)
    np.testing.assert_allclose(
        model.mismatch(some, pairs, features), mismatch[100:140], rtol=1e-4, atol=1e-6
    )
    packed = pickle.dumps(model)
    # Workers are sent the model, not the projection that follows from it.
    assert len(packed) < 8_000_000
    again = pickle.loads(packed)
    np.testing.assert_array_equal(
        again.mismatch(some, pairs, features), model.mismatch(some, pairs, features)
    )


def test_judging_takes_one_thread_however_many_cores_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each process of several has a core: BLAS's own threads would fight over them.
    samples, _ = shuffle(pairs_of(SIZE), 0.2)
    model, judged = learn(samples)
    threads: list[int] = []
    columns_of = model._columns

    def watched(*args: Any) -> Any:
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        threads.extend(pool["num_threads"] for pool in pools)
        return columns_of(*args)

    monkeypatch.setattr(model, "_columns", watched)
    pairs = model._tfidf.transform(samples)
    with threadpool_limits(limits=2):
        again = model.mismatch(samples, pairs, feature_columns(samples, pairs))
    assert threads
    assert set(threads) == {1}
    np.testing.assert_array_equal(again, judged)


def test_nothing_is_looked_at_where_no_share_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = pairs_of(SIZE, telling=False)
    model, _ = learn(samples)
    assert not model.share
    assert not any(model.share_of.values())
    monkeypatch.setattr(model, "_sides", None)
    pairs = model._tfidf.transform(samples)
    assert not model.mismatch(samples, pairs, feature_columns(samples, pairs)).any()


def test_only_what_is_cut_is_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # One long sample had a whole batch hashed and compressed twice.
    samples, _ = shuffle(pairs_of(SIZE), 0.2)
    model, judged = learn(samples)
    some = [n for n in range(SIZE) if n % 9 == 0]
    mixed = [
        replace(sample, target=sample.target.ljust(SIDE_CHARACTERS) + " more")
        if n in some
        else sample
        for n, sample in enumerate(samples)
    ]
    pairs = model._tfidf.transform(mixed)
    columns = feature_columns(mixed, pairs)
    hashed: list[int] = []
    transform = model._tfidf.transform
    monkeypatch.setattr(
        model._tfidf, "transform", lambda batch: (hashed.append(len(batch)), transform(batch))[1]
    )
    found = model.mismatch(mixed, pairs, columns)
    assert hashed == [len(some)]
    others = np.setdiff1d(np.arange(SIZE), some)
    np.testing.assert_array_equal(found[others], judged[others])
    alone = [mixed[n] for n in some]
    pairs = transform(alone)
    again = model.mismatch(alone, pairs, feature_columns(alone, pairs))
    np.testing.assert_allclose(found[some], again, rtol=1e-4)


def test_of_long_samples_the_end_of_the_prompt_and_the_beginning_of_the_target_count() -> None:
    samples, _ = shuffle(pairs_of(SIZE), 0.2)
    model, mismatch = learn(samples)
    some = samples[:30]
    padding = "filler " * 400
    long = [
        TextSample(
            prompt=f"{padding}{s.prompt}".rjust(SIDE_CHARACTERS + 1)[-SIDE_CHARACTERS - 500 :],
            target=s.target,
            length=20,
            source="a",
        )
        for s in some
    ]
    assert all(len(cut_sides(s).prompt) == SIDE_CHARACTERS for s in long)
    assert cut_sides(some[0]) is some[0]
    tfidf = HashedTfidf()
    tfidf.fit(samples)
    pairs = tfidf.transform(long)
    told = model.mismatch(long, pairs, feature_columns(long, pairs))
    cut = [cut_sides(s) for s in long]
    pairs = tfidf.transform(cut)
    np.testing.assert_allclose(told, model.mismatch(cut, pairs, feature_columns(cut, pairs)))
    assert mismatch.shape == (SIZE,)


@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_the_share_is_the_least_ratio_of_found_to_shuffled(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shuffled = rng.normal(-3, 1, 20_000)
    count = int(20_000 * share)
    found = np.concatenate([rng.normal(-3, 1, count), rng.normal(6, 1, 20_000 - count)])
    estimate = misplaced_share(found, shuffled)
    if share < MAX_SHARE - 0.03:
        assert estimate == pytest.approx(share, abs=0.03)
    elif share > MAX_SHARE + 0.05:
        # Most pairs misplaced looks just like words that do not tell.
        assert estimate is None
