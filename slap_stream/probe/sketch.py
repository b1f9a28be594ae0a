"""TensorSketch of sums of outer products, without ever making an outer product.

A sample's gradient of the output head is sum_t d_t (x) h_t over its tokens: (vocabulary, hidden)
numbers, far too many to keep. Its sketch is `dim` numbers, linear in the gradient, whose inner
products are unbiased estimates of the inner products of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slap_stream.core.rng import Purpose, generator

# Counters that keep our draws apart from other draws made for the probe.
_LEFT_SIGNS, _RIGHT_SIGNS, _RIGHT_BUCKETS = 101, 102, 103


class TensorSketch:
    """A fixed random linear map from (left_dim, right_dim) matrices to `dim` numbers.

    CountSketch of either side, multiplied in the Fourier domain, summed over tokens there, and
    brought back by one inverse FFT per sample. It has no state but its draws, which are a function
    of the seed: every rank and every resumed run makes the same map.

    The signs alone make inner products unbiased, so buckets may be chosen freely. On the left
    (vocabulary) a bucket is id mod dim: tokenizers number tokens by frequency, so the heavy ones
    do not meet in a bucket, and sums over buckets are sums over a reshaped axis: no scatter, the
    same result on every run. On the right (hidden) buckets are drawn without replacement, as many
    of each as possible: up to `dim` hidden units never meet at all. (In order, as on the left,
    they would not do: neighbours of a token would meet the neighbours of a hidden unit.)

    Reference: Pham and Pagh, KDD 2013. Departure: balanced buckets instead of hashed ones.
    """

    def __init__(
        self, left_dim: int, right_dim: int, dim: int, *, seed: int, device: torch.device
    ) -> None:
        """Draw the map.

        Args:
            left_dim: Rows of the sketched matrices (vocabulary).
            right_dim: Columns of the sketched matrices (hidden).
            dim: Length of a sketch.
            seed: Seed of the run.
            device: Where sketches are made.

        Raises:
            ValueError: If a dimension is not positive.
        """
        for name, value in (("left_dim", left_dim), ("right_dim", right_dim), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        self.shape = (left_dim, right_dim)
        self.dim = dim

        def signs(purpose: int, size: int) -> Tensor:
            draw = generator(seed, Purpose.SKETCH, purpose).integers(0, 2, size=size)
            return torch.as_tensor(2 * draw - 1, dtype=torch.float32, device=device)

        self.left_signs = signs(_LEFT_SIGNS, left_dim)  # (left_dim,)
        self.right_signs = signs(_RIGHT_SIGNS, right_dim)  # (right_dim,)
        self._rounds = -(-right_dim // dim)
        places = generator(seed, Purpose.SKETCH, _RIGHT_BUCKETS).permutation(self._rounds * dim)
        # (right_dim,) distinct, in [0, rounds * dim): the bucket is the place modulo dim.
        self.right_places = torch.as_tensor(places[:right_dim], dtype=torch.int64, device=device)

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        weights: Tensor,
        *,
        left_scale: Tensor | None = None,
        right_scale: Tensor | None = None,
    ) -> Tensor:
        """Sketch weighted sums of scaled outer products.

        Sample i is sum_t weights[i, t] (left_scale * left_t) (x) (right_scale * right_t).

        Args:
            left: (tokens, left_dim) float32; every entry finite. Overwritten.
            right: (tokens, right_dim) float32; every entry finite.
            weights: (samples, tokens) float32.
            left_scale: (left_dim,) float32; None: ones.
            right_scale: (right_dim,) float32; None: ones.

        Returns:
            (samples, dim // 2 + 1) complex64 sketches in the Fourier domain, where sketches of
            several blocks of tokens may be added; `finish` brings the sum back.
        """
        left_signs = self.left_signs if left_scale is None else self.left_signs * left_scale
        right_signs = self.right_signs if right_scale is None else self.right_signs * right_scale
        left_buckets = _fold(left.mul_(left_signs), self.dim)
        spread = right.new_zeros(len(right), self._rounds * self.dim)
        spread.index_copy_(1, self.right_places, right * right_signs)
        right_buckets = _fold(spread, self.dim)
        product = torch.fft.rfft(left_buckets).mul_(torch.fft.rfft(right_buckets))
        # A product with the weights, not a scatter-add: the same sum on every run, also on GPUs.
        spectrum: Tensor = weights.to(product.dtype) @ product
        return spectrum

    def finish(self, spectrum: Tensor) -> Tensor:
        """(samples, dim // 2 + 1) complex64 spectra to (samples, dim) float32 sketches."""
        sketches: Tensor = torch.fft.irfft(spectrum, n=self.dim)
        return sketches


def _fold(values: Tensor, dim: int) -> Tensor:
    """(tokens, width) to (tokens, dim): the sum of the columns that are equal modulo dim."""
    tokens, width = values.shape
    whole = width // dim * dim
    if whole == width:
        return values.view(tokens, width // dim, dim).sum(1)  # (tokens, rounds, dim)
    folded = values.new_zeros(tokens, dim)
    if whole:
        folded += values[:, :whole].reshape(tokens, whole // dim, dim).sum(1)
    folded[:, : width - whole] += values[:, whole:]
    return folded
