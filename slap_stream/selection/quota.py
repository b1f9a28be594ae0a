"""What is kept: as configured or as found out, and how slots are shared among strata."""

from __future__ import annotations

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.saved import Saved
from slap_stream.selection.batch_kernels import fill_largest
from slap_stream.types import FloatArray, IntArray, State

# Most that odds are raised by, as a logarithm, and how often the interval of it is halved.
_MOST_RAISED, _HALVINGS = 12.0, 40


def raised(probability: FloatArray, factor: float) -> FloatArray:
    """(n,) probabilities whose odds are so many times as high."""
    part = factor * probability
    higher: FloatArray = part / (1.0 - probability + part)
    return higher


class Keep:
    """The fraction that is kept: as configured, or what is not shown to be dispensable.

    State: how many candidates have left the lanes lately, and how many of them were worth keeping.

    Attributes:
        value: The fraction now in force; one for all lanes.
        leniency: Factor on the odds of being of a target set's kind. It is above one where more is
            kept than is of that kind, so that what is next likeliest goes before all else.
    """

    def __init__(self, config: SlapConfig) -> None:
        self._config = config
        self._worth = self._count = 0.0
        self.leniency = 1.0
        self.value = 1.0 if config.keep == "auto" else float(config.keep)

    @property
    def dispensable(self) -> float:
        """Share of the candidates lately that was held dispensable."""
        return 1.0 - self._worth / self._count if self._count else 0.0

    def guess(self, worth: float) -> None:
        """Begin with this mean worth of a candidate, until some have left."""
        if self._config.keep == "auto":
            self.value = float(np.clip(worth, self._config.keep_min, 1.0))

    def aim(self, relevance: FloatArray, fit: FloatArray) -> None:
        """Raise the odds of being of a target set's kind until as much is worth keeping as is kept.

        "auto" keeps more than is of the kind where it may keep no less. Done once, whatever a
        fraction that is found out later comes to.

        Args:
            relevance: (n,) probabilities of being of that kind.
            fit: (n,) worth apart from that.
        """
        worth = float(np.mean(relevance * fit))
        self.guess(worth)
        if worth >= self.value:
            return
        least, most = 0.0, _MOST_RAISED
        for _ in range(_HALVINGS):
            middle = (least + most) / 2.0
            if np.mean(raised(relevance, np.exp(middle)) * fit) < self.value:
                least = middle
            else:
                most = middle
        self.leniency = float(np.exp(least))

    def plain(self, worth: FloatArray, unrelated: FloatArray) -> FloatArray:
        """(n,) worth with the odds as they were: what is dispensable does not follow what is kept.

        With r = 1 - unrelated and p the same before it was raised: p / r = 1 / (r + f (1 - r)),
        f being the leniency.

        Args:
            worth: (n,) worth, with odds that are raised.
            unrelated: (n,) probability not to be of the target set's kind, likewise.
        """
        lower: FloatArray = worth / (1.0 + (self.leniency - 1.0) * unrelated)
        return lower

    def refresh(self, worth: float, count: float) -> None:
        """Take in the sum of the worth of so many candidates that left since the last refresh."""
        self._worth = self._worth * self._config.advanced.decay + worth
        self._count = self._count * self._config.advanced.decay + count
        if self._config.keep == "auto" and self._count:
            self.value = float(np.clip(1.0 - self.dispensable, self._config.keep_min, 1.0))

    def state_dict(self) -> State:
        """Sums and the fraction."""
        return {
            "worth": self._worth,
            "count": self._count,
            "value": self.value,
            "leniency": self.leniency,
        }

    def load_state_dict(self, state: Saved) -> None:
        """Take over a saved state."""
        self._worth, self._count = (state.number(name, least=0.0) for name in ("worth", "count"))
        self.leniency = state.number("leniency", least=1.0)
        auto, keep_min = self._config.keep == "auto", self._config.keep_min
        self.value = state.number("value", least=keep_min if auto else self.value, most=1.0)


def claims_of(offered: IntArray, worth: FloatArray, keep: float) -> FloatArray:
    """How much of each stratum is to be trained on, up to a common factor.

    What is dispensable has no claim: a stratum of copies yields its slots to others. But no
    stratum claims more than was offered from it: where more is kept than is worth keeping, the
    rest is shared out in proportion to what was held dispensable.

    Args:
        offered: (num_strata,) candidates offered so far this epoch.
        worth: (num_strata,) sum over these of 1 - the probability of being dispensable.
        keep: Fraction of the candidates that is trained on.

    Returns:
        (num_strata,) claims, each between `worth` and `offered`; `offered` if nothing is
        dispensable.
    """
    dispensable = offered - worth
    total = float(dispensable.sum())
    pruned = (1.0 - keep) * float(offered.sum())
    return offered - dispensable * (min(1.0, pruned / total) if total > 0.0 else 1.0)


def apportion(
    claims: FloatArray | IntArray, had: IntArray, stock: IntArray, slots: int
) -> IntArray:
    """Give slots, in a batch or among what is pruned, to the strata that are owed most.

    A stratum is owed its share of the claims, times all slots given out after this, minus what it
    had. Working from totals rather than from the batch alone means that rounding never
    accumulates: at the end of an epoch a stratum is within about one sample of its share, stock
    permitting.

    Args:
        claims: (num_strata,) non-negative, any scale: what the strata have a right to.
        had: (num_strata,) slots given to each so far this epoch.
        stock: (num_strata,) candidates at hand.
        slots: Slots to give.

    Returns:
        (num_strata,) quotas summing to `slots`.

    Raises:
        ValueError: If there is less stock than slots.
    """
    share = claims / max(1e-12, float(claims.sum()))
    deficit = share * float(int(had.sum()) + slots) - had
    return fill_largest(deficit, stock, slots)
