"""Noise that no words show is found by its losses; what is hard but right is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slap_stream import SlapSampler
from slap_stream.core.saved import Saved
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import StateError
from slap_stream.selection import outliers
from slap_stream.selection.loss_model import LOG_LENGTH, LossModel
from slap_stream.selection.outliers import Outliers
from slap_stream.selection.state import Lookup
from tests.laws import FIRM, as_json, config_of

NUM, DIM, NOISE = 3_000, 16, 0.15


class Corpus:
    """3,000 samples in clusters with losses of their own, 15 % of them 3 nats above.

    Args:
        hard: Share of the samples that are a kind of their own: 3 nats above the others, and
            right.
    """

    def __init__(self, hard: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(8, DIM))
        cluster = rng.integers(0, 7, NUM)
        cluster[rng.random(NUM) < hard] = 7
        self.hard = cluster == 7
        self.noise = (rng.random(NUM) < NOISE) & ~self.hard
        length = rng.integers(20, 200, NUM)
        by_cluster = np.append(rng.normal(2.0, 0.3, 7), 5.0)
        self.loss = by_cluster[cluster] + 20.0 / length + rng.normal(0, 0.3, NUM) + 3 * self.noise
        rows = centres[cluster] + 0.3 * rng.normal(size=(NUM, DIM))
        self.store = ArrayStore(rows.astype(np.float16), lengths=length.astype(np.int32))

    def sampler(self, **settings: Any) -> SlapSampler:
        """A sampler over it."""
        config = config_of(**{**FIRM, "keep": 0.7, **settings})
        return SlapSampler(np.full(30, 100), self.store, batch_size=32, config=config)

    def epochs(self, sampler: SlapSampler, count: int) -> list[np.ndarray]:
        """(num_samples,) visits of each epoch, the losses falling from one to the next."""
        visits = []
        for epoch in range(count):
            ids = []
            for batch in sampler:
                ids.append(batch)
                sampler.observe(batch, self.loss[batch] * 0.8**epoch)
            visits.append(np.bincount(np.concatenate(ids), minlength=NUM))
        return visits


def rate(visits: np.ndarray, some: np.ndarray) -> float:
    """Visits of some samples over those of all the others."""
    return float(visits[some].mean() / visits[~some].mean())


@pytest.mark.parametrize("keep", [0.7, "auto"])
def test_noise_that_no_words_show_is_left_once_it_was_seen(keep: Any) -> None:
    corpus = Corpus()
    sampler = corpus.sampler(keep=keep)
    first, *later = corpus.epochs(sampler, 4)
    # Nothing is known of a sample before its first visit.
    assert 0.7 < rate(first, corpus.noise) < 1.1
    assert rate(np.sum(later, axis=0), corpus.noise) < 0.3
    assert 0.7 * corpus.noise.sum() < sampler.metrics()["outliers"] < 1.1 * corpus.noise.sum()


def test_what_is_hard_but_right_is_trained_on_as_often_as_the_rest() -> None:
    corpus = Corpus(hard=0.05)
    _, *later = corpus.epochs(corpus.sampler(), 4)
    assert rate(np.sum(later, axis=0), corpus.hard) > 0.9
    assert rate(np.sum(later, axis=0), corpus.noise) < 0.3


def test_without_noise_nothing_is_held_against_anybody() -> None:
    corpus = Corpus()
    corpus.loss -= 3 * corpus.noise
    sampler = corpus.sampler(keep="auto")
    visits = corpus.epochs(sampler, 3)
    assert sampler.metrics()["keep"] > 0.97
    assert np.mean(visits) > 0.95


def test_it_goes_on_after_a_resume_as_if_nothing_had_happened() -> None:
    corpus = Corpus()
    one = corpus.sampler()
    corpus.epochs(one, 1)
    batches = iter(one)
    for _ in range(25):
        batch = next(batches)
        one.observe(batch, corpus.loss[batch])
    other = corpus.sampler()
    other.load_state_dict(as_json(one.state_dict()))
    again = iter(other)
    for _ in range(20):
        batch, same = next(batches), next(again)
        assert batch == same
        for sampler in (one, other):
            sampler.observe(batch, corpus.loss[batch])


def memory(fitted: bool = True) -> Outliers:
    """A memory whose model expects a loss of zero."""
    model = LossModel(columns=3, dim=1, metric_dim=1, sketch_dim=16, warmup_losses=1)
    model.fitted = fitted
    return Outliers(model, num_sources=2, target_share=None)


def see(known: Outliers, ids: list[int], losses: list[float]) -> None:
    """Feed back losses, and refresh."""
    x = np.zeros((len(ids), 3), np.float32)
    x[:, LOG_LENGTH] = np.log1p(50)
    source = np.zeros(len(ids), np.int64)
    known.observe(np.array(ids), x, np.array(losses), source, known._model.predict(x))
    known.refresh()


def crowd(seed: int) -> list[float]:
    """Losses of 1,000 samples, of which the first hundred stand out."""
    losses = np.random.default_rng(seed).normal(size=1_000)
    losses[:100] += 6.0
    return losses.tolist()


def test_a_sample_that_no_longer_stands_out_is_free_again() -> None:
    known = memory()
    see(known, list(range(1_000)), crowd(0))
    assert known.probability(np.array([5]))[0] > 0.8
    assert known.probability(np.array([500, 2_000])).tolist() == [0.0, 0.0]
    for _ in range(4):
        see(known, [5, *range(100, 1_000)], [0.0, *crowd(1)[100:]])
    assert known.probability(np.array([5]))[0] == 0.0
    # Of the others nothing new was seen; they stay what they were.
    assert known.probability(np.arange(10, 90)).mean() > 0.8


def test_losses_of_before_the_first_fit_are_not_lost() -> None:
    known = memory(fitted=False)
    see(known, list(range(1_000)), crowd(0))
    assert len(known) == 0
    known._model.fitted = True
    known.refresh()
    assert known.probability(np.arange(100)).mean() > 0.8


def test_memory_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "REMEMBERED", 600)
    known = memory()
    see(known, list(range(500)), crowd(0)[:500])
    see(known, list(range(500, 1_000)), crowd(0)[500:])
    assert len(known) == 600
    assert set(range(500, 1_000)) <= set(known._ids.tolist())


def test_a_state_whose_ids_are_in_no_order_is_refused() -> None:
    known = memory()
    see(known, list(range(1_000)), crowd(0))
    state = known.state_dict()
    state["sample_id"] = state["sample_id"][::-1].copy()
    lookup = Lookup(num_samples=1_000, num_strata=2, rows_of=lambda ids: np.zeros((len(ids), 3)))
    with pytest.raises(StateError, match="sample_id must be ascending"):
        memory().load_state_dict(Saved(state), lookup)
