"""The log of a run, written where its sampler is: what left the pools and why, losses, cost."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.core.files import local_path
from slap_stream.errors import ConfigError, CorpusError, RunLogError
from slap_stream.loader.run_files import (
    LOG_DIR,
    MAX_ROWS,
    MAX_SPANS,
    VERSION,
    Event,
    Place,
    Rows,
    causes_of,
    event_file,
    last_started,
    lines_of,
    read_events,
    read_rows,
    replace,
    row_file,
    sampled,
    session_of,
    surviving,
    surviving_rows,
    thinned,
)
from slap_stream.remote.urls import is_remote
from slap_stream.selection.departures import OUTCOMES, ROW
from slap_stream.selection.sampler import SlapSampler
from slap_stream.types import FloatArray, IntArray, RowStore

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SPANS = 2.0
SECONDS_BETWEEN_STARTS = 1e-3
_FIELDS = [[name, ROW[name].str] for name in ROW.names or ()]
# What reading files that are no log of ours ends with.
_UNREADABLE = (RunLogError, LookupError, TypeError, ValueError)
# Sums of a run that a span has the part of, and how the metrics call them.
_SUMS = {"probe_seconds": "probe_seconds", "probed": "probe_samples"}


class LoaderGone(Exception):
    """The loader was collected; its thread may still compose a batch, and tell the log of it."""


class RunLog:
    """Writes a rank's log; `run_files` says what is in it.

    If it cannot be written later on (a full disk, say), or anything else fails in here, training
    goes on without: that is logged once, and `metrics()["run_log_failed"]` is 1. Whether it can be
    at all the ranks find out together: `settle`.

    Holds the sums since the last span; no state of the loader has them, which would be as long as
    the log.

    Args:
        run_dir: Directory of the run; None: no log is kept.
        sampler: Whose lanes are watched.
        about: Makes what a report has to know of the run, in JSON.
        metrics: The loader's.
        undelivered: Batches composed and not delivered yet.
        clock: Seconds that only grow.

    Attributes:
        started: When all ranks began, later than what the files hold, as they have agreed: by it
            what they write is told from what was before.
        begun: Whether it is being written.
        failed: Whether it could not be.
        problem: What is wrong with the directory, if it cannot be made or written to.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        sampler: SlapSampler,
        *,
        about: Callable[[], dict[str, Any]],
        metrics: Callable[[], dict[str, float]],
        undelivered: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sampler, self._about, self._metrics = sampler, about, metrics
        self._undelivered = undelivered
        self._clock, self.started, self._loads = clock, time.time(), -1
        self._index = self._level = self._spans_held = self._rows_held = 0
        self.begun = self.failed = self._ended = False
        self._kept = run_dir is not None
        self.problem: str | None = None
        self._early: list[Event] = []
        self._told_delivered: Place | None = None
        self._clear()
        if run_dir is None:
            return
        try:
            log_dir = local_path("run_dir", run_dir) / LOG_DIR
            log_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(log_dir, os.W_OK):
                raise PermissionError(f"{log_dir} may not be written to")
            # By a clock that is behind (of another machine, say) they would be of the session
            # before.
            last = last_started(log_dir, sampler.rank, sampler.world_size)
        except (OSError, CorpusError) as error:
            # Not raised: the other ranks would wait for this one.
            self.problem = f"{str(run_dir)!r}: {error}"
            return
        self._events, self._rows = (f(log_dir, sampler.rank) for f in (event_file, row_file))
        self.started = max(self.started, last + SECONDS_BETWEEN_STARTS)

    def settle(
        self, starts: Sequence[float], problems: Sequence[str | None], *, required: bool
    ) -> None:
        """Take what all ranks have said: all write their logs, or none does. A log that one of them
        is missing from would tell a part as if it were the whole.

        Args:
            starts: When each rank began, by its own clock and files.
            problems: What is wrong with each one's directory.
            required: Whether a run without its log must not begin.

        Raises:
            ConfigError: On every rank, if it is required and one of them cannot write it.
        """
        self.started = max(starts)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if not failed:
            return
        several = len(problems) > 1
        which = f" on rank {failed[0]} ({len(failed)} of {len(problems)} ranks)" if several else ""
        told = f"{problems[failed[0]]}{which}"
        if required:
            raise ConfigError(
                "run_dir must be a directory, new or old, that may be written to, got "
                f"{told}; name another, or None for no log."
            )
        # Where this process is none that writes, it says nothing, as before.
        self.failed = self._kept
        if self._kept and self._sampler.rank == 0:
            logger.warning("this run keeps no log for slap-report, which cannot be in %s", told)

    @property
    def _place(self) -> Place:
        return self._sampler.epoch, self._sampler.step

    def _now(self) -> Event:
        """What every event says: batches composed and delivered, and when."""
        epoch, step = self._place
        delivered = epoch, step - self._undelivered()
        return {"at": (epoch, step), "delivered": delivered, "time": time.time()}

    def begin(self) -> None:
        """Take up the run where the sampler is: at its start, or where a state was saved.

        What the files have from there on is taken out; a log that the run does not go on from, or
        that cannot be read, is moved to `*.previous`.
        """
        self._guarded(self._begin)

    def _begin(self) -> None:
        # Nothing is lost that happened: what a state follows from was written when it was saved.
        self._loads += 1
        mine: Event = {
            "kind": "begin",
            "version": VERSION,
            **self._now(),
            "session": (self.started, self._loads),
            "index": 0,
            # By which it is told later whether the run still goes on.
            "process": os.getpid(),
            "host": socket.gethostname(),
            "rank": self._sampler.rank,
            "world_size": self._sampler.world_size,
            "fields": _FIELDS,
            "outcomes": OUTCOMES,
            "about": self._about(),
        }
        try:
            kept, rows = self._happened(mine)
        except _UNREADABLE as error:
            logger.warning("%s cannot be gone on with, is *.previous now: %s", self._events, error)
            self._move_aside()
            kept, rows = self._happened(mine)
        self._index = mine["index"]
        self._replace_rows(rows)
        early, self._early = self._early, []
        # Where the run goes on from may have been loaded since.
        self._replace_events([*kept, mine, *({**line, **self._now()} for line in early)])
        for lane in self._sampler.lanes:
            lane.watch_departures()
        self.begun, self._ended, self._told_delivered = True, False, mine["delivered"]
        self._clear()

    def _happened(self, mine: Event) -> tuple[list[Event], Rows]:
        """What the files hold that has happened before this beginning, which is given its index."""
        events, unreadable = read_events(self._events)
        if unreadable:
            raise RunLogError(f"{unreadable} lines are no events")
        begins = [event for event in events if event["kind"] == "begin"]
        other = begins and begins[-1]["fields"] != _FIELDS
        if events and (other or self._place == (0, 0)):
            self._move_aside()
            events = begins = []
        mine["index"] = begins[-1]["index"] + 1 if begins else 0
        every = [*begins, mine]
        kept, _ = surviving(events, every)
        rows = read_rows(self._rows, _FIELDS)
        rows = surviving_rows(rows, begins, every, causes_of(kept))
        # Of what did not happen, too: the rows of before were thinned with it.
        mine["level"] = self._level = max((e.get("level", 0) for e in events), default=0)
        return kept, rows

    def _move_aside(self) -> None:
        for path in (self._events, self._rows):
            if path.is_file():
                path.replace(path.with_name(f"{path.name}.previous"))

    def _clear(self) -> None:
        self._from, self._since = self._place, self._clock()
        self._batches, self._compose_seconds = 0, 0.0
        self._losses = [0.0, 0]
        self._before = self._metrics() if self.begun else {}

    def composed(self, seconds: float) -> None:
        """A batch was composed, which has taken so long."""
        if not self.begun:
            return
        self._batches += 1
        self._compose_seconds += seconds
        if self._due or self._sampler.exhausted:
            self.flush()

    @property
    def _due(self) -> bool:
        return self._clock() - self._since >= SECONDS_BETWEEN_SPANS

    def observed(self, losses: FloatArray, *, last: bool) -> None:
        """Losses of a batch were fed back; `last`: it was the epoch's last one."""
        if not self.begun:
            return
        self._guarded(lambda: self._add(losses))
        # At an epoch's end nothing more is composed.
        if last or (self._due and self._sampler.exhausted):
            self.flush()

    def _add(self, losses: FloatArray) -> None:
        finite = losses[np.isfinite(losses)]
        self._losses[0] += float(finite.sum())
        self._losses[1] += len(finite)

    def note(self, values: Mapping[str, Any]) -> None:
        """Keep numbers that were measured now, such as a held-out loss; not finite ones are left
        out. What is noted before the first batch waits for the log to begin.

        Raises:
            ConfigError: If one is no real number.
        """
        wrong = [name for name, value in values.items() if not isinstance(value, Real)]
        if wrong:
            raise ConfigError(
                f"{wrong[0]} must be a number, got {values[wrong[0]]!r}; of a tensor note .item()."
            )
        self.flush()
        about = {"kind": "value", **self._now()}
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        lines = [{**about, "name": name, "value": value} for name, value in finite.items()]
        if self.begun:
            self._guarded(lambda: self._append(lines))
        elif self._kept and not self.failed:
            self._early += lines

    def withdrawn(self, samples: Sequence[tuple[int, int, int, str]]) -> None:
        """Samples could not be read or collated: of each its id, epoch and step as in its row, and
        what was raised."""
        if self.begun and samples:
            line = {"kind": "withdrawn", **self._now(), "samples": list(samples)}
            self._guarded(lambda: self._append([line]))

    def end(self) -> None:
        """The loader is closed: nothing more will be written."""
        self.flush()
        if self.begun and not self._ended:
            self._guarded(lambda: self._append([{"kind": "end", **self._now()}]))
        self._ended = True

    def leave(self, *, held: bool) -> None:
        """Nobody has closed the loader, and nothing more will be written: the end, unless another
        loader has taken the log up since.

        Args:
            held: Whether the loader is still there; else nothing can be asked of it.
        """
        if not self.begun or self._ended:
            return
        try:
            events, _ = read_events(self._events)
            begins = [session_of(event) for event in events if event["kind"] == "begin"]
            if not begins or begins[-1] != (self.started, self._loads):
                return
            if held:
                self.end()
            else:
                last = {name: events[-1][name] for name in ("at", "delivered")}
                self._append([{"kind": "end", **last, "time": time.time()}])
        except (OSError, *_UNREADABLE) as error:
            logger.debug("%s was not ended: %r", self._events, error)

    def metrics(self) -> dict[str, float]:
        """Whether the log could not be written; nothing where none is kept."""
        return {"run_log_failed": float(self.failed)} if self._kept else {}

    def flush(self, *, saved: bool = False) -> None:
        """Write down what has happened since the last span; `saved`: a state is saved here."""
        if self.begun:
            self._guarded(lambda: self._flush(saved))

    def _flush(self, saved: bool) -> None:
        watched = [lane.departures for lane in self._sampler.lanes if lane.departures]
        rows = np.concatenate([departures.take() for departures in watched])
        rows["session"] = self._index
        now = self._now()
        moved, self._told_delivered = now["delivered"] != self._told_delivered, now["delivered"]
        if not (len(rows) or self._losses[1] or saved or moved):
            return
        seconds, metrics = self._clock() - self._since, self._metrics()
        counts, lengths = {}, {}
        for number, name in enumerate(OUTCOMES):
            mine = rows["outcome"] == number
            if mine.any():
                counts[name] = _by_stratum(rows["stratum"][mine], None)
                lengths[name] = _by_stratum(rows["stratum"][mine], rows["length"][mine])
        # Before the span: what follows one that was saved is not in the state.
        causes = [one for departures in watched for one in departures.take_causes()]
        if causes:
            self._append([{"kind": "withdrawn", **now, "samples": causes}])
        span: Event = {
            "kind": "span",
            **now,
            "from": self._from,
            "saved": saved,
            "batches": self._batches,
            "seconds": seconds,
            "compose_seconds": self._compose_seconds,
            "losses": list(self._losses),
            "counts": counts,
            "tokens": lengths,
            "gauges": {name: value for name, value in metrics.items() if math.isfinite(value)},
            # After a resume the probe counts on from its state.
            **{
                name: max(0.0, metrics.get(told, 0.0) - self._before.get(told, 0.0))
                for name, told in _SUMS.items()
            },
        }
        rows = rows[sampled(rows["sample_id"], self._level)]
        if self._rows_held + len(rows) > MAX_ROWS:
            rows = np.concatenate([read_rows(self._rows, _FIELDS), rows])
            while len(rows) > MAX_ROWS // 2:
                self._level += 1
                rows = rows[sampled(rows["sample_id"], self._level)]
            # First: a kill in between must not leave fewer rows than are said to be there.
            self._append([{"kind": "level", **now, "level": self._level}])
            self._replace_rows(rows)
        elif len(rows):
            with self._rows.open("ab") as file:
                file.write(rows.tobytes())
            self._rows_held += len(rows)
        span["level"] = self._level
        self._append([span])
        self._spans_held += 1
        if self._spans_held > MAX_SPANS:
            self._replace_events(thinned(read_events(self._events)[0], self._level))
        self._clear()

    def _append(self, events: list[Event]) -> None:
        with self._events.open("ab") as file:
            file.write(lines_of(events))

    def _replace_events(self, events: list[Event]) -> None:
        replace(self._events, lines_of(events))
        self._spans_held = sum(event["kind"] == "span" for event in events)

    def _replace_rows(self, rows: Rows) -> None:
        replace(self._rows, rows.tobytes())
        self._rows_held = len(rows)

    def _guarded(self, write: Callable[[], None]) -> None:
        if self.failed or not self._kept:
            return
        try:
            write()
        except LoaderGone:
            return  # nobody will train on what it composed ahead; `leave` ends the log
        except Exception as error:
            # Whatever it is: no fault of a log is worth a training.
            self.failed, self.begun = True, False
            for lane in self._sampler.lanes:
                lane.watch_departures(False)
            told = error if isinstance(error, OSError) else repr(error)
            logger.warning("%s is not written any more: %s", self._events, told)
            logger.debug("where that was", exc_info=True)


def _by_stratum(stratum: IntArray, weights: IntArray | None) -> dict[str, float]:
    sums = np.bincount(stratum, weights=weights)
    return {str(at): round(float(sums[at])) for at in np.flatnonzero(sums).tolist()}


def describe(dataset: Any, store: RowStore, sampler: SlapSampler) -> dict[str, Any]:
    """What a report has to know of a run, in JSON.

    Args:
        dataset: The `StreamingDataset`.
        store: Its embeddings.
        sampler: The run's.
    """
    parts = getattr(store, "stores", (store,))
    paths = [getattr(part, "path", None) for part in parts]
    strata = sampler.metrics()
    by_source = bool(strata["strata_by_source"])
    return {
        "corpora": [str(Path(stream.local, stream.split)) for stream in dataset.streams],
        "embeddings": [
            path if path is None or is_remote(path) else str(Path(path).absolute())
            for path in paths
        ],
        "length_unit": getattr(parts[0], "length_unit", "length"),
        "config": sampler.config.to_dict(),
        "run": sampler.describe(),
        "num_clusters": int(strata["strata"]) // (len(store.source_names) if by_source else 1),
        "by_source": by_source,
    }
