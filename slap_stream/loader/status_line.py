"""One line of log, now and then, that says how a run gets on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class StatusLine:
    """Logs samples per second, what was kept and pruned, and what the probe cost, at INFO.

    Off unless somebody listens, as a library's log is: `logging.getLogger("slap_stream").setLevel(
    "INFO")` beside `logging.basicConfig()` switches it on.

    Holds when it last spoke, and the samples since.

    Args:
        seconds: Least time between two lines.
        clock: Seconds that only grow.
    """

    def __init__(
        self, seconds: float = SECONDS_BETWEEN_LINES, clock: Callable[[], float] = monotonic
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self.restart()

    def restart(self) -> None:
        """Begin anew: the time since, an evaluation say, was not spent on samples."""
        self._since, self._samples = self._clock(), 0

    def count(self, samples: int, progress: float, metrics: Callable[[], dict[str, float]]) -> None:
        """Note a batch that was delivered, and log a line if one is due.

        Args:
            samples: Samples in the batch.
            progress: Share of the epoch that is done, in [0, 1].
            metrics: The loader's; only called for a line.
        """
        self._samples += samples
        now = self._clock()
        if now - self._since < self._seconds or not logger.isEnabledFor(logging.INFO):
            return
        found = metrics()
        line = (
            f"epoch {round(found['epoch'] - progress)}, {progress:.0%}: "
            f"{self._samples / (now - self._since):,.0f} samples/s, "
            f"{found['trained']:,.0f} trained on, {found['pruned']:,.0f} pruned"
        )
        if "probe_seconds" in found:
            line += f"; probe {found['probe_seconds']:.1f} s so far"
        logger.info(line)
        self.restart()
