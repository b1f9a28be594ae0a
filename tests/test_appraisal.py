"""How candidates are judged: own losses before predicted ones, evidence, and one yardstick."""

from __future__ import annotations

import numpy as np
import pytest

from slap_stream.appraisal import WINDOW, Appraiser
from slap_stream.learnability import LearnabilityModel, Moments
from tests.laws import as_json
from tests.strategies import Array

DIM, SKETCH_DIM = 6, 16
NAMES = ("log_prompt", "prompt_target_cosine", "target_given_prompt")
COSINE, COMPRESSION = 3, 4
COLUMNS = 2 + len(NAMES) + DIM


def rows_of(ids: Array) -> Array:
    """(n, COLUMNS) design rows that are a function of the id: a healthy corpus."""
    rows = np.empty((len(ids), COLUMNS), np.float32)
    for row, sample_id in zip(rows, ids.tolist(), strict=True):
        rng = np.random.default_rng(sample_id)
        row[0], row[1] = 1.0, np.log1p(rng.integers(20, 500))
        row[2] = rng.normal()
        row[COSINE], row[COMPRESSION] = 0.6 + 0.1 * rng.normal(), 0.4 + 0.1 * rng.normal()
        row[5:] = rng.normal(size=DIM)
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
    np.testing.assert_allclose(np.linalg.norm(judged.z, axis=1), 1.0, rtol=1e-5)
    assert np.all(judged.evidence >= 0)


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
    # Too high a loss is evidence of corruption, too low a loss is not.
    assert judged.evidence[3] > plain.evidence[3] + 2.0
    assert judged.evidence[4] == plain.evidence[4]
    others = np.delete(np.arange(len(NEW)), [3, 4])
    np.testing.assert_array_equal(judged.evidence[others], plain.evidence[others])


@pytest.mark.parametrize(("column", "towards"), [(COSINE, -1.0), (COMPRESSION, 1.0)])
def test_corruption_shows_in_the_feature_columns(column: int, towards: float) -> None:
    appraiser = appraiser_of(model_of())
    corrupted, odd = X.copy(), X.copy()
    corrupted[0, column] += towards * 1.0
    odd[0, column] -= towards * 1.0
    plain, suspect, harmless = (
        appraiser.appraise(x, STRATUM, UNKNOWN).evidence for x in (X, corrupted, odd)
    )
    # Ten standard deviations, shared among three kinds of evidence.
    assert suspect[0] > 4.0
    assert harmless[0] <= plain[0]
    np.testing.assert_array_equal(suspect[1:], plain[1:])
    # Healthy samples hardly ever look like it.
    assert np.mean(plain > 2.0) < 0.1


def test_what_is_usual_is_judged_by_stratum() -> None:
    appraiser = Appraiser(model_of(), NAMES, columns=COLUMNS, dim=DIM)
    # In stratum 0 prompt and target are far apart (translations, say), in stratum 1 close.
    ids, label = np.arange(300), np.arange(300) % 2
    x = rows_of(ids)
    x[label == 0, COSINE] -= 0.5
    appraiser.watch(ids, x, label)
    appraiser.refresh()
    low = X[:2].copy()
    low[:, COSINE], low[:, COMPRESSION] = 0.1, 0.4
    there, here = appraiser.appraise(low, np.array([0, 1]), UNKNOWN[:2]).evidence
    assert there < 0.5
    assert here > 2.0
    # A stratum too thin for a scale of its own, or never seen, is judged by all.
    thin = appraiser.appraise(low, np.array([7, 8]), UNKNOWN[:2]).evidence
    assert thin[0] == thin[1]
    assert there < thin[0] < here


def test_without_those_columns_only_losses_are_evidence() -> None:
    appraiser = appraiser_of(model_of(), ("a", "b", "c"))
    assert not appraiser.appraise(X, STRATUM, UNKNOWN).evidence.any()
    own = losses_of(X)
    own[0] += 5.0
    assert appraiser.appraise(X, STRATUM, own).evidence[0] > 5.0


def test_a_feature_column_that_never_varies_is_no_evidence() -> None:
    appraiser = Appraiser(model_of(), NAMES, columns=COLUMNS, dim=DIM)
    same = X.copy()
    same[:, [COSINE, COMPRESSION]] = 0.5
    appraiser.watch(NEW, same, STRATUM)
    appraiser.refresh()
    assert not appraiser.appraise(X, STRATUM, UNKNOWN).evidence.any()


def test_a_candidate_is_judged_alike_in_any_company() -> None:
    appraiser = appraiser_of(model_of())
    whole = appraiser.appraise(X, STRATUM, UNKNOWN)
    part = appraiser.appraise(X[7:9], STRATUM[7:9], UNKNOWN[7:9])
    for name in ("loss", "excess", "rank", "evidence", "z"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[7:9])
    np.testing.assert_array_equal(appraiser.project(X), whole.z)


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


def test_before_losses_are_predicted_feature_columns_are_all_there_is() -> None:
    unfitted, fitted = appraiser_of(model_of(fitted=False)), appraiser_of(model_of())
    judged = unfitted.appraise(X, STRATUM, UNKNOWN)
    assert np.all(judged.rank == 0.5)
    assert not judged.z.any()
    np.testing.assert_array_equal(judged.evidence, fitted.appraise(X, STRATUM, UNKNOWN).evidence)


def test_an_appraiser_that_saw_nothing_judges_nobody() -> None:
    appraiser = Appraiser(model_of(), NAMES, columns=COLUMNS, dim=DIM)
    appraiser.refresh()
    judged = appraiser.appraise(X, STRATUM, UNKNOWN)
    assert np.all(judged.rank == 0.5)
    assert not judged.evidence.any()
    assert appraiser.typical == 1.0


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


def test_candidates_are_apart_by_the_median_pair_of_their_stratum() -> None:
    appraiser = appraiser_of(model_of(), watched=60)
    unit = rows_of(np.arange(60))[:, -DIM:]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    medians = [
        np.median([np.linalg.norm(unit[i] - unit[j]) for j in range(i % 3, 60, 3) if j != i])
        for i in range(60)
    ]
    assert appraiser.apart == pytest.approx(np.median(medians), abs=1e-3)


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
        for name in ("loss", "excess", "rank", "evidence", "z"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        appraiser.refresh()
        again.refresh()
