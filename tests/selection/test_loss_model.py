"""What a regression over moments predicts: losses, how surely, and which samples teach alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.kernels import unit_rows
from slap_stream.core.saved import Saved
from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.selection.loss_model import (
    INTERCEPT,
    LOG_LENGTH,
    PENALTIES,
    RANK_SHRINKAGE,
    SOLVE_EVERY,
    LossModel,
    RankTable,
    Renewal,
    design_rows,
)
from slap_stream.selection.moments import Moments
from slap_stream.types import Rows
from tests import reference
from tests.laws import as_json
from tests.strategies import Array, labelled, raw_columns, seeds

DIM, SKETCH_DIM = 12, 64


def design(seed: int, n: int, *, features: int = 0) -> Array:
    """(n, 2 + features + DIM) design rows: ones, log lengths, noise."""
    rng = np.random.default_rng(seed)
    length = np.log1p(rng.integers(20, 2000, (n, 1)))
    rest = rng.normal(size=(n, features + DIM))
    return np.concatenate([np.ones((n, 1)), length, rest], axis=1).astype(np.float32)


def moments_of(x: Array, losses: Array, sketches: Array | None = None) -> Moments:
    """Moments of samples that all have a loss."""
    moments = Moments.zeros(columns=x.shape[1], sketch_dim=SKETCH_DIM)
    if sketches is None:
        moments.add_losses(x, losses)
    else:
        moments.add_sketched(x, losses, sketches)
    return moments


def model_of(columns: int, *, metric_dim: int = 8, **options: int) -> LossModel:
    """A model without any samples."""
    return LossModel(
        columns=columns,
        dim=DIM,
        metric_dim=metric_dim,
        sketch_dim=SKETCH_DIM,
        **({"warmup_losses": 16} | options),  # type: ignore[arg-type]
    )


def fitted(x: Array, losses: Array, sketches: Array | None = None) -> LossModel:
    """A model after one refresh."""
    model = model_of(x.shape[1])
    model.refresh(moments_of(x, losses, sketches), decay=0.9)
    assert model.fitted
    return model


def linear_losses(x: Array, seed: int = 0, noise: float = 0.0) -> Array:
    """Losses that are a linear function of the design rows, plus noise."""
    rng = np.random.default_rng(seed)
    weights = np.concatenate([[2.0, 0.3], 0.4 * rng.normal(size=x.shape[1] - 2)])
    return x @ weights + noise * rng.normal(size=len(x))


@settings(max_examples=60)
@given(columns=raw_columns())
def test_design_rows_are_finite_whatever_the_store_holds(columns: dict[str, Array]) -> None:
    rows = Rows(**columns)
    x = design_rows(rows)
    features = columns["feature"].shape[1]
    assert x.dtype == np.float32
    assert x.shape == (len(rows), 2 + features + columns["embedding"].shape[1])
    assert np.isfinite(x).all()
    assert np.all(x[:, INTERCEPT] == 1.0)
    np.testing.assert_allclose(x[:, LOG_LENGTH], np.log1p(np.maximum(columns["length"], 0)), 1e-6)
    feature, embedding = (
        np.where(np.isfinite(raw), raw, 0.0)
        for raw in (columns[name].astype(np.float32) for name in ("feature", "embedding"))
    )
    np.testing.assert_array_equal(x[:, 2 : 2 + features], feature)
    np.testing.assert_array_equal(x[:, 2 + features :], unit_rows(embedding))


def test_a_linear_map_is_recovered_out_of_sample() -> None:
    x, new = design(0, 400), design(1, 400)
    model = fitted(x, linear_losses(x))
    truth = linear_losses(new)
    error = np.mean((new @ model.coefficient - truth) ** 2)
    assert error < 1e-3 * truth.var()
    assert model.noise < 0.05 * truth.std()


def test_under_noise_the_regression_beats_the_mean_and_knows_the_noise() -> None:
    x, new = design(0, 300), design(1, 2000)
    losses = linear_losses(x, noise=1.0)
    model = fitted(x, losses)
    truth = linear_losses(new)
    assert np.mean((new @ model.coefficient - truth) ** 2) < 0.2 * np.mean(
        (losses.mean() - truth) ** 2
    )
    assert model.noise == pytest.approx(1.0, rel=0.2)


def test_where_nothing_can_be_learnt_the_mean_is_kept() -> None:
    x, new = design(0, 200), design(1, 1000)
    losses = 3.0 + np.random.default_rng(2).normal(size=200)
    predicted = new @ fitted(x, losses).coefficient
    # A least-squares fit of 14 columns would spread by sqrt(14 / 200) = 0.26.
    assert predicted.std() < 0.15
    assert predicted.mean() == pytest.approx(losses.mean(), abs=0.1)


@settings(max_examples=15)
@given(seed=seeds, n=st.integers(20, 60), noise=st.sampled_from([0.1, 1.0, 5.0]))
def test_ridge_equals_its_twin(seed: int, n: int, noise: float) -> None:
    x = design(seed, n)
    losses = linear_losses(x, seed, noise)
    expected, spread = reference.ridge(x.astype(np.float64), losses, PENALTIES)
    model = fitted(x, losses)
    np.testing.assert_allclose(x @ model.coefficient, x @ expected, rtol=1e-3, atol=1e-3)
    assert model.noise == pytest.approx(spread, rel=1e-3)


def test_uncertainty_is_larger_where_there_is_no_data() -> None:
    x = design(0, 300)
    x[:, -1] = 0.01 * x[:, -1]
    model = fitted(x, linear_losses(x, noise=0.5))
    inside, outside = design(1, 200), design(1, 200)
    inside[:, -1] *= 0.01
    assert model.variance(outside).min() > 0
    assert np.median(model.variance(outside)) > 10 * np.median(model.variance(inside))
    # More data, less uncertainty.
    more = design(2, 3000)
    more[:, -1] *= 0.01
    surer = fitted(more, linear_losses(more, noise=0.5))
    assert np.median(surer.variance(inside)) < 0.3 * np.median(model.variance(inside))


def test_nothing_is_predicted_before_the_warm_up() -> None:
    x = design(0, 15)
    model = model_of(x.shape[1])
    for count in (10, 5):
        assert not model.fitted
        assert model.variance(x).tolist() == [1.0] * 15
        assert not model.coefficient.any()
        model.refresh(moments_of(x[:count], linear_losses(x[:count])), decay=1.0)
    assert not model.fitted
    model.refresh(moments_of(x[:1], linear_losses(x[:1])), decay=1.0)
    assert model.fitted
    # Once it predicts it goes on, even when decay leaves fewer losses than that.
    model.refresh(moments_of(x[:1], linear_losses(x[:1])), decay=0.1)
    assert float(model.moments.count) < 16
    assert model.fitted


def test_old_losses_are_forgotten() -> None:
    x = design(0, 200)
    model = fitted(x, linear_losses(x))
    for _ in range(8):
        model.refresh(moments_of(x, linear_losses(x) + 5.0), decay=0.5)
    assert np.mean(x @ model.coefficient - linear_losses(x)) == pytest.approx(5.0, abs=0.05)


def test_many_refreshes_without_feedback_change_no_prediction() -> None:
    x = design(0, 200)
    model = fitted(x, linear_losses(x, noise=0.3))
    before = x @ model.coefficient
    nothing = Moments.zeros(columns=x.shape[1], sketch_dim=SKETCH_DIM)
    for _ in range(1200):
        model.refresh(nothing, decay=0.5)
    np.testing.assert_allclose(x @ model.coefficient, before, rtol=1e-6)
    assert np.isfinite(model.variance(x)).all()


def test_samples_that_could_not_be_solved_from_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = design(0, 200)
    model, tried_once = fitted(x, linear_losses(x)), fitted(x, linear_losses(x))
    more = moments_of(x[:50], linear_losses(x[:50]) + 1.0)

    def fails(matrix: Array) -> Array:
        raise np.linalg.LinAlgError("no factor")

    with monkeypatch.context() as patch:
        patch.setattr(np.linalg, "cholesky", fails)
        with pytest.raises(np.linalg.LinAlgError):
            model.refresh(more, decay=0.5)
    for one in (model, tried_once):
        one.refresh(more, decay=0.5)
    np.testing.assert_array_equal(model.moments.gram, tried_once.moments.gram)


def test_columns_that_never_vary_get_no_weight_and_do_no_harm() -> None:
    x = design(0, 200, features=3)
    x[:, 2:5] = [0.0, 7.0, 1e-30]
    model = fitted(x, linear_losses(design(0, 200)))
    assert np.isfinite(model.coefficient).all()
    assert np.isfinite(model.metric).all()
    assert model.coefficient[2] == 0.0
    other = x.copy()
    other[:, 2] = 100.0
    np.testing.assert_array_equal(model.variance(other), model.variance(x))


def test_excess_is_what_the_length_does_not_explain() -> None:
    x = design(0, 500)
    rng = np.random.default_rng(0)
    surprise = x[:, 5]
    losses = 1.0 + 0.8 * x[:, LOG_LENGTH] + 0.5 * surprise + 0.1 * rng.normal(size=500)
    model = fitted(x, losses)
    excess = x @ model.excess
    assert abs(np.corrcoef(excess, x[:, LOG_LENGTH])[0, 1]) < 0.15
    assert np.corrcoef(excess, surprise)[0, 1] > 0.95
    assert abs(excess.mean()) < 0.05


def test_with_a_reference_model_excess_is_the_loss_beyond_the_reference() -> None:
    x = design(0, 500, features=1)
    x[:, 2] = np.abs(x[:, 2]) + 1.0
    losses = x[:, 2] + 0.5 * x[:, 5] + 2.0
    model = model_of(x.shape[1], reference_column=2)
    model.refresh(moments_of(x, losses), decay=0.9)
    np.testing.assert_allclose(x @ model.excess, losses - x[:, 2], atol=0.05)


def gradients(x: Array, seed: int = 0, noise: float = 0.0) -> Array:
    """(n, SKETCH_DIM) sketches that are a linear function of few embedding directions."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(DIM, 3)) @ rng.normal(size=(3, SKETCH_DIM))
    sketches = x[:, -DIM:] @ maps
    sketches += noise * sketches.std() * rng.normal(size=sketches.shape)
    # Their lengths say nothing about directions and must not count.
    return (sketches * rng.uniform(0.1, 10.0, (len(x), 1))).astype(np.float32)


def similarities(rows: Array, mean: Array | None = None) -> Array:
    """Inner products of all pairs of different unit rows, centred by `mean` before."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if mean is not None:
        unit = unit - mean
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(rows), 1)]


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.95), (1.0, 0.75)])
def test_metric_follows_the_gradients_of_samples_it_never_saw(noise: float, least: float) -> None:
    x, new = design(0, 600), design(1, 150)
    model = fitted(x, linear_losses(x), gradients(x, noise=noise))
    assert model.metric_from_sketches
    truth = similarities(gradients(new))
    learned = np.corrcoef(similarities(new @ model.metric), truth)[0, 1]
    plain = np.corrcoef(similarities(new[:, -DIM:]), truth)[0, 1]
    assert learned > least
    assert learned > plain + 0.1


def test_without_enough_sketches_the_metric_is_that_of_the_embeddings() -> None:
    x = design(0, 600)
    x[:, -DIM:] *= np.linspace(0.01, 3.0, DIM)
    model = fitted(x, linear_losses(x))
    assert not model.metric_from_sketches
    centred = x[:, -DIM:] - x[:, -DIM:].mean(axis=0)
    same = np.corrcoef(similarities(x @ model.metric), similarities(centred))[0, 1]
    assert same > 0.98


def test_metric_vectors_are_centred_and_at_most_as_many_as_asked_for() -> None:
    x = design(0, 400)
    for sketches in (None, gradients(x)):
        model = fitted(x, linear_losses(x), sketches)
        assert model.metric.shape == (x.shape[1], 8)
        assert np.abs((x @ model.metric).mean(axis=0)).max() < 1e-3
    assert model_of(14, metric_dim=999).metric.shape == (14, DIM)


def test_a_model_that_follows_predicts_what_the_one_that_solves_does() -> None:
    x = design(0, 300)
    solving, following = model_of(x.shape[1]), model_of(x.shape[1])
    following.follow(from_bytes(to_bytes(solving.solution())))
    assert not following.fitted
    for refresh in range(SOLVE_EVERY + 2):
        samples = design(refresh, 300)
        sums = moments_of(samples, linear_losses(samples, noise=0.3), gradients(samples))
        before, solved_before = following.metric, solving.metric
        solving.refresh(sums, decay=0.9)
        following.follow(from_bytes(to_bytes(solving.solution())))
        np.testing.assert_array_equal(following.prediction, solving.prediction)
        np.testing.assert_array_equal(following.metric, solving.metric)
        np.testing.assert_array_equal(following.variance(x), solving.variance(x))
        assert following.noise == solving.noise
        # Lanes project their candidates anew when it is another array.
        assert (following.metric is before) == (solving.metric is solved_before)
    with pytest.raises(RuntimeError, match="got one that follows another rank's; ask that of the"):
        following.refresh(sums, decay=0.9)
    resumed = model_of(x.shape[1])
    resumed.load_state_dict(Saved(solving.state_dict()))
    following.follow(resumed.solution())
    np.testing.assert_array_equal(following.variance(x), solving.variance(x))


def test_a_model_survives_a_checkpoint_bit_by_bit() -> None:
    x = design(0, 300)
    model = fitted(x, linear_losses(x, noise=0.3), gradients(x))
    again = model_of(x.shape[1])
    again.load_state_dict(Saved(as_json(model.state_dict())))
    assert as_json(again.state_dict()) == as_json(model.state_dict())
    for _ in range(6):
        np.testing.assert_array_equal(again.prediction, model.prediction)
        np.testing.assert_array_equal(again.metric, model.metric)
        np.testing.assert_array_equal(again.variance(x), model.variance(x))
        assert again.noise == model.noise
        for one in (model, again):
            one.refresh(moments_of(x[:50], linear_losses(x[:50])), decay=0.9)


@settings(max_examples=100)
@given(window=labelled(), asked=labelled(most=8))
def test_ranks_equal_their_twin(window: tuple[Array, Array], asked: tuple[Array, Array]) -> None:
    ranks = RankTable(*window).rank(*asked)
    assert np.all((ranks >= 0.0) & (ranks <= 1.0))
    for value, name, found in zip(*asked, ranks, strict=True):
        values, stratum = window[0].tolist(), window[1].tolist()
        expected = reference.rank(value, name, values, stratum, RANK_SHRINKAGE)
        assert found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40)
@given(window=labelled(), name=st.sampled_from([0, 1, 4, 7]))
def test_ranks_never_fall_as_values_rise(window: tuple[Array, Array], name: int) -> None:
    values = np.linspace(-4.0, 4.0, 33)
    ranks = RankTable(*window).rank(values, np.full(33, name))
    assert np.all(np.diff(ranks) >= 0)


def test_thick_strata_rank_by_themselves_and_thin_ones_by_all() -> None:
    values = np.concatenate([np.arange(1000.0), 5000.0 + np.arange(1000.0), [7.0]])
    table = RankTable(values, np.repeat([0, 1, 2], [1000, 1000, 1]))
    ranks = table.rank(np.array([500.0, 5500.0, 500.0]), np.array([0, 1, 2]))
    assert ranks == pytest.approx([0.5, 0.5, 0.25], abs=0.1)


def test_what_moves_slowly_is_solved_while_it_grows_and_else_now_and_then() -> None:
    renewal = Renewal()
    grows = [100.0, 190.0, 271.0, 344.0, 380.0, 420.0, 440.0]
    assert [renewal.due(weight) for weight in grows] == [True] * 4 + [False, False, True]
    settled = [renewal.due(450.0) for _ in range(3 * SOLVE_EVERY)]
    assert settled == ([False] * (SOLVE_EVERY - 1) + [True]) * 3


def drifting(refreshes: int, *, held: bool) -> tuple[LossModel, list[int]]:
    """A model over refreshes of losses that drift; with `held` off it solves all at each of them.

    Returns the model, and in how many columns the metric changed at each refresh.
    """
    model, changed = model_of(14), []
    for step in range(refreshes):
        x = design(step, 400)
        losses = linear_losses(x, noise=0.5) + 0.05 * step * x[:, 4]
        before = model.metric
        if not held:
            model._penalty_renewal, model._metric_renewal = Renewal(), Renewal()
        model.refresh(moments_of(x, losses, gradients(x, noise=1.0)), decay=0.9)
        changed.append(int(model.metric is not before))
    return model, changed


def test_between_solutions_predictions_stay_those_of_the_full_solution() -> None:
    held, changed = drifting(11, held=True)
    full, always = drifting(11, held=False)
    assert sum(always) == 11
    assert 4 <= sum(changed) < 9
    assert changed[-1] == 0
    new = design(99, 500)
    for name in ("coefficient", "excess"):
        left, right = new @ getattr(held, name), new @ getattr(full, name)
        assert np.corrcoef(left, right)[0, 1] > 0.9999
    assert held.noise == pytest.approx(full.noise, rel=0.01)
    left, right = (similarities(new @ one.metric) for one in (held, full))
    assert np.corrcoef(left, right)[0, 1] > 0.98


def test_the_metric_of_sketches_equals_its_twin() -> None:
    x = design(0, 500)
    sketches = gradients(x, noise=1.0)
    expected = reference.metric(x.astype(np.float64), sketches.astype(np.float64), 8)
    model = fitted(x, linear_losses(x), sketches)
    new = design(1, 200)
    centred = new.astype(np.float64) - x.mean(axis=0)
    left, right = (rows @ rows.T for rows in (new @ model.metric, centred @ expected))
    np.testing.assert_allclose(left, right, atol=1e-2 * np.abs(right).max())
