"""How candidates are judged: own losses before predicted ones, and by one yardstick."""

from __future__ import annotations

import numpy as np
import pytest

from slap_stream.appraisal import WINDOW, Appraiser
from slap_stream.kernels import unit_rows
from slap_stream.learnability import LearnabilityModel
from slap_stream.moments import Moments
from tests.laws import as_json
from tests.strategies import Array

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


def losses_of(x: Array) -> Array:
    """(n,) losses that follow the embedding, with some noise."""
    return 2.0 + 0.5 * x[:, 5] + 0.1 * np.sin(1e3 * x[:, 6].astype(np.float64))


def model_of(*, fitted: bool = True) -> LearnabilityModel:
    """A model that has seen 200 samples, or none."""
    model = LearnabilityModel(
        columns=COLUMNS, dim=DIM, metric_dim=4, sketch_dim=SKETCH_DIM, warmup_losses=16
    )
    if fitted:
        x = rows_of(np.arange(200))
        moments = Moments.zeros(columns=COLUMNS, sketch_dim=SKETCH_DIM)
        moments.add_losses(x, losses_of(x))
        model.refresh([moments], forgetting=0.9)
    return model


def appraiser_of(
    model: LearnabilityModel, names: tuple[str, ...] = NAMES, *, watched: int = 300
) -> Appraiser:
    """An appraiser that watched some candidates in three strata and was refreshed."""
    appraiser = Appraiser(model, names, columns=COLUMNS, dim=DIM)
    ids = np.arange(watched)
    appraiser.watch(ids, rows_of(ids), ids % 3)
    appraiser.refresh()
    return appraiser


NEW = np.arange(1000, 1060)
X, STRATUM, UNKNOWN = rows_of(NEW), NEW % 3, np.full(len(NEW), np.nan)


def test_predictions_judge_where_nothing_was_measured() -> None:
    judged = appraiser_of(model_of()).appraise(X, STRATUM, UNKNOWN)
    assert np.corrcoef(judged.loss, losses_of(X))[0, 1] > 0.9
    assert np.corrcoef(judged.rank, losses_of(X))[0, 1] > 0.7
    assert np.all((judged.rank >= 0) & (judged.rank <= 1))
    z = appraiser_of(model_of()).project(X)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(judged.mismatch, X[:, MISMATCH].astype(np.float64))


def test_a_measured_loss_takes_the_place_of_the_prediction() -> None:
    appraiser = appraiser_of(model_of())
    plain = appraiser.appraise(X, STRATUM, UNKNOWN)
    own = UNKNOWN.copy()
    own[3], own[4] = plain.loss[3] + 2.0, plain.loss[4] - 2.0
    judged = appraiser.appraise(X, STRATUM, own)
    np.testing.assert_array_equal(judged.loss[[3, 4]], own[[3, 4]])
    assert judged.excess[3] == pytest.approx(plain.excess[3] + 2.0)
    assert judged.rank[3] > plain.rank[3]
    assert judged.rank[4] < plain.rank[4]
    # What the words say of prompt and target has nothing to do with the loss.
    np.testing.assert_array_equal(judged.mismatch, plain.mismatch)


def test_a_mismatch_is_a_probability_and_zero_where_the_store_does_not_tell() -> None:
    odd = X.copy()
    odd[:2, MISMATCH] = -0.1, 1.7
    judged = appraiser_of(model_of()).appraise(odd, STRATUM, UNKNOWN)
    assert judged.mismatch[:2].tolist() == [0.0, 1.0]
    untold = appraiser_of(model_of(), ("a", "b", "c")).appraise(odd, STRATUM, UNKNOWN)
    assert not untold.mismatch.any()


def test_a_candidate_is_judged_alike_in_any_company() -> None:
    appraiser = appraiser_of(model_of())
    whole = appraiser.appraise(X, STRATUM, UNKNOWN)
    part = appraiser.appraise(X[7:9], STRATUM[7:9], UNKNOWN[7:9])
    for name in ("loss", "excess", "rank", "mismatch"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[7:9])
    np.testing.assert_array_equal(appraiser.project(X[7:9]), appraiser.project(X)[7:9])


def test_the_yardstick_moves_at_refreshes_only() -> None:
    appraiser = appraiser_of(model_of())
    before = appraiser.appraise(X, STRATUM, UNKNOWN)
    high = np.arange(3000)[losses_of(rows_of(np.arange(3000))) > 2.3]
    appraiser.watch(high, rows_of(high), high % 3)
    np.testing.assert_array_equal(appraiser.appraise(X, STRATUM, UNKNOWN).rank, before.rank)
    appraiser.refresh()
    after = appraiser.appraise(X, STRATUM, UNKNOWN)
    np.testing.assert_array_equal(after.loss, before.loss)
    # Among higher losses the same ones rank lower.
    assert after.rank.mean() < before.rank.mean() - 0.1


def test_before_losses_are_predicted_the_mismatch_is_all_there_is() -> None:
    unfitted, fitted = appraiser_of(model_of(fitted=False)), appraiser_of(model_of())
    judged = unfitted.appraise(X, STRATUM, UNKNOWN)
    assert np.all(judged.rank == 0.5)
    assert not unfitted.project(X).any()
    np.testing.assert_array_equal(judged.mismatch, fitted.appraise(X, STRATUM, UNKNOWN).mismatch)


def test_an_appraiser_that_saw_nothing_judges_nobody() -> None:
    appraiser = Appraiser(model_of(), NAMES, columns=COLUMNS, dim=DIM)
    appraiser.refresh()
    judged = appraiser.appraise(X, STRATUM, UNKNOWN)
    assert np.all(judged.rank == 0.5)
    assert appraiser.typical == appraiser.apart == 1.0


def test_typical_distance_is_that_of_neighbours_in_a_stratum() -> None:
    model = model_of()
    crowded = appraiser_of(model).typical
    sparse = appraiser_of(model, watched=12).typical
    assert 0.0 < crowded < sparse < 2.0
    # Nobody has a neighbour; and copies of one sample leave a floor, not a zero.
    assert appraiser_of(model, watched=3).typical == 1.0
    copies = Appraiser(model, NAMES, columns=COLUMNS, dim=DIM)
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
    apart = appraiser_of(model_of()).apart
    assert apart == pytest.approx(np.quantile(nearest, 0.9), abs=1e-3)
    # Copies of half of them change little: the others say what is usual.
    copied = Appraiser(model_of(), NAMES, columns=COLUMNS, dim=DIM)
    copied.watch(np.tile(ids[:150], 2), np.tile(x[:150], (2, 1)), np.tile(ids[:150] % 3, 2))
    copied.watch(ids[150:], x[150:], ids[150:] % 3)
    copied.refresh()
    assert copied.apart == pytest.approx(apart, rel=0.2)


@pytest.mark.parametrize("names", [NAMES, ("a", "b", "c")])
def test_an_appraiser_survives_a_checkpoint_and_its_window_is_bounded(
    names: tuple[str, ...],
) -> None:
    model = model_of()
    appraiser = appraiser_of(model, names)
    late = np.arange(2000, 2000 + WINDOW + 10)
    appraiser.watch(late, rows_of(late), late % 3)
    state = as_json(appraiser.state_dict())
    assert len(state["sample_id"]) == WINDOW
    again = Appraiser(model, names, columns=COLUMNS, dim=DIM)
    again.load_state_dict(state, rows_of)
    assert as_json(again.state_dict()) == state
    for _ in range(2):
        left, right = (one.appraise(X, STRATUM, UNKNOWN) for one in (appraiser, again))
        for name in ("loss", "excess", "rank", "mismatch"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        np.testing.assert_array_equal(appraiser.project(X), again.project(X))
        appraiser.refresh()
        again.refresh()
