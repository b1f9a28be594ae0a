"""Learning rates that follow the data: with keep="auto" fewer steps come than were planned for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slap_stream.errors import StateError
from slap_stream.types import State

_STEPPED = "slap_stream_steps"


def planned_steps(done: float, max_steps: int) -> int:
    """Steps after which as much of the data was planned to be done; a part of a step is one.

    Step k of n steps that come is thus taken at the rate planned for a share of (k - 1) / n.
    """
    # Shares such as 7 / 25 are not exact, and must not count as a step more: the last step of all
    # would be taken at the rate of the end, which is mostly zero.
    return math.ceil(round(done * max_steps, 6))


class DataSchedule:
    """A scheduler that is stepped to where it was planned to be after as much of the data.

    That takes several of its steps at once, or none. To set its count instead would be right only
    for a rate that is a function of the count: many make each rate of the one before.

    State: the scheduler's own, and how often it was stepped; that may be less than `planned` says,
    after an optimizer step that was skipped.

    Args:
        scheduler: Any that is stepped without a metric. All but `step` and the state is its own.
        planned: Steps after which as much of the data as is done was planned to be done.
    """

    def __init__(self, scheduler: Any, planned: Callable[[], int]) -> None:
        self.scheduler = scheduler
        self._planned = planned
        self._stepped = 0

    def step(self) -> None:
        """An optimizer step has been taken."""
        while self._stepped < self._planned():
            self.scheduler.step()
            self._stepped += 1

    def state_dict(self) -> State:
        """Of the scheduler, which could go on from it alone, and our count."""
        return {**self.scheduler.state_dict(), _STEPPED: self._stepped}

    def load_state_dict(self, state: State) -> None:
        """Take over a saved state.

        Raises:
            StateError: If it is of a scheduler that did not follow the data.
        """
        if _STEPPED not in state:
            raise StateError(
                'scheduler.pt must be of a run whose schedule followed the data (keep="auto" and '
                "no max_steps), got one of another; resume with the settings it was saved with."
            )
        self.scheduler.load_state_dict({k: v for k, v in state.items() if k != _STEPPED})
        self._stepped = int(state[_STEPPED])

    def __getattr__(self, name: str) -> Any:
        # Copies are made without a constructor, and ask for names before there is a scheduler.
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)
