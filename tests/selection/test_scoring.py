"""How candidates are scored: own losses before predicted ones, and by one yardstick."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream import SlapSampler
from slap_stream.config import SlapConfig
from slap_stream.core.kernels import unit_rows
from slap_stream.core.saved import Saved
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.selection.loss_model import LossModel
from slap_stream.selection.moments import Moments
from slap_stream.selection.policies.slap import Slap
from slap_stream.selection.pool import Pool, RecentlyTrained
from slap_stream.selection.quota import Keep
from slap_stream.selection.scoring import (
    NO_COPY,
    SURE_COPY,
    WINDOW,
    Scorer,
    Yardsticks,
    copy_likelihood,
    either,
)
from slap_stream.selection.state import Lookup
from tests.laws import FIRM, LossTable, as_json, config_of, drive, hold_epoch_laws
from tests.selection.test_sampler import embeddings, make
from tests.strategies import Array, seeds


def test_near_ones_are_copies_and_far_ones_are_not() -> None:
    distance = np.array([0.0, SURE_COPY, 0.4, NO_COPY, 1.0, np.inf])
    same, sure, near, edge, far, never_seen = copy_likelihood(distance)
    assert same == sure == 1.0
    assert 0.0 < near < 1.0
    assert edge == far == never_seen == 0.0


@given(copy=st.floats(0, 1), mismatch=st.floats(0, 1), more=st.floats(0, 1))
def test_each_of_two_reasons_makes_it_likelier(copy: float, mismatch: float, more: float) -> None:
    (base,) = either(np.array([copy]), np.array([mismatch]))
    assert 0.0 <= base <= 1.0
    assert either(np.array([max(copy, more)]), np.array([mismatch]))[0] >= base
    assert either(np.array([copy]), np.array([max(mismatch, more)]))[0] >= base
    assert either(np.array([1.0]), np.array([mismatch]))[0] == 1.0
    assert either(np.zeros(1), np.zeros(1))[0] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_auto_keeps_what_is_not_shown_to_be_dispensable(share: float) -> None:
    sampler = make([100] * 40, batch_size=16, mismatched=share, keep="auto", **FIRM)
    ids = np.arange(4000)
    wrong = sampler._store.read_ids(ids).feature[:, 0] > 0
    batches = drive([sampler], LossTable(4000, 16))
    hold_epoch_laws(sampler, batches)
    trained = np.isin(ids, np.concatenate(batches))
    # From the first batch on: the column tells before anything was trained on.
    assert trained.mean() == pytest.approx(1.0 - share, abs=0.02)
    if share:
        assert trained[~wrong].mean() > 0.97
        assert trained[wrong].mean() < 0.1
        assert sampler.metrics()["keep"] == pytest.approx(1.0 - share, abs=0.03)
    else:
        assert len(batches) >= 0.98 * len(sampler)


def test_strata_of_copies_yield_their_slots_to_others() -> None:
    # Half of source 1 belongs to other prompts, nothing of source 0 does.
    source = np.arange(4000) % 2
    wrong = (source == 1) & (np.arange(4000) % 4 == 1)
    store = ArrayStore(
        embeddings(4000),
        features=wrong[:, None].astype(np.float16),
        feature_names=["mismatch"],
        sources=source.astype(np.int16),
    )
    config = config_of(keep=0.7, num_clusters=1, **FIRM)
    sampler = SlapSampler([100] * 40, store, batch_size=32, config=config)
    trained = np.isin(np.arange(4000), np.concatenate(drive([sampler], LossTable(4000, 16))))
    assert trained[wrong].mean() < 0.1
    # 0.7 of all, and three in four are worth it: what is pruned beyond is shared out fairly.
    assert trained[source == 0].mean() == pytest.approx(0.7 / 0.75, abs=0.02)
    assert trained[(source == 1) & ~wrong].mean() == pytest.approx(0.7 / 0.75, abs=0.04)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_a_source_that_has_nothing_to_do_with_the_target_set_yields_its_slots(keep: float) -> None:
    """Source 1 is of its kind, for the most part, and source 2 is somewhat like it."""
    rng, source = np.random.default_rng(5), np.arange(4000) % 4
    relevance = np.choose(source, [0.001, 0.9, 0.06, 0.001]) * rng.uniform(0.9, 1.1, 4000)
    store = ArrayStore(
        embeddings(4000),
        features=relevance[:, None].astype(np.float16),
        feature_names=["relevance"],
        sources=source.astype(np.int16),
    )
    config = config_of(keep=keep, num_clusters=1)
    sampler = SlapSampler([100] * 40, store, batch_size=32, config=config)
    batches = drive([sampler], LossTable(4000, 16))
    hold_epoch_laws(sampler, batches)
    trained = np.isin(np.arange(4000), np.concatenate(batches))
    share = [float(trained[source == one].mean()) for one in range(4)]
    # Of its kind as much as there is room for, then what is next likeliest, then anything.
    assert share[1] > 0.85 * min(1.0, 4 * keep)
    assert share[2] < 0.15 if keep < 0.3 else share[2] > 0.75
    assert max(share[0], share[3]) < 0.1


def test_auto_at_its_least_keeps_what_a_fixed_fraction_keeps() -> None:
    """It trained on 0.58 of the next likeliest, and on 0.34 of the unlikeliest beside them."""
    group = np.repeat([0, 1, 2], [400, 1600, 2000])
    np.random.default_rng(5).shuffle(group)
    store = ArrayStore(
        embeddings(4000),
        features=np.choose(group, [0.95, 0.12, 0.02])[:, None].astype(np.float16),
        feature_names=["relevance"],
    )
    shares = {}
    for keep in ("auto", 0.5):
        config = config_of(keep=keep, keep_min=0.5, num_clusters=1, seed=1)
        sampler = SlapSampler([100] * 40, store, batch_size=32, config=config)
        trained = np.isin(np.arange(4000), np.concatenate(drive([sampler], LossTable(4000, 16))))
        assert sampler.metrics()["keep"] == 0.5
        # Of all candidates 0.1 * 0.95 + 0.4 * 0.12 + 0.5 * 0.02 are of the kind, whatever is kept.
        assert sampler.metrics()["dispensable"] > 0.82
        shares[keep] = [float(trained[group == one].mean()) for one in range(3)]
    assert shares["auto"] == pytest.approx(shares[0.5], abs=0.02)
    assert shares["auto"][0] > 0.95
    assert shares["auto"][1] > 0.8


@pytest.mark.parametrize("relevance", [1.0, 0.8])
def test_a_target_set_that_all_are_alike_to_changes_nothing(relevance: float) -> None:
    def ids(column: float, weight: float) -> list[list[int]]:
        store = ArrayStore(
            embeddings(800),
            features=np.full((800, 1), column, np.float16),
            feature_names=["relevance"],
            sources=(np.arange(800) % 3).astype(np.int16),
        )
        config = config_of(keep=0.6, target_weight=weight)
        sampler = SlapSampler([40] * 20, store, batch_size=16, config=config)
        return [batch.tolist() for batch in drive([sampler], LossTable(800, 16))]

    usual, found = ids(1.0, 0.0), ids(relevance, 8.0)
    same = [len({*one} & {*other}) for one, other in zip(usual, found, strict=True)]
    # Rounding may move one sample from a batch to the next.
    assert np.mean(same) > 15.9


POOL_DIM, POOL_COLUMNS, STRATA = 4, 6, 2


class Lane:
    """A pool, what was trained on lately, and a scorer; the rest of a lane left out."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = LossModel(
            columns=POOL_COLUMNS, dim=POOL_DIM, metric_dim=3, sketch_dim=16, warmup_losses=16
        )
        shape = {"columns": POOL_COLUMNS, "dim": POOL_DIM, "metric_dim": 3}
        self.pool = Pool(capacity=200, **shape)
        self.recent = RecentlyTrained(num_strata=STRATA, per_stratum=200, **shape)
        self.yardsticks = Yardsticks(
            self.model, Keep(SlapConfig()), (), columns=POOL_COLUMNS, dim=POOL_DIM
        )
        self.scorer = Scorer(
            Slap(SlapConfig()), self.model, self.pool, self.recent, self.yardsticks, None
        )
        self.offered = 0

    def offer(self, count: int, spread: float) -> None:
        """Candidates around one direction; the closer, the less apart they are."""
        x = np.ones((count, POOL_COLUMNS), np.float32)
        x[:, 2:] = unit_rows(x[:, 2:] + spread * self.rng.normal(size=(count, POOL_DIM)))
        ids = np.arange(self.offered, self.offered + count)
        self.offered += count
        self.scorer.watch(ids, x, ids % STRATA)
        self.scorer.score(self.pool.offer(x, sample_id=ids, stratum=ids % STRATA), x)

    def train(self, count: int) -> None:
        """Some of the pool are trained on."""
        slots = self.rng.permutation(self.pool.slots())[:count]
        ids, stratum = self.pool.columns.sample_id[slots], self.pool.columns.stratum[slots]
        x = self.pool.x[slots]
        self.recent.add(ids, stratum, x, self.pool.z[slots])
        self.pool.remove(slots)
        self.scorer.bring_near(ids, stratum, x)

    def learn(self) -> None:
        """A refresh."""
        moments = Moments.zeros(columns=POOL_COLUMNS, sketch_dim=16)
        x = self.rng.normal(size=(40, POOL_COLUMNS)).astype(np.float32)
        x[:, 0] = 1.0
        sketches = self.rng.normal(size=(40, 16)).astype(np.float32)
        moments.add_sketched(x, self.rng.normal(size=40), sketches)
        self.model.refresh(moments, decay=0.9)
        assert self.scorer.refresh()

    def distances(self) -> tuple[Array, Array]:
        """Distances that the pool holds, and found anew, as far as they can tell a copy."""
        pool, slots = self.pool, self.pool.slots()
        found = self.recent.nearest_embedding(
            pool.x, slots, pool.columns.stratum[slots], pool.columns.sample_id[slots]
        )
        most = NO_COPY * self.yardsticks.apart
        return np.minimum(pool.columns.distance[slots], most), np.minimum(found, most)


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    steps=st.lists(st.sampled_from(["near", "far", "train", "learn"]), min_size=4, max_size=14),
)
def test_distances_are_those_to_all_that_was_trained_on(seed: int, steps: list[str]) -> None:
    lane = Lane(seed)
    for step in ["near", "train", *steps, "learn"]:
        if step in ("near", "far"):
            lane.offer(10, 0.1 if step == "near" else 1.0)
        elif step == "train":
            lane.train(3)
        else:
            lane.learn()
        held, found = lane.distances()
        np.testing.assert_allclose(held, found, atol=1e-3)


def test_candidates_lie_where_the_metric_puts_them_whether_it_has_moved_or_not() -> None:
    lane = Lane(0)
    lane.offer(20, 1.0)
    lane.train(5)
    moved = []
    for _ in range(12):
        before = lane.model.metric
        lane.learn()
        moved.append(lane.model.metric is not before)
        lane.offer(3, 1.0)
        slots, used = lane.pool.slots(), lane.recent.sample_id >= 0
        for rows, z in (
            (lane.pool.x[slots], lane.pool.z[slots]),
            (lane.recent.x[used], lane.recent.z[used]),
        ):
            np.testing.assert_array_equal(z, lane.yardsticks.project(rows))
    assert 3 < sum(moved) < 12


def test_a_yardstick_that_outgrows_what_is_known_has_the_pool_compared_anew() -> None:
    lane = Lane(1)
    lane.offer(60, 0.05)
    lane.learn()
    lane.train(10)
    near = lane.scorer.reach
    lane.offer(120, 2.0)
    lane.learn()
    assert lane.scorer.reach > 2.0 * near
    held, found = lane.distances()
    np.testing.assert_allclose(held, found, atol=1e-3)
    assert np.count_nonzero(held > near) > 0


DIM, SKETCH_DIM = 6, 16
NAMES = ("log_prompt", "mismatch", "target_given_prompt")
MISMATCH, COMPRESSION = 3, 4
COLUMNS = 2 + len(NAMES) + DIM


def rows_of(ids: Array) -> Array:
    """(n, COLUMNS) design rows that are a function of the id: a healthy corpus."""
    rows = np.empty((len(ids), COLUMNS), np.float32)
    for row, sample_id in zip(rows, ids.tolist(), strict=True):
        rng = np.random.default_rng(sample_id)
        row[0], row[1] = 1.0, np.log1p(rng.integers(20, 500))
        row[2] = rng.normal()
        row[MISMATCH], row[COMPRESSION] = rng.random(), 0.4 + 0.1 * rng.normal()
        row[5:] = rng.normal(size=DIM)
    rows[:, 5:] = unit_rows(rows[:, 5:])
    return rows


LOOKUP = Lookup(num_samples=2**20, num_strata=8, rows_of=rows_of)


def losses_of(x: Array) -> Array:
    """(n,) losses that follow the embedding, with some noise."""
    return 2.0 + 0.5 * x[:, 5] + 0.1 * np.sin(1e3 * x[:, 6].astype(np.float64))


def model_of(*, fitted: bool = True) -> LossModel:
    """A model that has seen 200 samples, or none."""
    model = LossModel(
        columns=COLUMNS, dim=DIM, metric_dim=4, sketch_dim=SKETCH_DIM, warmup_losses=16
    )
    if fitted:
        x = rows_of(np.arange(200))
        moments = Moments.zeros(columns=COLUMNS, sketch_dim=SKETCH_DIM)
        moments.add_losses(x, losses_of(x))
        model.refresh(moments, decay=0.9)
    return model


def yardsticks_of(
    model: LossModel, names: tuple[str, ...] = NAMES, *, watched: int = 300
) -> Yardsticks:
    """An yardsticks that watched some candidates in three strata and was refreshed."""
    yardsticks = Yardsticks(model, Keep(SlapConfig()), names, columns=COLUMNS, dim=DIM)
    ids = np.arange(watched)
    yardsticks.watch(ids, rows_of(ids), ids % 3)
    yardsticks.refresh()
    return yardsticks


NEW = np.arange(1000, 1060)
X, STRATUM, UNKNOWN = rows_of(NEW), NEW % 3, np.full(len(NEW), np.nan)


def test_predictions_count_where_nothing_was_measured() -> None:
    scores = yardsticks_of(model_of()).score(X, STRATUM, UNKNOWN)
    assert np.corrcoef(scores.loss, losses_of(X))[0, 1] > 0.9
    assert np.corrcoef(scores.rank, losses_of(X))[0, 1] > 0.7
    assert np.all((scores.rank >= 0) & (scores.rank <= 1))
    z = yardsticks_of(model_of()).project(X)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(scores.mismatch, X[:, MISMATCH].astype(np.float64))


def test_a_measured_loss_takes_the_place_of_the_prediction() -> None:
    yardsticks = yardsticks_of(model_of())
    plain = yardsticks.score(X, STRATUM, UNKNOWN)
    own = UNKNOWN.copy()
    own[3], own[4] = plain.loss[3] + 2.0, plain.loss[4] - 2.0
    scores = yardsticks.score(X, STRATUM, own)
    np.testing.assert_array_equal(scores.loss[[3, 4]], own[[3, 4]])
    assert scores.rank[3] > plain.rank[3]
    assert scores.rank[4] < plain.rank[4]
    # What the words say of prompt and target has nothing to do with the loss.
    np.testing.assert_array_equal(scores.mismatch, plain.mismatch)


def test_a_mismatch_is_a_probability_and_zero_where_the_store_does_not_tell() -> None:
    odd = X.copy()
    odd[:2, MISMATCH] = -0.1, 1.7
    scores = yardsticks_of(model_of()).score(odd, STRATUM, UNKNOWN)
    assert scores.mismatch[:2].tolist() == [0.0, 1.0]
    untold = yardsticks_of(model_of(), ("a", "b", "c")).score(odd, STRATUM, UNKNOWN)
    assert not untold.mismatch.any()


def test_a_candidate_is_scored_alike_in_any_company() -> None:
    yardsticks = yardsticks_of(model_of())
    whole = yardsticks.score(X, STRATUM, UNKNOWN)
    part = yardsticks.score(X[7:9], STRATUM[7:9], UNKNOWN[7:9])
    for name in ("loss", "rank", "mismatch"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[7:9])
    np.testing.assert_array_equal(yardsticks.project(X[7:9]), yardsticks.project(X)[7:9])


def test_the_yardstick_moves_at_refreshes_only() -> None:
    yardsticks = yardsticks_of(model_of())
    before = yardsticks.score(X, STRATUM, UNKNOWN)
    high = np.arange(3000)[losses_of(rows_of(np.arange(3000))) > 2.3]
    yardsticks.watch(high, rows_of(high), high % 3)
    np.testing.assert_array_equal(yardsticks.score(X, STRATUM, UNKNOWN).rank, before.rank)
    yardsticks.refresh()
    after = yardsticks.score(X, STRATUM, UNKNOWN)
    np.testing.assert_array_equal(after.loss, before.loss)
    # Among higher losses the same ones rank lower.
    assert after.rank.mean() < before.rank.mean() - 0.1


def test_before_losses_are_predicted_the_mismatch_is_all_there_is() -> None:
    unfitted, fitted = yardsticks_of(model_of(fitted=False)), yardsticks_of(model_of())
    scores = unfitted.score(X, STRATUM, UNKNOWN)
    assert np.all(scores.rank == 0.5)
    assert not unfitted.project(X).any()
    np.testing.assert_array_equal(scores.mismatch, fitted.score(X, STRATUM, UNKNOWN).mismatch)


def test_yardsticks_that_saw_nothing_score_nobody() -> None:
    yardsticks = Yardsticks(model_of(), Keep(SlapConfig()), NAMES, columns=COLUMNS, dim=DIM)
    yardsticks.refresh()
    scores = yardsticks.score(X, STRATUM, UNKNOWN)
    assert np.all(scores.rank == 0.5)
    assert yardsticks.typical == yardsticks.apart == 1.0


def test_typical_distance_is_that_of_neighbours_in_a_stratum() -> None:
    model = model_of()
    crowded = yardsticks_of(model).typical
    sparse = yardsticks_of(model, watched=12).typical
    assert 0.0 < crowded < sparse < 2.0
    # Nobody has a neighbour; and copies of one sample leave a floor, not a zero.
    assert yardsticks_of(model, watched=3).typical == 1.0
    copies = Yardsticks(model, Keep(SlapConfig()), NAMES, columns=COLUMNS, dim=DIM)
    copies.watch(NEW, np.tile(X[:1], (len(NEW), 1)), STRATUM)
    copies.refresh()
    assert copies.typical == pytest.approx(1e-3, abs=1e-3)


def test_candidates_without_a_copy_are_apart_by_the_distance_to_their_neighbours() -> None:
    ids = np.arange(300)
    x = rows_of(ids)
    unit = x[:, -DIM:]
    nearest = [
        min(np.linalg.norm(unit[i] - unit[j]) for j in range(i % 3, 300, 3) if j != i) for i in ids
    ]
    apart = yardsticks_of(model_of()).apart
    assert apart == pytest.approx(np.quantile(nearest, 0.9), abs=1e-3)
    # Copies of half of them change little: the others say what is usual.
    copied = Yardsticks(model_of(), Keep(SlapConfig()), NAMES, columns=COLUMNS, dim=DIM)
    copied.watch(np.tile(ids[:150], 2), np.tile(x[:150], (2, 1)), np.tile(ids[:150] % 3, 2))
    copied.watch(ids[150:], x[150:], ids[150:] % 3)
    copied.refresh()
    assert copied.apart == pytest.approx(apart, rel=0.2)


@pytest.mark.parametrize("names", [NAMES, ("a", "b", "c")])
def test_yardsticks_survive_a_checkpoint_and_its_window_is_bounded(
    names: tuple[str, ...],
) -> None:
    model = model_of()
    yardsticks = yardsticks_of(model, names)
    late = np.arange(2000, 2000 + WINDOW + 10)
    yardsticks.watch(late, rows_of(late), late % 3)
    state = as_json(yardsticks.state_dict())
    assert len(state["sample_id"]) == WINDOW
    again = Yardsticks(model, Keep(SlapConfig()), names, columns=COLUMNS, dim=DIM)
    again.load_state_dict(Saved(state), LOOKUP)
    assert as_json(again.state_dict()) == state
    for _ in range(2):
        left, right = (one.score(X, STRATUM, UNKNOWN) for one in (yardsticks, again))
        for name in ("loss", "rank", "mismatch"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        np.testing.assert_array_equal(yardsticks.project(X), again.project(X))
        yardsticks.refresh()
        again.refresh()
