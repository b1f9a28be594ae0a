"""Refreshes: all lanes of all ranks add up what they saw, and agree on where the epoch ends."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

import numpy as np

from slap_stream.core.linear import single_threaded
from slap_stream.core.saved import Saved
from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import ConfigError, ExchangeError, FeedbackError
from slap_stream.selection.lane import Lane
from slap_stream.selection.schedule import LanePlan
from slap_stream.selection.shared import Shared, StatisticsLayout, sum_in_order
from slap_stream.types import FloatArray, IntArray, LaneExchange, Position, State

logger = logging.getLogger(__name__)

# Stands in a state for a step that nothing is known of.
NONE = -1
# Stands in what ranks are told for what has gone wrong.
_FAILED = "failed"


class Refreshes:
    """Adds up what this rank's lanes and all others have counted, and has the lanes go on from it.

    Withdrawals differ from lane to lane, and ranks hear of each other here only: so it is here that
    they agree on an epoch's last step. As a rule that is the planned one, or later.

    State: the last step that was agreed on, when that was, and how many epochs were cut short.

    Args:
        plan: How the run is cut.
        shared: What the lanes share.
        lanes: This rank's lanes.
        world_size: Ranks.
        exchange: Who adds up over all ranks; None: `merge` is given everybody's statistics.
    """

    def __init__(
        self,
        plan: LanePlan,
        shared: Shared,
        lanes: Sequence[Lane],
        *,
        world_size: int,
        exchange: LaneExchange | None,
    ) -> None:
        self._plan, self._shared, self._lanes = plan, shared, lanes
        self._world_size, self._exchange = world_size, exchange
        self._every = plan.config.probe_every
        self._layout = StatisticsLayout(lanes[0].statistics())
        # Of the batches composed since the last refresh; tells replicas that have parted.
        self._digest = 0
        # Batches of this epoch, where withdrawals have left less than was planned.
        self._last_step: int | None = None
        # Step of this epoch before which the last refresh was.
        self._before: int | None = None
        self.epochs_cut_short = 0

    def due(self, step: int) -> bool:
        """Whether a refresh is due before this step, counted in the epoch, and has not been."""
        return step > 0 and step % self._every == 0 and step != self._before

    def statistics(self) -> list[State]:
        """As `SlapSampler.statistics`."""
        return [
            {**lane.statistics(), "last_step": self._last_step_of(lane)} for lane in self._lanes
        ]

    def merge(self, statistics_in_lane_order: Sequence[State]) -> None:
        """As `SlapSampler.merge`."""
        states = statistics_in_lane_order
        try:
            lanes = [int(state["lane"]) for state in states]
            rows = [np.asarray_chkfinite(self._layout.pack(state)) for state in states]
            steps = [int(state["last_step"]) for state in states]
        except (KeyError, TypeError, ValueError) as error:
            raise FeedbackError(
                "statistics_in_lane_order must hold what statistics() gives, got something else: "
                f"{type(error).__name__}: {error}; gather them whole."
            ) from error
        if lanes != list(range(self._plan.num_lanes)):
            raise FeedbackError(
                f"statistics_in_lane_order must hold lanes 0 to {self._plan.num_lanes - 1} once "
                f"each, in order, got {lanes[:8]}; gather them over all ranks."
            )
        self._learn(sum_in_order(np.stack(rows)))
        self._go_on(min(steps))

    def refresh(self, also: FloatArray | None = None) -> FloatArray:
        """As `SlapSampler.refresh`: one rank learns from the sums, and tells the others what has
        come out."""
        rows = np.stack([self._layout.pack(lane.statistics()) for lane in self._lanes])
        if also is not None:
            rows = np.concatenate([rows, also], axis=1)
        last_step = min(map(self._last_step_of, self._lanes))
        if self._exchange is not None:
            progress = self._lanes[0].progress
            position = Position(epoch=progress.epoch, step=progress.step, digest=self._digest)
            total, last_step = self._exchange.sum_lanes(rows, last_step, position)
            lesson = self._learn_and_tell(self._exchange, total, position)
        elif self._world_size == 1:
            lesson = self._learn(sum_in_order(rows))
        else:
            raise ConfigError(
                f"a sampler of {self._world_size} ranks must be refreshed by merge, got no call of "
                "it; gather statistics() of all ranks, every probe_every batches."
            )
        self._go_on(last_step)
        found: FloatArray = lesson["also"]
        return found

    def _learn_and_tell(
        self, exchange: LaneExchange, total: FloatArray | None, position: Position
    ) -> State:
        """Learn from the sums, or be told by the rank that was given them, what has come out."""
        failure: Exception | None = None
        lesson: State = {}
        if total is not None:
            try:
                lesson = self._learn(total)
            except Exception as error:
                # The others wait to be told, whatever it is.
                failure, lesson = error, {_FAILED: f"{type(error).__name__}: {error}"}
        told = exchange.tell(None if total is None else to_bytes(lesson), position)
        if total is None:
            lesson = from_bytes(told)
        if _FAILED in lesson:
            raise ExchangeError(
                f"rank 0 must learn from the sums at epoch {position.epoch}, step {position.step}, "
                f"got {lesson[_FAILED]}; start all ranks again from the last checkpoint."
            ) from failure
        if total is None:
            self._shared.follow(lesson)
        return lesson

    def _learn(self, total: FloatArray) -> State:
        """Learn from sums over all lanes; what the other ranks have to be told."""
        sums = self._layout.unpack(total[: self._layout.size])
        with single_threaded():
            self._shared.learn(sums)
            return {**self._shared.lesson(sums), "also": total[self._layout.size :]}

    def _last_step_of(self, lane: Lane) -> int:
        """Batches of this epoch that the lane can fill, as far as is known now."""
        stock = len(lane.pool) + lane.intake.fillable
        return lane.progress.step + stock // self._plan.batch_size

    def _go_on(self, last_step: int) -> None:
        """Have the lanes go on from what has just been learnt."""
        with single_threaded():
            for lane in self._lanes:
                lane.refresh()
        self._digest = 0
        self._before = self._lanes[-1].progress.step
        self._last_step = last_step
        self._end_where_agreed()

    def start_epoch(self) -> None:
        """Another epoch begins, of which nothing is agreed on yet."""
        self._last_step = self._before = None

    def after_batch(self, ids: IntArray) -> None:
        """This rank has composed a batch, of (batch_size,) ids; it may be the epoch's last."""
        self._digest = zlib.crc32(ids.tobytes(), self._digest)
        self._end_where_agreed()

    def _end_where_agreed(self) -> None:
        """End the epoch after the last batch that all lanes can fill."""
        progress = self._lanes[0].progress
        if progress.over or self._last_step is None or progress.step < self._last_step:
            return
        self.epochs_cut_short += 1
        logger.warning(
            "epoch %d ends after %d batches, %.0f %% of it: too many candidates were withdrawn.",
            progress.epoch,
            progress.step,
            100 * self._plan.done(progress.step, progress.part),
        )
        for lane in self._lanes:
            lane.progress.over = True

    def state_dict(self) -> State:
        """What was agreed on; only reads."""
        return {
            "cut_short": self.epochs_cut_short,
            "last_step": NONE if self._last_step is None else self._last_step,
            "refreshed_before": NONE if self._before is None else self._before,
        }

    def load_state_dict(self, state: Saved) -> None:
        """Take over a saved state."""
        self.epochs_cut_short = state.whole("cut_short")
        last_step, before = (
            state.whole(name, least=NONE) for name in ("last_step", "refreshed_before")
        )
        self._last_step = None if last_step == NONE else last_step
        self._before = None if before == NONE else before
