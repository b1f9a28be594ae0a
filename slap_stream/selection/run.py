"""A rank's lanes and what they share, in one piece: made aside, loaded, only then taken over."""

from __future__ import annotations

from collections.abc import Sequence

from slap_stream.core.saved import Saved
from slap_stream.selection.lane import Lane
from slap_stream.selection.policies.base import Policy
from slap_stream.selection.refresh import Refreshes
from slap_stream.selection.schedule import LanePlan
from slap_stream.selection.shared import Shared
from slap_stream.types import LaneExchange, ShardGate, State


class Run:
    """The lanes of a rank, and what they share, at the start of the first epoch.

    The arguments that are not named here are those of `SlapSampler`.

    Args:
        plan: How the run is cut.
        policy: Rule that picks a batch.

    Attributes:
        plan: The same.
        shared: What the lanes of all ranks share.
        lanes: This rank's lanes.
        refreshes: Adds up over all lanes.
    """

    def __init__(
        self,
        plan: LanePlan,
        policy: Policy,
        *,
        rank: int,
        world_size: int,
        gate: ShardGate | None,
        exchange: LaneExchange | None,
    ) -> None:
        self.plan, self._policy, self.shared = plan, policy, Shared(plan)
        each = plan.num_lanes // world_size
        mine = range(rank * each, (rank + 1) * each)
        self.lanes = [Lane(index, plan, policy, self.shared, gate) for index in mine]
        self.refreshes = Refreshes(
            plan, self.shared, self.lanes, world_size=world_size, exchange=exchange
        )

    def seed(self) -> None:
        """Place the centroids, and guess what is worth keeping, from lane 0's first block on every
        rank: all share them."""
        first = self.lanes[0]
        if first.index:
            first = Lane(0, self.plan, self._policy, self.shared)
        self.shared.seed(first.intake.first_rows(), weighs="evidence" in self._policy.needs)

    def state_dict(self) -> State:
        """All of it; only reads."""
        return {
            "shared": self.shared.state_dict(),
            "refreshes": self.refreshes.state_dict(),
            "lanes": [lane.state_dict() for lane in self.lanes],
        }

    def load_state_dict(self, state: Saved, lanes: Sequence[Saved]) -> None:
        """Take over a saved state, of which these are the parts of this rank's lanes.

        Raises:
            StateError: If it does not fit; the run is then of no use any more.
            ShardError: If a shard that the state needs cannot be fetched.
        """
        # First model and strata, through which the lanes look at their candidates.
        self.shared.load_state_dict(state.part("shared"))
        self.refreshes.load_state_dict(state.part("refreshes"))
        for lane, part in zip(self.lanes, lanes, strict=True):
            lane.load_state_dict(part)
