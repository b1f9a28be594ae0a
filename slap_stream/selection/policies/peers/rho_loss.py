"""RHO-LOSS: highest loss beyond that of a reference model."""

from __future__ import annotations

from slap_stream.selection.policies.base import PoolView, SlidingPolicy, top, unmeasured
from slap_stream.types import IntArray


class RhoLoss(SlidingPolicy):
    """Trains on what is learnable and not yet learnt: the largest loss minus reference loss.

    Reference: Mindermann et al., "Prioritized training on points that are learnable, worth
        learning, and not yet learnt", ICML 2022 (arXiv:2206.07137). The reference model's losses
        are the store's feature column `reference_loss`. Departure: with a `probe_fraction` below 1
        a predicted loss stands in for one that was not measured; with 1 each candidate waits until
        it was measured, as there.
    """

    needs = frozenset({"losses", "reference_loss"})
    waits_for_losses = True
    measures_all = True

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The highest reducible losses, over all strata."""
        reducible = view.loss - view.reference_loss()
        return top(reducible, view, int(quota.sum()), last=unmeasured(view, self.config))
