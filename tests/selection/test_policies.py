"""Policies as pure rules: what they reward, how they fill quotas, and what chance decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slap_stream.config import SlapConfig
from slap_stream.core.rng import Purpose, generator, gumbels
from slap_stream.selection.policies.base import Policy, PoolView
from slap_stream.selection.policies.peers.divbs import DivBS
from slap_stream.selection.policies.peers.greats import Greats
from slap_stream.selection.policies.peers.infobatch import InfoBatch
from slap_stream.selection.policies.peers.k_centre import KCentre
from slap_stream.selection.policies.peers.max_loss import MaxLoss
from slap_stream.selection.policies.peers.rho_loss import RhoLoss
from slap_stream.selection.policies.peers.rs2 import RS2
from slap_stream.selection.policies.peers.slap_paper import NUM_LOSS_STRATA, SlapPaper
from slap_stream.selection.policies.peers.subset import Subset
from slap_stream.selection.policies.peers.uds import Uds
from slap_stream.selection.policies.registry import OURS, make_policy
from slap_stream.selection.policies.slap import DISTANCE_CAP, Slap
from slap_stream.selection.policies.uniform import Uniform
from slap_stream.selection.pool import RecentlyTrained
from tests import reference
from tests.strategies import Array, seeds, unit_vectors

POLICIES = tuple(OURS)
# Columns of a view that are made when a policy calls for them.
LAZY = ("embedding", "measured", "sketch", "reference_loss")
METRIC_DIM, EMBEDDING_DIM = 4, 6
# Statistical tests fix their seeds; each would raise a false alarm for one seed in 10,000.
FALSE_ALARM = 1e-4


def named(policy: str, **options: Any) -> Policy:
    """A policy by its name."""
    return make_policy(SlapConfig.from_dict({"policy": policy, **options}))


def recent_of(num_strata: int, z: Array | None = None, stratum: Array | None = None) -> Any:
    """What was trained on lately: nothing, or samples with these metric vectors."""
    recent = RecentlyTrained(
        num_strata=num_strata,
        per_stratum=64,
        columns=EMBEDDING_DIM,
        dim=EMBEDDING_DIM,
        metric_dim=METRIC_DIM,
    )
    if z is not None and stratum is not None:
        x = np.zeros((len(z), EMBEDDING_DIM), np.float32)
        x[:, :METRIC_DIM] = z
        recent.add(10_000 + np.arange(len(z)), stratum, x, z)
    return recent


def never() -> np.random.Generator:
    """The generator of policies that must not draw."""
    raise AssertionError("this policy must not draw")


def sketches_of(seed: int, n: int, dim: int = 8) -> Array:
    """(n, dim) gradient sketches, of which some are copies and a third were not measured."""
    rng = np.random.default_rng(seed)
    length = rng.gamma(2.0, 1.0, (n, 1)) * (rng.random((n, 1)) > 1 / 3)
    return (length * unit_vectors(seed, n, dim, copies=True)).astype(np.float32)


def view_of(
    seed: int,
    n: int,
    *,
    num_strata: int = 3,
    draws: Callable[[], np.random.Generator] = never,
    **columns: Any,
) -> PoolView:
    """A random pool; columns may be set, `z` as an array."""
    rng = np.random.default_rng(seed)
    defaults: dict[str, Any] = {
        "sample_id": rng.permutation(10 * n)[:n],
        "occurrence": np.zeros(n, np.int64),
        "stratum": rng.integers(0, num_strata, n),
        "offered_at": rng.permutation(n),
        "gumbel": rng.gumbel(size=n),
        "loss": rng.gamma(4.0, 0.5, n),
        "utility": rng.normal(size=n),
        "z": unit_vectors(seed, n, METRIC_DIM, copies=True),
        "recent": recent_of(num_strata),
        "typical": 0.5,
        "epoch": 0,
        "embedding": lambda: unit_vectors(seed, n, EMBEDDING_DIM, copies=True),
        "measured": lambda: np.random.default_rng(seed).random(n) > 1 / 3,
        "sketch": lambda: sketches_of(seed, n),
        "measurement": lambda name: np.random.default_rng(seed + len(name)).gamma(4.0, 5.0, n),
        "chosen": lambda: sketches_of(seed + 3, 5),
        "reference_loss": lambda: np.random.default_rng(seed + 1).gamma(4.0, 0.5, n),
        "target": None,
        "rng": draws,
    }
    made = defaults | columns
    return PoolView(**made | {"z": made["z"].__getitem__})


def utility_of(policy: Policy, **columns: Any) -> Array:
    """Utilities of candidates; columns that are not given are middling."""
    n = max(np.size(value) for value in columns.values())
    middling = {"rank": 0.5, "loss": 2.0, "copy": 0.0, "mismatch": 0.0} | columns
    return policy.utility(**{k: np.broadcast_to(v, n).astype(float) for k, v in middling.items()})


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(seed=seeds, n=st.integers(0, 25), data=st.data(), trained=st.booleans())
def test_a_batch_fills_the_quotas_with_different_candidates(
    policy: str, seed: int, n: int, data: st.DataObject, trained: bool
) -> None:
    # The last stratum is always empty.
    lately = recent_of(4, unit_vectors(seed, 5, METRIC_DIM), np.arange(5) % 3) if trained else None
    view = view_of(
        seed,
        n,
        draws=lambda: generator(seed, Purpose.POLICY),
        recent=lately or recent_of(4),
        # Ties, which nothing but a candidate's identity may break.
        **{
            name: np.random.default_rng(seed).integers(0, 3, n).astype(float)
            for name in ("loss", "utility", "gumbel")
        },
    )
    have = np.bincount(view.stratum, minlength=4)
    quota = np.array([data.draw(st.integers(0, int(stock))) for stock in have])
    rule = named(policy)
    chosen = rule.select(view, quota)
    assert len(set(chosen.tolist())) == len(chosen) == quota.sum()
    assert np.all((chosen >= 0) & (chosen < n))
    if rule.proportional:
        np.testing.assert_array_equal(np.bincount(view.stratum[chosen], minlength=4), quota)
    # Where a candidate lies in the pool must not matter: a resumed run has another layout.
    order = np.random.default_rng(seed).permutation(n)
    columns = ("sample_id", "occurrence", "stratum", "offered_at", "gumbel", "loss", "utility")
    made = {name: getattr(view, name)()[order] for name in LAZY}
    lazy = {name: lambda rows=rows: rows for name, rows in made.items()}
    lazy["z"] = view.z(order).__getitem__
    lazy["measurement"] = lambda name: view.measurement(name)[order]
    moved = replace(view, **{name: getattr(view, name)[order] for name in columns}, **lazy)
    again = rule.select(moved, quota)
    assert set(moved.sample_id[again].tolist()) == set(view.sample_id[chosen].tolist())


def test_every_name_has_its_policy() -> None:
    kinds = {name: type(named(name)) for name in POLICIES}
    assert kinds == {
        "slap": Slap,
        "slap_paper": SlapPaper,
        "uniform": Uniform,
        "subset": Subset,
        "rs2": RS2,
        "max_loss": MaxLoss,
        "infobatch": InfoBatch,
        "k_centre": KCentre,
        "rho_loss": RhoLoss,
        "greats": Greats,
        "divbs": DivBS,
        "uds": Uds,
    }


@settings(max_examples=80)
@given(
    rank=st.floats(0, 1),
    copy=st.floats(0, 1),
    mismatch=st.floats(0, 1),
    step=st.floats(0, 1),
)
def test_utility_rises_with_rank_and_falls_with_what_shows_that_it_can_be_spared(
    rank: float, copy: float, mismatch: float, step: float
) -> None:
    slap = named("slap")
    here = {"rank": rank, "copy": copy, "mismatch": mismatch}
    (base,) = utility_of(slap, **here)
    assert np.isfinite(base)
    assert utility_of(slap, **(here | {"rank": min(1.0, rank + step)}))[0] >= base
    assert utility_of(slap, **(here | {"copy": copy + step}))[0] <= base
    assert utility_of(slap, **(here | {"mismatch": mismatch + step}))[0] <= base


def test_a_high_rank_does_not_make_up_for_a_copy_or_a_mismatch() -> None:
    # Targets of other prompts have high losses.
    slap = named("slap")
    for evidence in ("copy", "mismatch"):
        spared = utility_of(slap, rank=1.0, **{evidence: 1.0})
        assert spared[0] < utility_of(slap, rank=0.0)[0] - 1.0


def test_the_very_highest_ranks_are_worth_no_more_than_the_cap() -> None:
    below, cap, top = utility_of(named("slap"), rank=np.array([0.8, 0.9, 1.0]))
    assert below < cap == top


def test_weights_of_zero_switch_terms_off() -> None:
    flat = named("slap", rank_weight=0.0, copy_weight=0.0, mismatch_weight=0.0)
    rng = np.random.default_rng(0)
    columns = {name: rng.random(20) * 5 for name in ("loss", "copy", "mismatch")}
    assert not utility_of(flat, rank=rng.random(20), **columns).any()


def test_a_score_is_the_utility_with_noise_of_one_scale() -> None:
    view = view_of(0, 40)
    np.testing.assert_array_equal(named("slap").score(view), view.utility + view.gumbel)


def test_without_its_terms_slap_takes_the_highest_scores() -> None:
    view, quota = view_of(0, 60), np.array([4, 0, 7])
    plain = named("slap", curvature=0.0, diversity=0.0)
    score = plain.score(view)
    expected: list[int] = []
    for name, slots in enumerate(quota):
        members = np.flatnonzero(view.stratum == name)
        expected += members[np.argsort(-score[members])][:slots].tolist()
    assert sorted(plain.select(view, quota).tolist()) == sorted(expected)


def crowded_view(seed: int) -> PoolView:
    """A pool of which half points one way, as did part of what was trained on lately."""
    rng = np.random.default_rng(seed)
    z = unit_vectors(seed, 90, METRIC_DIM)
    z[10:50] = z[0] + 0.1 * rng.normal(size=(40, METRIC_DIM))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    recent = recent_of(2, z[:10], np.arange(10) % 2)
    return view_of(seed, 80, num_strata=2, z=z[10:], recent=recent)


def shared_directions(view: PoolView, batch: Array) -> float:
    """Mean positive part of the inner products in a batch."""
    z = view.z(batch)
    return float(np.maximum(0.0, z @ z.T)[np.triu_indices(len(batch), 1)].mean())


def crowding(view: PoolView, batch: Array) -> float:
    """How far, on average, a batch's members are from having the typical distance to others."""
    z = view.z(batch)
    apart = np.linalg.norm(z[:, None] - z, axis=2) + 9.0 * np.eye(len(batch))
    nearest = np.minimum(
        apart.min(axis=1), view.recent.nearest(z, view.stratum[batch], view.sample_id[batch])
    )
    return float(1.0 - np.minimum(nearest / view.typical, DISTANCE_CAP).mean())


@pytest.mark.parametrize(
    ("term", "measure"), [("curvature", shared_directions), ("diversity", crowding)]
)
def test_each_term_lowers_what_it_charges_for(
    term: str, measure: Callable[[PoolView, Array], float]
) -> None:
    quota, off = np.array([6, 6]), {"curvature": 0.0, "diversity": 0.0}
    without, with_term = [], []
    for seed in range(20):
        view = crowded_view(seed)
        without.append(measure(view, named("slap", **off).select(view, quota)))
        with_term.append(measure(view, named("slap", **(off | {term: 2.0})).select(view, quota)))
    assert np.mean(with_term) < 0.8 * np.mean(without)


def test_what_was_not_trained_on_lately_is_preferred_to_what_was() -> None:
    z = np.eye(METRIC_DIM, dtype=np.float32)
    view = view_of(
        0,
        4,
        num_strata=1,
        z=z,
        utility=np.zeros(4),
        gumbel=np.array([0.03, 0.02, 0.01, 0.0]),
        recent=recent_of(1, z[:3], np.zeros(3, np.int64)),
    )
    plain = named("slap", curvature=0.0, diversity=0.0)
    assert plain.select(view, np.array([1])).tolist() == [0]
    diverse = named("slap", curvature=0.0, diversity=5.0, shortlist=4)
    assert diverse.select(view, np.array([1])).tolist() == [3]


def test_outliers_do_not_win_slots_by_distance_alone() -> None:
    lately = np.tile(np.eye(METRIC_DIM, dtype=np.float32)[:1], (3, 1))
    angles = np.array([0.0, 0.6, 1.5, 3.1])
    z = np.zeros((4, METRIC_DIM), np.float32)
    z[:, 0], z[:, 1] = np.cos(angles), np.sin(angles)
    apart = 2 * np.sin(angles / 2)
    view = view_of(
        0,
        4,
        num_strata=1,
        z=z,
        utility=np.zeros(4),
        gumbel=np.array([0.0, 0.3, 0.2, 0.1]),
        recent=recent_of(1, lately, np.zeros(3, np.int64)),
        typical=float(apart[1]) / DISTANCE_CAP - 1e-3,
    )
    # Three lie beyond the cap; the farthest of them is five times as far as the chosen one.
    greedy = named("slap", curvature=0.0, diversity=50.0, shortlist=4)
    assert greedy.select(view, np.array([1])).tolist() == [1]


@settings(max_examples=40)
@given(seed=seeds, n=st.integers(2, 12), batch=st.integers(1, 12))
def test_learnability_equals_its_twin(seed: int, n: int, batch: int) -> None:
    lately = unit_vectors(seed + 1, 6, METRIC_DIM)
    view = view_of(seed, n, recent=recent_of(3, lately, np.arange(6) % 3))
    slap = Slap(SlapConfig())
    members, everyone = np.arange(min(n, batch)), np.arange(n)
    score, z = slap.score(view), view.z(everyone)
    gram, distance = z @ z.T, view.recent.nearest(z, view.stratum, view.sample_id)
    curvature, diversity = slap._weights(score, gram, distance / view.typical, view.typical)
    expected = reference.learnability(
        members.tolist(),
        score,
        gram,
        distance,
        curvature=curvature,
        diversity=diversity,
        typical=view.typical,
        cap=DISTANCE_CAP,
    )
    batches = [members, everyone[len(members) :]][: 1 + (len(members) < n)]
    found = slap.learnability(view, batches)
    assert len(found) == len(batches)
    assert found[0] == pytest.approx(expected / len(members), abs=2e-3)


def test_a_composed_batch_is_more_learnable_than_a_uniform_one() -> None:
    slap, uniform = Slap(SlapConfig()), Uniform(SlapConfig())
    quota = np.array([5, 5, 5])
    for seed in range(10):
        view = view_of(seed, 120)
        batch = slap.select(view, quota)
        drawn = uniform.select(replace(view, gumbel=view.gumbel[::-1]), quota)
        composed, by_chance = slap.learnability(view, [batch, drawn])
        assert composed > by_chance


def test_slap_paper_draws_counts_in_proportion_to_exp_loss() -> None:
    """A chi-square test with 7 degrees of freedom on 12,000 draws."""
    n, batches, slots = 8 * NUM_LOSS_STRATA, 2000, 6
    losses = np.sort(np.random.default_rng(0).gamma(4.0, 0.4, n))[::-1].copy()
    counts = np.zeros(NUM_LOSS_STRATA)
    for batch in range(batches):
        view = view_of(
            0, n, loss=losses, draws=lambda batch=batch: generator(1, Purpose.POLICY, batch)
        )
        # Fewer slots than members of a stratum: no stratum runs out and passes slots on.
        chosen = SlapPaper(SlapConfig()).select(view, np.array([slots, 0, 0]))
        counts += np.bincount(chosen // 8, minlength=NUM_LOSS_STRATA)
    means = losses.reshape(NUM_LOSS_STRATA, 8).mean(axis=1)
    chance = np.exp(means) / np.exp(means).sum()
    total = batches * slots
    assert stats.chisquare(counts, total * chance).pvalue > FALSE_ALARM
    # The test can tell: equal counts, or counts by the loss itself, are refused.
    for wrong in (np.full(NUM_LOSS_STRATA, 1 / NUM_LOSS_STRATA), means / means.sum()):
        assert stats.chisquare(counts, total * wrong).pvalue < 1e-12


def test_slap_paper_takes_the_highest_loss_and_then_the_farthest_points() -> None:
    z = np.repeat(np.eye(METRIC_DIM, dtype=np.float32), 4, axis=0)
    # Equal-sized strata of two; the highest losses are beyond comparison.
    losses = np.concatenate([[50.0, 49.9], np.zeros(14)])
    view = view_of(0, 16, z=z, loss=losses, draws=lambda: generator(0, Purpose.POLICY))
    paper = SlapPaper(SlapConfig())
    assert paper.select(view, np.array([1])).tolist() == [0]
    # Both of the first stratum point one way; what is passed on to the others avoids it.
    chosen = paper.select(view, np.array([5]))
    assert chosen[:2].tolist() == [0, 1]
    assert set((chosen[2:] // 4).tolist()) == {1, 2, 3}


def test_slap_papers_window_slides() -> None:
    view = view_of(0, 20)
    score = SlapPaper(SlapConfig()).score(view)
    assert np.array_equal(np.argsort(score), np.argsort(view.offered_at))


def test_max_loss_takes_the_highest_losses_whatever_the_stratum() -> None:
    view = view_of(0, 30)
    view = replace(view, utility=utility_of(MaxLoss(SlapConfig()), loss=view.loss))
    chosen = MaxLoss(SlapConfig()).select(view, np.array([1, 1, 3]))
    assert chosen.tolist() == np.argsort(-view.loss)[:5].tolist()


def test_uniform_gives_every_candidate_of_a_stratum_the_same_chance() -> None:
    """A chi-square test on 3,000 epochs in which 3 of 12 candidates are drawn."""
    ids, epochs = np.arange(100, 112), 3000
    hits = np.zeros(12)
    for epoch in range(epochs):
        noise = gumbels(5, epoch, ids, np.zeros(12, np.int64))
        view = view_of(0, 12, num_strata=1, sample_id=ids, gumbel=noise)
        hits[Uniform(SlapConfig()).select(view, np.array([3]))] += 1
    # Draws without replacement vary less than the test supposes: by (12 - 3) / (12 - 1).
    statistic = ((hits - epochs / 4) ** 2 / (epochs / 4)).sum() * 11 / 9
    assert stats.chi2.sf(statistic, 11) > FALSE_ALARM
    assert not utility_of(Uniform(SlapConfig()), rank=np.arange(3.0)).any()
