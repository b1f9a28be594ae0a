"""The peers that measure every candidate: what is measured when, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slap_stream import SlapConfig, SlapSampler
from slap_stream.config import PolicyName
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import ConfigError, FeedbackError
from slap_stream.selection import lane
from slap_stream.selection.policies import DivBS, Greats, MaxLoss, RhoLoss, Uds
from slap_stream.selection.policies.peers import greats
from tests import reference
from tests.laws import LossTable, as_json, config_of
from tests.selection.test_policies import sketches_of, view_of
from tests.strategies import Array, seeds

MEASURING: tuple[PolicyName, ...] = ("max_loss", "rho_loss", "greats", "divbs", "uds")


def measuring(policy: PolicyName, table: LossTable, **options: Any) -> SlapSampler:
    """A sampler that measures everything, in the smallest window."""
    n = len(table.losses)
    vectors = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float16)
    store = ArrayStore(
        vectors, features=np.ones((n, 1), np.float32), feature_names=["reference_loss"]
    )
    small: dict[str, Any] = {
        "pool_batches": 2,
        "probe_every": 1,
        "probe_fraction": 1.0,
        "warmup_losses": 16,
        "keep": 0.5,
    }
    config = config_of(policy=policy, **(small | options))
    return SlapSampler([n // 8] * 8, store, batch_size=16, config=config)


def measured_steps(sampler: SlapSampler, table: LossTable) -> Iterator[tuple[Array, Array]]:
    """The batches of an epoch, each with what was measured after it."""
    while not sampler.exhausted:
        batch = sampler.compose()
        assert batch is not None
        sampler.observe(batch, table.of(batch))
        ids = sampler.probe_candidates(sampler.probe_budget())
        if len(ids):
            sampler.update(ids, table.of(ids), table.sketches[ids], table.norms[ids])
        sampler.merge(sampler.statistics())
        yield batch, ids


@pytest.mark.parametrize("policy", MEASURING)
@pytest.mark.parametrize("options", [{}, {"pool_batches": 8}, {"keep": 0.7}, {"num_lanes": 4}])
def test_what_is_trained_on_was_measured_once_since_it_was_offered(
    policy: PolicyName, options: dict[str, Any]
) -> None:
    table = LossTable(1280, 16)
    sampler = measuring(policy, table, **options)
    assert sampler.config.measures_all
    steps = list(measured_steps(sampler, table))
    probed = np.concatenate([ids for _, ids in steps])
    for step, (batch, _) in enumerate(steps[1:-1], start=1):
        known = np.concatenate([ids for _, ids in steps[:step]])
        assert np.isin(batch, known).all(), step
    # The first batch, and what left with it, came before there was anything to measure; one
    # candidate more or less is offered from step to step.
    assert len(probed) - len(np.unique(probed)) <= 0.01 * len(probed)
    unseen = 1280 - len(np.unique(probed))
    assert 0 < unseen <= 3 * 16 / sampler.config.keep


def test_a_measurement_stays_as_long_as_its_candidate() -> None:
    table = LossTable(1280, 16)
    sampler = measuring("max_loss", table, pool_batches=8, keep=0.9)
    for _ in zip(range(30), measured_steps(sampler, table), strict=False):
        pass
    pool = sampler.lanes[0].pool
    slots = pool.slots()
    age = sampler.lanes[0]._scorer.refreshes - pool.columns.own_since[slots]
    assert age.max() > 3
    np.testing.assert_array_equal(pool.columns.loss[slots], table.of(pool.columns.sample_id[slots]))


def test_with_probes_to_spare_what_was_measured_longest_ago_follows_what_is_new() -> None:
    table = LossTable(1280, 16)
    sampler = measuring("greats", table, pool_batches=8)
    for _ in zip(range(12), measured_steps(sampler, table), strict=False):
        pass
    sampler.compose()
    pool = sampler.lanes[0].pool
    slots = pool.slots()
    new = np.isnan(pool.columns.own_loss[slots])
    assert 0 < np.count_nonzero(new) < len(slots) - 20
    since = np.where(new, -1, pool.columns.own_since[slots])
    order = slots[np.lexsort((pool.columns.offered_at[slots], since))]
    count = np.count_nonzero(new) + 20
    expected = pool.columns.sample_id[order[:count]]
    assert set(sampler.probe_candidates(count).tolist()) == set(expected.tolist())


def test_other_policies_measure_a_few_only() -> None:
    for policy in ("slap", "slap_paper", "infobatch", "uniform"):
        with pytest.raises(ConfigError, match=r"probe_fraction must be in \[0, 0.15\], got 0.5"):
            SlapConfig(policy=policy, probe_fraction=0.5)
        assert not SlapConfig(policy=policy).measures_all
    with pytest.raises(ConfigError, match=r"probe_fraction must be in \[0, 1\], got 1.5; with 1"):
        SlapConfig(policy="greats", probe_fraction=1.5)
    assert SlapConfig(policy="greats").probe_fraction == 0.1


def test_sketches_are_carried_only_where_they_are_compared() -> None:
    table = LossTable(320, 16)
    widths = {p: measuring(p, table).lanes[0].pool.sketch.shape[1] for p in MEASURING}
    assert widths == {"max_loss": 0, "rho_loss": 0, "greats": 16, "divbs": 16, "uds": 16}


def test_a_sketch_is_the_measured_one_raw_and_gone_with_its_candidate() -> None:
    table = LossTable(1280, 16)
    table.sketches *= 100.0
    table.sketches[::7, 3] = np.nan
    sampler = measuring("divbs", table, pool_batches=4)
    again = measuring("divbs", table, pool_batches=4)
    for _ in zip(range(12), measured_steps(sampler, table), strict=False):
        pass
    again.load_state_dict(as_json(sampler.state_dict()))
    for one in (sampler, again):
        pool = one.lanes[0].pool
        slots = pool.slots()
        ids = pool.columns.sample_id[slots]
        expected = np.where(ids[:, None] % 7 == 0, 0.0, table.sketches[ids])
        np.testing.assert_array_equal(pool.sketch[slots], expected)
    one = sampler.compose()
    assert one is not None
    # What has just been offered took over slots of others, without their sketches.
    pool = sampler.lanes[0].pool
    new = pool.slots()[np.isnan(pool.columns.own_loss[pool.slots()])]
    assert len(new)
    assert not pool.sketch[new].any()


def test_the_smallest_window_is_the_super_batch_of_the_sources() -> None:
    """16 of the 32 candidates measured since the step before are chosen, the others pruned."""
    table = LossTable(1280, 16)
    sampler = measuring("max_loss", table)
    steps = list(measured_steps(sampler, table))
    for (_, window), (batch, _) in pairwise(steps[2:-2]):
        best = window[np.argsort(-table.of(window))][:16]
        assert set(batch.tolist()) == set(best.tolist())


def test_rho_loss_takes_the_highest_loss_beyond_the_references() -> None:
    view = view_of(
        0,
        4,
        loss=np.array([9.0, 3.0, 2.0, 1.0]),
        reference_loss=lambda: np.array([8.5, 1.0, 1.5, 0.9]),
        offered_at=np.array([3, 1, 2, 0]),
    )
    rule = RhoLoss(SlapConfig())
    assert rule.select(view, np.array([1, 0, 0])).tolist() == [1]
    assert set(rule.select(view, np.array([1, 1, 1])).tolist()) == {0, 1, 2}
    assert np.argsort(rule.score(view)).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("policy", [MaxLoss, RhoLoss])
def test_what_is_going_to_be_measured_waits_for_it(policy: type[MaxLoss | RhoLoss]) -> None:
    loss, known = np.array([9.0, 3.0, 2.0, 1.0]), np.array([False, True, False, True])
    view = view_of(
        0,
        4,
        loss=loss,
        utility=loss,
        measured=lambda: known,
        reference_loss=lambda: np.zeros(4),
    )
    predicting = policy(SlapConfig(policy="max_loss", probe_fraction=0.5))
    assert predicting.select(view, np.array([4, 0, 0])).tolist() == [0, 1, 2, 3]
    waiting = policy(SlapConfig(policy="max_loss", probe_fraction=1.0))
    assert waiting.select(view, np.array([4, 0, 0])).tolist() == [1, 3, 0, 2]
    # Nor is it pruned before.
    first, *_ = np.argsort(MaxLoss(SlapConfig(policy="max_loss", probe_fraction=1.0)).score(view))
    assert first == 3


def test_rho_loss_reads_the_stores_column_and_asks_for_it() -> None:
    table = LossTable(1280, 16)
    noisy = np.random.default_rng(1).random(1280) < 0.3
    table.losses = np.where(noisy, 9.0, table.losses)
    columns = np.stack([np.zeros(1280), np.where(noisy, 9.0, 0.5)], axis=1)
    vectors = np.random.default_rng(0).normal(size=(1280, 8))
    store = ArrayStore(vectors, features=columns, feature_names=["other", "reference_loss"])
    config = measuring("rho_loss", table).config
    sampler = SlapSampler([160] * 8, store, batch_size=16, config=config)
    batches = [batch for batch, _ in measured_steps(sampler, table)]
    assert noisy[np.concatenate(batches[1:])].mean() < 0.05
    other = ArrayStore(vectors, features=columns[:, :1], feature_names=["other"])
    with pytest.raises(ConfigError, match=r"needs the feature column reference_loss, got other;"):
        SlapSampler([160] * 8, other, batch_size=16, config=config)


@pytest.mark.parametrize("rule", [Greats(), DivBS(), Uds()])
@settings(max_examples=40)
@given(seed=seeds, n=st.integers(1, 25), data=st.data())
def test_candidates_without_a_measurement_come_last(
    rule: Greats | DivBS | Uds, seed: int, n: int, data: st.DataObject
) -> None:
    view = view_of(seed, n)
    measured = np.any(view.sketch() != 0, axis=1)
    count = data.draw(st.integers(0, n))
    chosen = rule.select(view, np.array([count, 0, 0]))
    assert np.count_nonzero(measured[chosen]) == min(count, np.count_nonzero(measured))
    rest = chosen[~measured[chosen]]
    expected = np.flatnonzero(~measured)
    expected = expected[np.argsort(view.offered_at[expected])]
    assert rest.tolist() == expected[: len(rest)].tolist()
    assert np.array_equal(np.argsort(rule.score(view)), np.argsort(view.offered_at))


@pytest.mark.parametrize("eta", [greats.ETA, 0.5])
@settings(max_examples=40)
@given(seed=seeds, n=st.integers(1, 12), data=st.data(), aimed=st.booleans())
def test_greats_equals_its_twin(
    eta: float, seed: int, n: int, data: st.DataObject, aimed: bool
) -> None:
    sketch = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
    target = np.random.default_rng(seed + 1).normal(size=8).astype(np.float32) if aimed else None
    view = view_of(seed, n, sketch=lambda: sketch, target=target)
    count = data.draw(st.integers(1, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greats, "ETA", eta)
        chosen = Greats().select(view, np.array([count, 0, 0]))
    wide = sketch.astype(float)
    aim = wide.mean(axis=0) if target is None else target.astype(float)
    assert chosen.tolist() == reference.greats(wide, aim, count, eta=eta)


def test_greats_takes_what_serves_the_target_and_not_twice_the_same() -> None:
    sketch = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 9.0], [1.0, 0.0]], np.float32)
    aimed = view_of(
        0,
        4,
        sample_id=np.arange(4),
        sketch=lambda: sketch,
        target=np.array([1.0, 0.0], np.float32),
    )
    assert Greats().select(aimed, np.array([3, 0, 0])).tolist() == [0, 1, 3]
    with pytest.MonkeyPatch.context() as patch:
        # Gains 2, 2, 0, 1; after the first: -, -2, 0, -1: its copy has nothing left to give.
        patch.setattr(greats, "ETA", 1.0)
        assert Greats().select(aimed, np.array([3, 0, 0])).tolist() == [0, 2, 3]


@settings(max_examples=60)
@given(seed=seeds, n=st.integers(1, 14), data=st.data())
def test_divbs_equals_its_twin(seed: int, n: int, data: st.DataObject) -> None:
    sketch = np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32)
    view = view_of(seed, n, sample_id=np.arange(n), sketch=lambda: sketch)
    count = data.draw(st.integers(1, n))
    expected, closest = reference.divbs(sketch.astype(float), count)
    # Two that are as good as each other may be taken either way.
    assume(closest > 1e-6)
    assert DivBS().select(view, np.array([count, 0, 0])).tolist() == expected


def test_divbs_takes_a_copy_only_when_nothing_is_left_to_represent() -> None:
    sketch = np.zeros((6, 8), np.float32)
    # Three directions of falling weight, each twice.
    sketch[[0, 1], 0], sketch[[2, 3], 1], sketch[[4, 5], 2] = 3.0, 2.0, 1.0
    draws = np.array([0.0, 5.0, 0.0, 4.0, 0.0, 6.0])
    view = view_of(0, 6, sample_id=np.arange(6), sketch=lambda: sketch, gumbel=draws)
    assert DivBS().select(view, np.array([3, 0, 0])).tolist() == [0, 2, 4]
    # The rest is drawn.
    assert DivBS().select(view, np.array([6, 0, 0])).tolist() == [0, 2, 4, 5, 1, 3]


@settings(max_examples=60)
@given(seed=seeds, n=st.integers(3, 12), lately=st.integers(0, 6), data=st.data())
def test_uds_equals_its_twin(seed: int, n: int, lately: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    sketch, norms = rng.normal(size=(n, 8)).astype(np.float32), rng.gamma(4.0, 5.0, n)
    queue = rng.normal(size=(lately, 8)).astype(np.float32)
    view = view_of(
        seed,
        n,
        sample_id=np.arange(n),
        sketch=lambda: sketch,
        nuclear_norm=lambda: norms,
        chosen=lambda: queue,
    )
    count = data.draw(st.integers(0, n))
    expected = reference.uds(norms, sketch.astype(float), queue.astype(float), count)
    assert Uds().select(view, np.array([count, 0, 0])).tolist() == expected


def test_uds_weighs_utility_and_diversity() -> None:
    sketch = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 5.0], [4.0, 4.0]], np.float32)
    norms = np.array([3.0, 2.0, 1.0, 0.0])
    queue = np.array([[1.0, 0.0]], np.float32)

    def first(norms: Array, queue: Array) -> int:
        view = view_of(
            0,
            4,
            sample_id=np.arange(4),
            sketch=lambda: sketch,
            nuclear_norm=lambda: norms,
            chosen=lambda: queue,
        )
        return int(Uds().select(view, np.array([1, 0, 0]))[0])

    assert first(norms, queue[:0]) == 0, "nothing was chosen yet: utility alone"
    assert first(np.ones(4), queue) == 2, "utilities are alike: the farthest from the queue"
    # In spreads: utilities 2.68, 1.79, 0.89, 0; distances 0, 0.04, 2.06, 2.02.
    assert first(norms, queue) == 2


def test_uds_remembers_the_sketches_chosen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "CHOSEN_SKETCHES", 40)
    table = LossTable(1280, 16)
    sampler, again = measuring("uds", table), measuring("uds", table)
    trained = [b for _, (b, _) in zip(range(12), measured_steps(sampler, table), strict=False)]
    again.load_state_dict(as_json(sampler.state_dict()))
    lately = np.concatenate(trained)[-40:]
    for one in (sampler, again):
        np.testing.assert_array_equal(one.lanes[0]._chosen.sketch, table.sketches[lately])
    # Other policies keep none.
    other = measuring("greats", table)
    for _ in measured_steps(other, table):
        assert not len(other.lanes[0]._chosen.sketch)


def test_a_target_is_aimed_at_and_survives_a_checkpoint() -> None:
    table = LossTable(1280, 16)
    aim = np.random.default_rng(5).normal(size=16).astype(np.float32)

    def run(target: Array | None, *, cut: int | None = None) -> list[list[int]]:
        sampler = measuring("greats", table)
        sampler.set_target(target)
        batches = []
        for batch, _ in measured_steps(sampler, table):
            batches.append(batch.tolist())
            if len(batches) == cut:
                break
        if cut is None:
            return batches
        again = measuring("greats", table)
        again.load_state_dict(as_json(sampler.state_dict()))
        return batches + [batch.tolist() for batch, _ in measured_steps(again, table)]

    aimed, aimless = run(aim), run(None)
    assert run(aim, cut=10) == aimed
    assert run(None, cut=10) == aimless
    gain = [float((table.sketches[np.concatenate(run)] @ aim).mean()) for run in (aimed, aimless)]
    assert gain[0] > gain[1] + 1.0
    sampler = measuring("greats", table)
    sampler.set_target(aim)
    with pytest.raises(FeedbackError, match=r"\(sketch_dim,\) = \(16,\), got \(15,\)"):
        sampler.set_target(aim[1:])
    with pytest.raises(FeedbackError, match="sketch must be finite, got NaN or infinity"):
        sampler.set_target(np.full(16, np.nan))
    np.testing.assert_array_equal(sampler.state_dict()["target"], aim)


def test_sketches_of_the_tests_hold_copies_and_gaps() -> None:
    """The inputs above exercise what they claim to."""
    sketch = sketches_of(0, 60)
    assert 5 < np.count_nonzero(~np.any(sketch, axis=1)) < 40
