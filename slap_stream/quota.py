"""How many slots of a batch each stratum gets, and how many of its candidates are pruned."""

from __future__ import annotations

from slap_stream.choosing import fill_largest
from slap_stream.types import FloatArray, IntArray


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
