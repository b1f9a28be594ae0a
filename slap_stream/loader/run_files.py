"""A run's log on disk: what is in its files, and how they are read while they grow.

Two files for each rank, in `_slap_log` of the run's directory. `rank-0.jsonl` has a line an event:

    begin  a process takes up the run: where, and what run it is
    span   some batches in a row: counts, tokens, losses, seconds, and gauges at its end
    value  a number that somebody noted, such as a held-out loss
    level  the rows are about to be thinned

`rank-0.rows` has a row of fixed size for each candidate that has left a pool. Both are only ever
appended to or replaced as a whole, so a reader needs no lock, and a kill leaves half a line or half
a row at the end, which is passed over. Each file is bounded: neighbouring spans are joined, and of
too many rows those of every second sample id stay.

A run that goes on from a checkpoint begins again where that was saved. What an earlier beginning
has written from there on did not happen, whichever rank has written it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import RunLogError

# A Trainer uploads its output_dir without what begins so: the log names paths, the page has texts.
LOG_DIR, _EVENTS = "_slap_log", "rank-*.jsonl"
VERSION = 1
# Spans of a rank's file: between half as many and these.
MAX_SPANS = 1024
# Checkpoints, the latest, whose place stays the end of a span.
MAX_SAVED = 64
MAX_VALUES = 4096
# Rows of a rank's file; some 30 MB.
MAX_ROWS = 1 << 20

Event = dict[str, Any]
Rows = NDArray[Any]
# Batches of an epoch composed before, and the epoch; and when, by (time of the start, how often a
# state was loaded since).
Place = tuple[int, int]
Session = tuple[float, int]


@dataclass(kw_only=True, slots=True)
class RunEvents:
    """What the logs of all ranks say has happened, up to now.

    Attributes:
        about: What run it is: its last beginning, as `RunLog` writes it.
        begins: Every beginning, in order of time, of rank 0.
        spans: Of all ranks, in the order in which they ended; each says of which `rank` it is.
        values: Likewise, of rank 0.
        rows: (n,) what has left the pools, in the order of epochs and steps; of 1 in 2 ** level
            sample ids.
        level: The same.
        unreadable: Lines that could not be read.
        straddling: Spans that are left out though a part of them had happened.
    """

    about: Event
    begins: list[Event]
    spans: list[Event]
    values: list[Event]
    rows: Rows
    level: int
    unreadable: int
    straddling: int


def find_log(run_dir: str | os.PathLike[str]) -> Path | None:
    """Where the log of a run lies, given its directory or that of the log; None if nowhere."""
    found = (path for path in (Path(run_dir, LOG_DIR), Path(run_dir)) if any(path.glob(_EVENTS)))
    return next(found, None)


def read_log(run_dir: str | os.PathLike[str]) -> RunEvents:
    """Read the logs of all ranks of a run, which may be going on.

    Raises:
        RunLogError: If there is none, or another version wrote it.
    """
    log_dir = find_log(run_dir)
    by_file = {path: read_events(path) for path in sorted(log_dir.glob(_EVENTS))} if log_dir else {}
    begins = {
        path: [event for event in events if event["kind"] == "begin"]
        for path, (events, _) in by_file.items()
    }
    every = sorted((begin for some in begins.values() for begin in some), key=session_of)
    firsts = [begin for begin in every if begin["rank"] == 0]
    if not firsts:
        raise RunLogError(
            f"run_dir must hold the log of a run ({LOG_DIR}), got {str(run_dir)!r}, which has "
            "none; a loader writes it where its run_dir= says, a Trainer into its output_dir."
        )
    spans: list[Event] = []
    values: list[Event] = []
    rows: list[Rows] = []
    straddling = level = 0
    for path, (events, _) in by_file.items():
        kept, cut = surviving(events, every)
        straddling += cut
        rank = begins[path][-1]["rank"] if begins[path] else 0
        mine = [{**event, "rank": rank} for event in kept if event["kind"] == "span"]
        spans += mine
        level = max([level, *(event.get("level", 0) for event in events)])
        if path == event_file(path.parent, 0):
            values = [event for event in kept if event["kind"] == "value"]
        if begins[path]:
            fields = begins[path][-1]["fields"]
            found = read_rows(path.with_suffix(".rows"), fields)
            rows.append(surviving_rows(found, begins[path], every))
    joined_rows = np.concatenate(rows)
    joined_rows = joined_rows[sampled(joined_rows["sample_id"], level)]
    return RunEvents(
        about=firsts[-1],
        begins=firsts,
        spans=sorted(spans, key=place_of),
        values=values,
        rows=joined_rows[np.lexsort((joined_rows["step"], joined_rows["epoch"]))],
        level=level,
        unreadable=sum(unreadable for _, unreadable in by_file.values()),
        straddling=straddling,
    )


def event_file(log_dir: Path, rank: int) -> Path:
    """A rank's events."""
    return log_dir / f"rank-{rank}.jsonl"


def row_file(log_dir: Path, rank: int) -> Path:
    """A rank's rows."""
    return log_dir / f"rank-{rank}.rows"


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events of a file, and how many lines could not be read; half a line at its end is none.

    Raises:
        RunLogError: If another version wrote it.
    """
    events: list[Event] = []
    unreadable = 0
    data = path.read_bytes() if path.is_file() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            event = json.loads(line)
            kind = event["kind"]
        except (ValueError, TypeError, KeyError):
            unreadable += 1
            continue
        if kind == "begin" and event.get("version") != VERSION:
            raise RunLogError(
                f"{path} must be a log of version {VERSION}, got {event.get('version')!r}; read it "
                "with the slap_stream that wrote it."
            )
        events.append(event)
    return events, unreadable


def read_rows(path: Path, fields: Sequence[Sequence[str]]) -> Rows:
    """The whole rows of a file.

    Args:
        path: The file; none is as an empty one.
        fields: Names and types, as the file's beginnings say.
    """
    dtype = np.dtype([(name, kind) for name, kind in fields])
    data = path.read_bytes() if path.is_file() else b""
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)


def session_of(begin: Event) -> Session:
    """When a process began, as all ranks have agreed."""
    return float(begin["session"][0]), int(begin["session"][1])


def last_started(log_dir: Path, rank: int, world_size: int) -> float:
    """When the last process began that is in a log's files; 0 if there is none.

    Args:
        log_dir: The log's directory.
        rank: Of the files each rank looks at its share, those of more ranks than now included.
        world_size: Number of ranks.
    """
    last = 0.0
    for path in log_dir.glob(_EVENTS):
        number = path.stem.removeprefix("rank-")
        if not number.isdecimal() or int(number) % world_size != rank:
            continue
        try:
            begins = [event for event in read_events(path)[0] if event["kind"] == "begin"]
            last = max([last, *(session_of(begin)[0] for begin in begins)])
        except (RunLogError, OSError, LookupError, TypeError, ValueError):
            # It is moved aside when the run begins.
            continue
    return last


def place_of(event: Event) -> Place:
    """Where an event belongs: (epoch, batches composed before)."""
    epoch, step = event["at"]
    return int(epoch), int(step)


def last_place(begins: Iterable[Event], session: Session) -> Place:
    """Up to where what a session has written counts: later ones have begun again there."""
    later = [place_of(begin) for begin in begins if session_of(begin) > session]
    return min(later, default=(2**62, 0))


def surviving(events: Sequence[Event], begins: Sequence[Event]) -> tuple[list[Event], int]:
    """Events of a file without those that did not happen, given all ranks' beginnings.

    Returns:
        The events, beginnings included, and the spans that were left out though a part of them had
        happened.
    """
    kept: list[Event] = []
    straddling, last = 0, (2**62, 0)
    for event in events:
        if event["kind"] == "begin":
            last = last_place(begins, session_of(event))
        elif place_of(event) > last:
            straddling += event["kind"] == "span" and tuple(event["from"]) < last
            continue
        kept.append(event)
    return kept, straddling


def surviving_rows(rows: Rows, own: Sequence[Event], begins: Sequence[Event]) -> Rows:
    """Rows of a file without those that did not happen.

    Args:
        rows: (n,) rows.
        own: Beginnings in the file of the same rank; `session` of a row names one by its index.
        begins: All ranks' beginnings.
    """
    keep = np.zeros(len(rows), bool)
    for begin in own:
        epoch, step = last_place(begins, session_of(begin))
        # A row at step s has left with batch s, after which s + 1 are composed.
        before = (rows["epoch"] < epoch) | ((rows["epoch"] == epoch) & (rows["step"] < step))
        keep |= (rows["session"] == begin["index"]) & before
    return rows[keep]


def sampled(sample_id: NDArray[np.int64], level: int) -> NDArray[np.bool_]:
    """(n,) whether the rows of a sample stay when those of 1 in 2 ** level do."""
    if not level:
        return np.ones(len(sample_id), bool)
    mixed = sample_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    stay: NDArray[np.bool_] = (mixed >> np.uint64(64 - level)) == 0
    return stay


def joined(first: Event, second: Event) -> Event:
    """One span of two that follow each other."""
    span = {**second, "from": first["from"]}
    for name in ("batches", "seconds", "compose_seconds", "probe_seconds", "probed"):
        span[name] = first[name] + second[name]
    span["losses"] = [a + b for a, b in zip(first["losses"], second["losses"], strict=True)]
    for name in ("counts", "tokens"):
        span[name] = {
            outcome: _added(first[name].get(outcome, {}), second[name].get(outcome, {}))
            for outcome in {**first[name], **second[name]}
        }
    return span


def _added(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {key: first.get(key, 0) + second.get(key, 0) for key in {**first, **second}}


def thinned(events: Sequence[Event]) -> list[Event]:
    """Fewer events that say the same: half of `MAX_SPANS` spans, of equally many batches.

    Spans that end where one of the latest checkpoints was saved still end there.
    """
    spans = [event for event in events if event["kind"] == "span"]
    saved = [id(span) for span in spans if span["saved"]][-MAX_SAVED:]
    least = sum(span["batches"] for span in spans) / (MAX_SPANS / 2)
    values = [id(event) for event in events if event["kind"] == "value"]
    dropped = set(values[1::2]) if len(values) > MAX_VALUES else set()
    result: list[Event] = []
    open_ = False
    for event in events:
        if event["kind"] != "span":
            if event["kind"] == "begin":
                open_ = False
            if id(event) not in dropped:
                # What was noted in the middle of a span may as well come before it.
                result.insert(len(result) - open_, event)
            continue
        result.append(joined(result.pop(), event) if open_ else event)
        open_ = id(event) not in saved and result[-1]["batches"] < least
    return result
