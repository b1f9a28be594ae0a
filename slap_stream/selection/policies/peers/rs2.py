"""A fresh random subset in each epoch, without strata."""

from __future__ import annotations

from slap_stream.selection.policies.peers.subset import Subset


class RS2(Subset):
    """The subsets of successive epochs lie end to end on the circle of `Subset`.

    So they are drawn without replacement: nothing is trained on again before everything else was,
    but for a few candidates near the ends of an arc.

    Reference: Okanovic et al., "Repeated random sampling for minimizing the time-to-accuracy of
        learning", ICLR 2024 (arXiv:2305.18424), the variant without replacement. Departure: there
        the whole set is shuffled again once all of it was used; here its order on the circle stays.
    """

    def begins(self, epoch: int) -> float:
        """Where the arcs of the epochs before end."""
        return epoch * self.kept % 1.0
