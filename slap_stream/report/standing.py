"""Whether a run still goes on: by its process, where that can be seen from here."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from slap_stream.errors import ConfigError
from slap_stream.loader.run_files import RunEvents
from slap_stream.report.said import duration

# Something is written every few seconds; a training step or an evaluation may take longer.
STILL_SECONDS = 120.0
# A process is at least so much older than what it has written first: clocks are read twice.
_CLOCK_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a run stands.

    Attributes:
        state: `going on`, `still` (its process lives and writes nothing), `closed` (its loader
            was, or has ended by itself), `gone` (its process is, without that) or `unknown` (on
            another machine, and nothing was written lately).
        said: The same for people, to follow a time.
    """

    state: str
    said: str


def standing(events: RunEvents, *, now: float | None = None) -> Standing:
    """How a run stands whose log this is.

    Args:
        events: The log.
        now: Seconds since the epoch; None: by the clock.

    Raises:
        ConfigError: If psutil is not installed.
    """
    begin = events.about
    silent = (time.time() if now is None else now) - events.last
    ago = duration(max(0.0, silent))
    if events.ended:
        return Standing(state="closed", said="ended")
    process, host = int(begin["process"]), str(begin["host"])
    if host != socket.gethostname():
        if silent < STILL_SECONDS:
            return Standing(state="going on", said=f"going on, on {host}")
        said = f"silent for {ago}; whether it still goes on can be seen on {host} only"
        return Standing(state="unknown", said=said)
    if not _lives(process, began=float(begin["time"])):
        said = "its process is gone: it was killed, or ended by an error"
        return Standing(state="gone", said=said)
    if silent < STILL_SECONDS:
        return Standing(state="going on", said="going on")
    said = f"its process lives, but has told nothing for {ago}: stopped, slow, or done"
    return Standing(state="still", said=said)


def _lives(process: int, *, began: float) -> bool:
    """Whether a process is still the one that began to write at a time."""
    try:
        import psutil
    except ImportError as error:
        raise ConfigError(
            f"psutil must be installed to tell whether a run goes on, got {error}; "
            "pip install 'slap-stream[report]'."
        ) from error
    try:
        found = psutil.Process(process)
        # The number of one that has ended may be another's by now.
        earlier: bool = found.create_time() <= began + _CLOCK_SECONDS
        return earlier and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
