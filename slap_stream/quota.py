"""How many slots of a batch each stratum gets."""

from __future__ import annotations

import numpy as np

from slap_stream.kernels import fill_largest
from slap_stream.types import IntArray


def apportion(offered: IntArray, trained: IntArray, stock: IntArray, slots: int) -> IntArray:
    """Give a batch's slots to the strata that are owed most.

    A stratum is owed its share of what was offered, times what will have been trained on after
    this batch, minus what was trained on from it. Working from totals rather than from the batch
    alone means that rounding never accumulates: at the end of an epoch a stratum is within about
    one sample of its share, stock permitting.

    Args:
        offered: (num_strata,) candidates offered so far this epoch.
        trained: (num_strata,) samples trained on so far this epoch.
        stock: (num_strata,) candidates at hand.
        slots: Samples in the lane batch.

    Returns:
        (num_strata,) quotas summing to `slots`.

    Raises:
        ValueError: If there is less stock than slots.
    """
    share = offered / max(1, int(offered.sum()))
    deficit = share * float(int(trained.sum()) + slots) - trained
    return fill_largest(deficit, stock, slots)


def apportion_pruning(
    trained: IntArray, pruned: IntArray, stock: IntArray, slots: int, *, ratio: float
) -> IntArray:
    """Give a step's pruning to the strata that were pruned least for what was trained.

    Args:
        trained: (num_strata,) samples trained on so far this epoch.
        pruned: (num_strata,) candidates pruned so far this epoch.
        stock: (num_strata,) candidates at hand.
        slots: Candidates to prune.
        ratio: Candidates pruned for each one trained, over the whole epoch.

    Returns:
        (num_strata,) candidates to prune, summing to `slots`.

    Raises:
        ValueError: If there is less stock than slots.
    """
    return fill_largest(np.asarray(trained * ratio - pruned, np.float64), stock, slots)
