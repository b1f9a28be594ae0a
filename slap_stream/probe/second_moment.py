"""The factored second moment of the output head's gradient: our approximation of its Hessian.

v (vocabulary, hidden) is kept as its row means and column means, v ~ rows (x) cols / mean, as
Adafactor does. The preconditioner is Adam's, 1 / sqrt(v), of the damped and scaled moment

    P = ((rows / mean + 1) (x) (cols / mean + 1)) ** -1/2,

damped by the mean because an undamped one is ruled by rare tokens, and free of the scale of v, so
that sketches do not jump when v comes from another source. P splits into one factor per side:
`left` and `right` are the factors of P ** 1/2.

Reference: Adafactor (Shazeer and Stern, ICML 2018) for the factors; the damping is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slap_stream.core.saved import Saved
from slap_stream.errors import StateError
from slap_stream.types import Float32Array, FloatArray, State

_LOG = logging.getLogger(__name__)


def read_factors(
    state: Saved, shape: tuple[int, int] | None
) -> tuple[Float32Array, Float32Array, float]:
    """Saved sums of rows and columns of an estimate, and their weight.

    Args:
        state: What `SecondMoment.state_dict` gave.
        shape: (vocabulary, hidden) of the head; None: of any.

    Raises:
        StateError: If it was damaged or is of a head of another shape.
    """
    rows, cols = state.numbers32("rows", None), state.numbers32("cols", None)
    if shape not in (None, (len(rows), len(cols))):
        raise StateError(
            f"{state.path} must be of a head of shape {shape}, got factors of shapes "
            f"{rows.shape} and {cols.shape}; the state belongs to another model, or was cut."
        )
    return rows, cols, state.number("total", least=0.0)


class HasState(Protocol):
    """An optimizer, or a wrapper of one: per-parameter state by the parameter itself."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """State of each parameter."""
        ...


class SecondMoment:
    """Where the second moment comes from, and its two factors.

    With an optimizer whose state knows the head's weight, from there (for a tied head this is the
    state of the shared weight, which is what the optimizer itself divides by). Else a decayed
    Gauss-Newton estimate from the tokens the probe reads; the change of source is logged.

    State: decayed sums of rows and columns of the Gauss-Newton estimate, and their weight.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        decay: float,
        device: torch.device,
        weight: nn.Parameter | None = None,
        optimizer: HasState | None = None,
    ) -> None:
        """Start without any estimate.

        Args:
            shape: (vocabulary, hidden) of the head.
            decay: Factor on the old Gauss-Newton estimate at every update, in (0, 1].
            device: Where the factors are needed.
            weight: The head's own weight, to look up in the optimizer.
            optimizer: Optimizer that trains the model; None: always the Gauss-Newton estimate.
        """
        self.shape = shape
        self.decay = decay
        self.device = device
        self.from_optimizer = False
        self._weight = weight
        self._optimizer = optimizer
        self._reported: str | None = ""  # nothing yet; None: the optimizer
        self._rows = torch.zeros(shape[0], dtype=torch.float32, device=device)
        self._cols = torch.zeros(shape[1], dtype=torch.float32, device=device)
        self._total = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors of the square root of the preconditioner, from the best source there is now.

        Returns:
            left (vocabulary,) and right (hidden,), float32, in (0, 1]; ones while nothing is known.
        """
        found, reason = self._from_optimizer()
        self.from_optimizer = found is not None
        self._report(reason)
        rows, cols = found if found is not None else (self._rows, self._cols)
        mean = rows.mean()
        if not mean > 0:
            return torch.ones_like(self._rows), torch.ones_like(self._cols)
        return (rows / mean + 1.0).pow_(-0.25), (cols / mean + 1.0).pow_(-0.25)

    def update(self, seen: FloatArray) -> None:
        """Add one step's Gauss-Newton sums; used only while the optimizer cannot tell.

        Args:
            seen: (vocabulary + hidden + 1,) sum over tokens of the diagonal, averaged over hidden
                units; the same, averaged over the vocabulary; and the tokens. Empty: nothing.
        """
        if not len(seen) or not seen[-1]:
            return
        sums = torch.from_numpy(seen[:-1].astype(np.float32)).to(self.device) / float(seen[-1])
        rows, cols = torch.split(sums, list(self.shape))
        self._rows.mul_(self.decay).add_(rows)
        self._cols.mul_(self.decay).add_(cols)
        self._total = self._total * self.decay + 1.0

    def state_dict(self) -> State:
        """Plain arrays of the estimate."""
        return {
            "rows": self._rows.cpu().numpy().copy(),
            "cols": self._cols.cpu().numpy().copy(),
            "total": self._total,
        }

    def load_state_dict(self, state: Saved) -> None:
        """Take over a saved estimate.

        Raises:
            StateError: If it was damaged or is of a head of another shape; nothing has changed
                then.
        """
        rows, cols, total = read_factors(state, self.shape)
        self._rows = torch.tensor(rows, device=self.device)
        self._cols = torch.tensor(cols, device=self.device)
        self._total = total

    def _report(self, reason: str | None) -> None:
        if reason == self._reported:
            return
        self._reported = reason
        if reason is None:
            _LOG.info("second moment of the head: taken from the optimizer.")
            return
        # Without an optimizer, or before its first step, the estimate is what one would expect;
        # with one that has stepped it is a surprise.
        stepped = self._optimizer is not None and len(self._optimizer.state)
        level = logging.WARNING if stepped else logging.INFO
        _LOG.log(
            level,
            "second moment of the head: decayed Gauss-Newton estimate from the probe, because %s.",
            reason,
        )

    def _from_optimizer(self) -> tuple[tuple[Tensor, Tensor] | None, str | None]:
        """Row and column means, or why there are none."""
        if self._optimizer is None:
            return None, "no optimizer was handed over"
        if self._weight is None:
            return None, "the head has no weight of its own"
        state = self._optimizer.state.get(self._weight)
        if not state:
            trained = "has no state yet" if self._weight.requires_grad else "is not trained"
            return None, f"the head's weight {trained} in the optimizer"
        rows = cols = None
        for full in ("exp_avg_sq", "variance"):
            if isinstance(state.get(full), Tensor) and state[full].shape == self.shape:
                rows, cols = state[full].float().mean(1), state[full].float().mean(0)
        for row_key, col_key in (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var")):
            if isinstance(state.get(row_key), Tensor) and isinstance(state.get(col_key), Tensor):
                rows, cols = state[row_key].float().flatten(), state[col_key].float().flatten()
        if rows is None or cols is None or (len(rows), len(cols)) != self.shape:
            keys = ", ".join(sorted(str(key) for key in state))
            return None, f"the optimizer keeps no second moment of the head that we know ({keys})"
        rows, cols = _whole(rows).to(self.device), _whole(cols).to(self.device)
        if not bool(torch.isfinite(rows).all() & torch.isfinite(cols).all()):
            return None, "the optimizer's second moment of the head is not finite"
        return (rows, cols), None


def _whole(values: Tensor) -> Tensor:
    # A sharded (FSDP2) state gives a sharded mean; every rank asks for it at the same step.
    gather = getattr(values, "full_tensor", None)
    return gather() if gather is not None else values
