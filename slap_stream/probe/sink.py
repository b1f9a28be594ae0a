"""Where token gradients go: sums of them as sketches, and the second moment's next update."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from slap_stream.probe.second_moment import SecondMoment
from slap_stream.probe.sketch import TensorSketch
from slap_stream.types import FloatArray


class GradientSink:
    """Turns blocks of token gradients into sketches, and into the second moment's next update.

    One preconditioner serves everything, so that the sketches of one step can be compared: a step
    makes a new sink.
    """

    def __init__(self, sketch: TensorSketch, moment: SecondMoment) -> None:
        """Ask for the preconditioner as it is now."""
        self._sketch = sketch
        self._moment = moment
        self._left, self._right = moment.factors()
        self._rows = torch.zeros_like(self._left)
        self._cols = torch.zeros_like(self._right)
        self._tokens = 0
        self._spectrum: Tensor | None = None

    @property
    def wants_curvature(self) -> bool:
        """Whether the second moment is the probe's own to estimate."""
        return not self._moment.from_optimizer

    def add(
        self, left: Tensor, right: Tensor, weights: Tensor, curvature: Tensor | None = None
    ) -> None:
        """Take one block of tokens.

        Args:
            left: (tokens, vocabulary) float32 gradients d_t, finite. Overwritten.
            right: (tokens, hidden) float32 inputs of the head h_t, finite.
            weights: (samples, tokens) float32 weight of each token in each sample's gradient.
            curvature: (tokens, vocabulary) diagonal of the loss's curvature in what left the head;
                None: not wanted. Its products with h_t ** 2 are the Gauss-Newton diagonal.
        """
        if curvature is not None:
            squares = right.square()
            self._rows += squares.mean(1) @ curvature
            self._cols += curvature.mean(1) @ squares
            self._tokens += len(left)
        spectrum = self._sketch(
            left, right, weights, left_scale=self._left, right_scale=self._right
        )
        self._spectrum = spectrum if self._spectrum is None else self._spectrum + spectrum

    def mark(self) -> Callable[[], None]:
        """Remember what was added so far; what is returned takes back all that comes after it.

        Sketches must have been taken.
        """
        rows, cols, tokens = self._rows.clone(), self._cols.clone(), self._tokens

        def undo() -> None:
            self._rows.copy_(rows)
            self._cols.copy_(cols)
            self._tokens, self._spectrum = tokens, None

        return undo

    def take(self, samples: int) -> Tensor:
        """(samples, dim) float32 sketches of what was added since the last call."""
        spectrum, self._spectrum = self._spectrum, None
        if spectrum is None:  # not one supervised token
            return self._left.new_zeros(samples, self._sketch.dim)
        return self._sketch.finish(spectrum)

    def take_curvature(self) -> FloatArray:
        """Curvature seen since the last call: the Gauss-Newton sums and their tokens.

        Returns:
            (vocabulary + hidden + 1,) float64, as `SecondMoment.update` takes them; empty if the
            optimizer knows better.
        """
        if not self.wants_curvature:
            return np.zeros(0)
        seen = torch.cat([self._rows, self._cols]).cpu().numpy().astype(np.float64)
        taken: FloatArray = np.append(seen, float(self._tokens))
        self._rows.zero_()
        self._cols.zero_()
        self._tokens = 0
        return taken
