"""Sketches: linear, the same everywhere, unbiased, and as exact as their length promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.probe.sketch import TensorSketch

CPU = torch.device("cpu")


def naive_sketch(sketch: TensorSketch, matrix: torch.Tensor) -> torch.Tensor:
    """(dim,) from the definition: entry (i, j) goes, signed, to bucket (i + place(j)) mod dim."""
    place = sketch.right_places
    made = torch.zeros(sketch.dim, dtype=torch.float64)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            sign = sketch.left_signs[i] * sketch.right_signs[j]
            made[(i + int(place[j])) % sketch.dim] += float(sign * matrix[i, j])
    return made


@settings(max_examples=30, deadline=None)
@given(
    left_dim=st.integers(1, 40),
    right_dim=st.integers(1, 24),
    dim=st.sampled_from([16, 32]),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_equals_its_definition_for_any_shape(left_dim, right_dim, dim, tokens, seed):
    draws = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, left_dim, generator=draws)
    right = torch.randn(tokens, right_dim, generator=draws)
    weights = torch.rand(2, tokens, generator=draws)
    scales = torch.rand(left_dim, generator=draws), torch.rand(right_dim, generator=draws)
    sketch = TensorSketch(left_dim, right_dim, dim, seed=seed, device=CPU)
    made = sketch.finish(
        sketch(left.clone(), right, weights, left_scale=scales[0], right_scale=scales[1])
    )
    for sample in range(2):
        matrix = torch.einsum("t,ti,tj->ij", weights[sample], left * scales[0], right * scales[1])
        expected = naive_sketch(sketch, matrix)
        assert torch.allclose(made[sample].double(), expected, atol=1e-4)


def test_blocks_of_tokens_add_up_in_the_fourier_domain():
    left, right, weights = torch.randn(7, 50), torch.randn(7, 9), torch.rand(3, 7)
    sketch = TensorSketch(50, 9, 16, seed=1, device=CPU)
    whole = sketch.finish(sketch(left.clone(), right, weights))
    parts = sum(
        sketch(left[rows].clone(), right[rows], weights[:, rows])
        for rows in (slice(0, 3), slice(3, 7))
    )
    assert torch.allclose(sketch.finish(parts), whole, atol=1e-5)


def test_inner_products_are_unbiased():
    """Mean over 400 seeds within 4 standard errors: one false alarm in 16,000 seeds chosen."""
    draws = torch.Generator().manual_seed(3)
    left = torch.randn(2, 30, generator=draws).double()
    right = torch.randn(2, 20, generator=draws).double()
    exact = float((left[0] @ left[1]) * (right[0] @ right[1]))
    made = []
    for seed in range(400):
        sketch = TensorSketch(30, 20, 32, seed=seed, device=CPU)
        both = sketch.finish(sketch(left.float().clone(), right.float(), torch.eye(2))).double()
        made.append(float(both[0] @ both[1]))
    error = np.std(made) / np.sqrt(len(made))
    assert abs(np.mean(made) - exact) < 4 * error


def test_hidden_units_meet_as_rarely_as_possible():
    for right_dim in (5, 16, 40):
        sketch = TensorSketch(8, right_dim, 16, seed=2, device=CPU)
        met = torch.bincount(sketch.right_places % 16)
        assert int(met.max()) <= -(-right_dim // 16)
        assert len(sketch.right_places.unique()) == right_dim


@pytest.mark.parametrize("left_dim", [30, 500, 3000])
@pytest.mark.parametrize("dim", [64, 256, 1024])
def test_error_shrinks_with_the_root_of_the_length(dim, left_dim):
    """Relative to the norms, the error of an inner product is about 1 / sqrt(dim); stated: 1.5."""
    draws = torch.Generator().manual_seed(4)
    left = torch.randn(40, left_dim, generator=draws) * torch.linspace(3, 0.1, left_dim)
    right = torch.randn(40, 64, generator=draws)
    weights = torch.eye(20).repeat_interleave(2, 1)  # two tokens a sample
    exact = torch.einsum("st,ti,tj->sij", weights, left, right).flatten(1)
    sketch = TensorSketch(left_dim, 64, dim, seed=5, device=CPU)
    made = sketch.finish(sketch(left.clone(), right, weights))
    norms = exact.norm(dim=1)
    error = (made @ made.T - exact @ exact.T) / (norms[:, None] * norms[None])
    off = ~torch.eye(20, dtype=torch.bool)
    assert float(error[off].square().mean().sqrt()) < 1.5 / dim**0.5


def test_same_seed_same_map_and_another_seed_another():
    first, again, other = (TensorSketch(64, 8, 16, seed=s, device=CPU) for s in (1, 1, 2))
    assert torch.equal(first.left_signs, again.left_signs)
    assert torch.equal(first.right_places, again.right_places)
    assert not torch.equal(first.left_signs, other.left_signs)


def test_refuses_a_dimension_that_is_not_positive():
    with pytest.raises(ValueError, match="right_dim must be positive, got 0"):
        TensorSketch(4, 0, 16, seed=0, device=CPU)
