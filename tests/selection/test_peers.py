"""The peers that slap is compared with: each does what its source says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slap_stream import SlapSampler
from slap_stream.errors import FeedbackError
from slap_stream.selection.policies.peers.infobatch import MAX_PRUNED, InfoBatch
from slap_stream.selection.policies.peers.k_centre import KCentre
from slap_stream.selection.policies.peers.rs2 import RS2
from slap_stream.selection.policies.peers.subset import GROUP, Subset, places
from tests import reference
from tests.laws import LossTable, as_json, config_of
from tests.selection.test_policies import (
    EMBEDDING_DIM,
    FALSE_ALARM,
    METRIC_DIM,
    SlapConfig,
    recent_of,
    view_of,
)
from tests.strategies import Array, seeds, unit_vectors


def epochs_of(policy: str, count: int, *, keep: float, num_lanes: int = 1) -> list[Array]:
    """What a sampler of 12 shards trains on in each epoch, without any feedback."""
    vectors = np.random.default_rng(0).normal(size=(2400, 8)).astype(np.float16)
    config = config_of(policy=policy, keep=keep, num_lanes=num_lanes, pool_batches=8)
    sampler = SlapSampler([200] * 12, vectors, batch_size=24, config=config)
    return [np.array(list(sampler)).ravel() for _ in range(count)]


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_subset_is_the_same_in_every_epoch(num_lanes: int) -> None:
    first, *later = epochs_of("subset", 4, keep=0.7, num_lanes=num_lanes)
    shared = [len(np.intersect1d(first, epoch)) / len(first) for epoch in later]
    assert min(shared) > 0.985
    # Subsets drawn afresh share what chance gives.
    first, second = epochs_of("uniform", 2, keep=0.7)
    assert len(np.intersect1d(first, second)) / len(first) == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_rs2_trains_on_everything_before_anything_comes_again(num_lanes: int) -> None:
    first, second, third = epochs_of("rs2", 3, keep=0.4, num_lanes=num_lanes)
    assert len(np.intersect1d(first, second)) < 0.01 * len(first)
    # Two fifths, two fifths, and the last fifth before the first comes again.
    assert len(np.union1d(np.union1d(first, second), third)) > 0.99 * 2400
    assert len(np.intersect1d(first, third)) == pytest.approx(0.5 * len(first), rel=0.03)
    # Drawn with replacement, two epochs of uniform batches share what chance gives.
    first, second = epochs_of("uniform", 2, keep=0.4)
    assert len(np.intersect1d(first, second)) > 0.3 * len(first)


@settings(max_examples=60)
@given(seed=seeds, n=st.integers(1, 40), keep=st.floats(0.05, 0.95), epoch=st.integers(0, 9))
def test_what_lies_on_the_epochs_arc_is_chosen_first(
    seed: int, n: int, keep: float, epoch: int
) -> None:
    view = view_of(seed, n, epoch=epoch)
    place = places(seed, view.sample_id, view.occurrence)
    config = SlapConfig(seed=seed, keep=keep)
    for rule, begin in ((Subset(config), 0.0), (RS2(config), epoch * keep)):
        on, off = reference.along_arc(place, view.offered_at, begin % 1.0, keep)
        assert rule.select(view, np.array([n, 0, 0])).tolist() == on + off
        assert rule.select(view, np.array([0, n // 3, 0])).tolist() == (on + off)[: n // 3]
        # What is pruned first lies off the arc, if anything does.
        first = int(np.argmin(rule.score(view)))
        assert first in off if off else first in on


def test_neighbours_divide_the_circle_evenly() -> None:
    ids = np.random.default_rng(0).permutation(4 * GROUP)
    place = places(7, ids, np.zeros(len(ids), np.int64))
    for group in range(4):
        inside = np.sort(place[ids // GROUP == group])
        np.testing.assert_allclose(np.diff(inside), 1.0 / GROUP)
    # Another copy of a sample, another group and another seed have places of their own.
    for other in (places(7, ids, np.ones_like(ids)), places(8, ids, np.zeros_like(ids))):
        assert abs(np.corrcoef(place, other)[0, 1]) < 0.3


def test_a_samples_place_is_uniform() -> None:
    """Kolmogorov-Smirnov tests over 3,000 seeds, for five samples."""
    ids, copies = np.array([0, 1, GROUP - 1, GROUP, 10**9]), np.zeros(5, np.int64)
    drawn = np.array([places(seed, ids, copies) for seed in range(3000)])
    for sample in drawn.T:
        assert stats.kstest(sample, "uniform").pvalue > FALSE_ALARM / 5


def gumbel_of(uniform: list[float]) -> Array:
    """Gumbel noise that stands for these uniform draws."""
    return -np.log(-np.log(np.array(uniform)))


def test_infobatch_prunes_at_random_below_the_mean_only() -> None:
    # Mean 3; three of five lie below it, so that keep 0.7 prunes half of these: 0.3 / 0.6.
    view = view_of(
        0,
        5,
        sample_id=np.arange(5),
        loss=np.array([1.0, 1.0, 2.0, 3.5, 7.5]),
        gumbel=gumbel_of([0.49, 0.51, 0.9, 0.01, 0.2]),
        offered_at=np.array([4, 3, 2, 1, 0]),
    )
    rule = InfoBatch(SlapConfig(keep=0.7))
    np.testing.assert_allclose(rule.loss_weights(view), [2.0, 2.0, 2.0, 1.0, 1.0])
    # The unlucky one leaves first, then other low losses, the oldest of them first.
    assert np.argsort(rule.score(view)).tolist() == [0, 2, 1, 4, 3]
    # Chosen is everyone else, in the order offered.
    assert rule.select(view, np.array([4, 0, 0])).tolist() == [4, 3, 2, 1]


def test_infobatch_bounds_its_weights_and_does_without_low_losses() -> None:
    rule = InfoBatch(SlapConfig(keep=0.1))
    view = view_of(0, 4, loss=np.array([1.0, 2.0, 3.0, 9.0]))
    np.testing.assert_allclose(rule.loss_weights(view)[:3], 1.0 / (1.0 - MAX_PRUNED))
    alike = view_of(0, 4, loss=np.ones(4))
    np.testing.assert_array_equal(rule.loss_weights(alike), 1.0)


def learnable_run(*, keep: float = 0.7) -> tuple[SlapSampler, LossTable]:
    """A sampler whose losses follow from the embeddings, so that predictions are right."""
    vectors = np.random.default_rng(1).normal(size=(4800, 8)).astype(np.float16)
    table = LossTable(4800, 16)
    table.losses = 3.0 + vectors[:, 0].astype(float)
    config = config_of(policy="infobatch", keep=keep, pool_batches=16, probe_every=8)
    return SlapSampler([400] * 12, vectors, batch_size=32, config=config), table


def test_infobatch_keeps_high_losses_and_the_sum_over_an_epoch() -> None:
    """Standard error of the weighted sum: about 1 % of it."""
    sampler, table = learnable_run()
    list(trained_on(sampler, table))
    trained, weights = map(np.concatenate, zip(*trained_on(sampler, table), strict=True))
    low = table.losses < table.losses.mean()
    assert np.isin(np.flatnonzero(~low), trained).mean() > 0.97
    assert np.isin(np.flatnonzero(low), trained).mean() == pytest.approx(0.4, abs=0.04)
    assert np.mean(weights[~low[trained]] == 1.0) > 0.97
    assert np.mean(np.abs(weights[low[trained]] - 2.5) < 0.5) > 0.97
    # Rescaled, the epoch sums to the full data's gradient; without weights it falls far short.
    direction = table.sketches[:, 0] + 3.0
    total = direction.sum()
    assert (weights * direction[trained]).sum() == pytest.approx(total, rel=0.03)
    assert direction[trained].sum() < 0.75 * total


def trained_on(sampler: SlapSampler, table: LossTable):
    """The batches of an epoch with the weights of their losses, each observed after that."""
    for batch in sampler:
        ids = np.array(batch)
        yield ids, sampler.loss_weights(ids)
        sampler.observe(ids, table.of(ids))


def test_loss_weights_belong_to_yielded_batches_and_survive_a_checkpoint() -> None:
    sampler, table = learnable_run()
    for _, (ids, weights) in zip(range(40), trained_on(sampler, table), strict=False):
        last, known = ids, weights
    assert 1.0 < known.max() < 1.0 / (1.0 - MAX_PRUNED)
    again, _ = learnable_run()
    again.load_state_dict(as_json(sampler.state_dict()))
    batch = again.compose()
    assert batch is not None
    np.testing.assert_array_equal(again.loss_weights(last), known)
    np.testing.assert_array_equal(again.loss_weights(batch[::-1]), again.loss_weights(batch)[::-1])
    again.observe(batch, table.of(batch))
    with pytest.raises(FeedbackError, match=r"loss_weights: ids of yielded batches must be"):
        again.loss_weights(batch)
    with pytest.raises(FeedbackError, match=r"\(n,\) whole numbers"):
        again.loss_weights([[1]])


def test_losses_weigh_the_same_under_other_policies() -> None:
    sampler = SlapSampler([100], np.ones((100, 2)), batch_size=4, config=config_of())
    batch = next(iter(sampler))
    assert sampler.loss_weights(batch).tolist() == [1.0] * 4


@settings(max_examples=40)
@given(seed=seeds, n=st.integers(1, 15), data=st.data(), lately=st.integers(0, 5))
def test_k_centre_equals_its_twin(seed: int, n: int, data: st.DataObject, lately: int) -> None:
    recent = unit_vectors(seed + 1, lately, METRIC_DIM)
    known = np.zeros((lately, EMBEDDING_DIM), np.float32)
    known[:, :METRIC_DIM] = recent
    unit = unit_vectors(seed, n, EMBEDDING_DIM)
    view = view_of(
        seed, n, embedding=lambda: unit, recent=recent_of(3, recent, np.arange(lately) % 3)
    )
    count = data.draw(st.integers(0, n))
    expected = reference.farthest_from(unit, known, count, first=int(np.argmax(view.gumbel)))
    assert KCentre(SlapConfig()).select(view, np.array([count, 0, 0])).tolist() == expected


def test_k_centre_prunes_copies_of_what_it_has_whatever_the_stratum() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1600, 16))
    copies = rng.random(1600) < 0.3
    templates = rng.normal(size=(10, 16))
    vectors[copies] = templates[rng.integers(0, 10, copies.sum())]
    sampler = SlapSampler(
        [200] * 8,
        vectors.astype(np.float16),
        batch_size=32,
        sources=rng.integers(0, 3, 1600),
        config=config_of(policy="k_centre", pool_batches=8, recent_per_stratum=64),
    )
    trained = np.concatenate(list(sampler))
    assert copies[trained].mean() < 0.5 * copies.mean()


def test_k_centre_drops_the_oldest_and_draws_its_first_centre() -> None:
    view = view_of(3, 20)
    rule = KCentre(SlapConfig())
    assert np.array_equal(np.argsort(rule.score(view)), np.argsort(view.offered_at))
    assert rule.select(view, np.array([1, 0, 0])).tolist() == [int(np.argmax(view.gumbel))]


def test_k_centre_does_not_take_a_sample_for_a_copy_of_its_own_earlier_visit() -> None:
    unit = np.eye(EMBEDDING_DIM, dtype=np.float32)[:2]
    recent = recent_of(1, np.eye(METRIC_DIM, dtype=np.float32)[:1], np.zeros(1, np.int64))
    quota, gumbel = np.array([1]), np.zeros(2)
    itself = int(recent.sample_id[0, 0])
    for ids, expected in (([itself, 5], 0), ([itself + 1, 5], 1)):
        view = view_of(
            0,
            2,
            sample_id=np.array(ids),
            gumbel=gumbel,
            embedding=lambda: unit,
            recent=recent,
        )
        assert KCentre(SlapConfig()).select(view, quota).tolist() == [expected]
