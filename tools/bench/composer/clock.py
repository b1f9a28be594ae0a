"""A clock around the methods that compose."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from slap_stream import SlapSampler


class Clock:
    """CPU seconds that named parts take, each without the parts inside it.

    Attributes:
        seconds: Seconds by part.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        # Seconds of the parts inside each part that is running.
        self._inside: list[float] = []

    def time(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed as this part."""

        @wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            begin = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                took = time.thread_time() - begin
                self.seconds[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return timed

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Time a method of one object from now on."""
        setattr(owner, method, self.time(part, getattr(owner, method)))


def watch_sampler(clock: Clock, sampler: SlapSampler) -> None:
    """Time the parts of a sampler's lanes, and of its refreshes."""
    clock.watch(sampler._refreshes, "refresh", "refresh: other")
    clock.watch(sampler, "observe", "feedback: observe")
    clock.watch(sampler, "update", "feedback: update")
    clock.watch(sampler._shared.model, "refresh", "refresh: regression and metric solved")
    clock.watch(sampler._policy, "select", "choose: shortlist and greedy composition")
    for lane in sampler.lanes:
        clock.watch(lane, "statistics", "refresh: sums over the answers")
        clock.watch(lane.feedback, "take_trained", "feedback: observe")
        clock.watch(lane.feedback, "take_probed", "feedback: update")
        clock.watch(lane._composer, "choose_probes", "feedback: who is probed")
        clock.watch(
            lane._composer, "_compare_with_uniform", "refresh: a batch beside a uniform one"
        )
        clock.watch(lane, "refresh", "refresh: pool scored anew")
        clock.watch(lane, "prepare", "other")
        clock.watch(lane, "_offer", "offer: strata, sums for centroids, place in the pool")
        clock.watch(lane.intake, "take", "offer: design rows")
        clock.watch(lane.intake, "_open", "offer: a block opened and read")
        clock.watch(lane.pool, "offer", "offer: strata, sums for centroids, place in the pool")
        clock.watch(lane, "_train", "train: book the batch")
        clock.watch(lane._scorer, "bring_near", "train: copies of the batch in the pool")
        clock.watch(lane._composer, "choose", "choose: quotas")
        clock.watch(lane._composer, "leaving", "drop: who leaves untrained")
        clock.watch(lane._scorer, "score", "offer: score")
