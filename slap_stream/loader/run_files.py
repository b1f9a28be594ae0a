"""A run's log on disk: what is in its files, and how they are read while they grow.

Two files for each rank, in `_slap_log` of the run's directory. `rank-0.jsonl` has a line an event:

    begin      a process takes up the run: where, which process, and what run it is
    span       some batches in a row: counts, tokens, losses, seconds, and gauges at its end
    value      a number that somebody noted, such as a held-out loss
    withdrawn  samples that could not be used, and what was raised
    level      the rows are about to be thinned
    end        the loader was closed, or ended with its process or before

`rank-0.rows` has a row of fixed size for each candidate that has left a pool. Both are only ever
appended to or replaced as a whole, so a reader needs no lock, and a kill leaves half a line or half
a row at the end, which is passed over. Each file is bounded: neighbouring spans are joined, and of
too many rows those of every second sample id stay.

Every event says how many batches were composed (`at`), and how many of these were delivered. What
left a pool is written when its batch is composed. A reader leaves out what left with a batch that
was not delivered: it is not trained on yet, and in a run that was killed it never was.

A run that goes on from a checkpoint begins again where that was saved. What an earlier beginning
has written from there on did not happen, whichever rank has written it.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import RunLogError

# A Trainer uploads its output_dir without what begins so: the log names paths, the page has texts.
LOG_DIR, _EVENTS = "_slap_log", "rank-*.jsonl"
VERSION = 2
# Spans of a rank's file: between half as many and these.
MAX_SPANS = 1024
# Checkpoints, the latest, whose place stays the end of a span.
MAX_SAVED = 64
MAX_VALUES = 4096
# Rows of a rank's file; some 30 MB.
MAX_ROWS = 1 << 20

Event = dict[str, Any]
Rows = NDArray[Any]
# The epoch, and batches of it composed before; and when, by (time of the start, how often a
# state was loaded since).
Place = tuple[int, int]
Session = tuple[float, int]
Causes = dict[tuple[int, int, int], str]


@dataclass(kw_only=True, slots=True)
class RunEvents:
    """What the logs of all ranks say has happened, up to now.

    Attributes:
        about: What run it is: its last beginning, as `RunLog` writes it.
        begins: Every beginning, in order of time, of rank 0.
        spans: Of all ranks, in the order in which they ended; each says of which `rank` it is.
        values: Likewise, of rank 0.
        rows: (n,) what has left the pools with batches that were delivered, in the order of epochs
            and steps; of 1 in 2 ** level sample ids.
        level: The same.
        errors: What was raised, by epoch, step and sample id of the rows that are `withdrawn`.
        last: When something was written last, by the clock of who wrote it.
        ended: Whether the loader has ended since it began last.
        unreadable: Lines that could not be read.
        straddling: Spans that are left out though a part of them had happened.
    """

    about: Event
    begins: list[Event]
    spans: list[Event]
    values: list[Event]
    rows: Rows
    level: int
    errors: Causes
    last: float
    ended: bool
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
    outcomes = firsts[-1]["outcomes"]
    kept = {path: surviving(events, every) for path, (events, _) in by_file.items()}
    everything = [event for events, _ in kept.values() for event in events]
    level = max(event.get("level", 0) for events, _ in by_file.values() for event in events)
    delivered = max(map(delivered_of, everything), default=(0, 0))
    errors = causes_of(everything)
    spans: list[Event] = []
    rows: list[Rows] = []
    for path, (events, _) in kept.items():
        causes = causes_of(events)
        rank = begins[path][-1]["rank"] if begins[path] else 0
        mine = [{**event, "rank": rank} for event in events if event["kind"] == "span"]
        if begins[path]:
            found = read_rows(path.with_suffix(".rows"), begins[path][-1]["fields"])
            found = surviving_rows(found, begins[path], every, causes)
            found = found[sampled(found["sample_id"], level)]
            rows.append(_delivered(found, mine, delivered, errors, outcomes, 2**level))
        spans += mine
    joined_rows = np.concatenate(rows)
    first = next(path for path in kept if path == event_file(path.parent, 0))
    return RunEvents(
        about=firsts[-1],
        begins=firsts,
        spans=sorted(spans, key=place_of),
        values=[event for event in kept[first][0] if event["kind"] == "value"],
        rows=joined_rows[np.lexsort((joined_rows["step"], joined_rows["epoch"]))],
        level=level,
        errors=errors,
        last=max(event["time"] for event in kept[first][0] if "time" in event),
        ended=_ended(kept[first][0]),
        unreadable=sum(unreadable for _, unreadable in by_file.values()),
        straddling=sum(straddling for _, straddling in kept.values()),
    )


def _ended(events: Sequence[Event]) -> bool:
    """Whether the loader has ended; numbers may have been noted since."""
    return [event["kind"] for event in events if event["kind"] in ("begin", "end")][-1:] == ["end"]


def causes_of(events: Iterable[Event]) -> Causes:
    """What was raised, or was amiss, by epoch, step and sample id of what was withdrawn."""
    return {
        (epoch, step, sample_id): text
        for event in events
        if event["kind"] == "withdrawn"
        for sample_id, epoch, step, text in event["samples"]
    }


def _delivered(
    rows: Rows,
    spans: Sequence[Event],
    delivered: Place,
    errors: Mapping[tuple[int, int, int], str],
    outcomes: Sequence[str],
    scale: int,
) -> Rows:
    """A rank's rows as of what was delivered; its spans are corrected in place.

    Args:
        rows: (n,) rows of what has left the pools.
        spans: Spans, in order.
        delivered: The place up to which batches were delivered.
        errors: What was raised, by epoch, step and sample id of what was withdrawn.
        outcomes: Names of outcomes by number.
        scale: Candidates that a row stands for.
    """
    withdrawn = outcomes.index("withdrawn")
    epoch, step = delivered
    early = (rows["epoch"] < epoch) | ((rows["epoch"] == epoch) & (rows["step"] < step))
    # What was withdrawn from a pool is so at once.
    early |= rows["outcome"] == withdrawn
    moved = (rows["outcome"] == 0) & np.isin(rows["sample_id"], [key[2] for key in errors])
    for at in np.flatnonzero(moved):
        moved[at] = tuple(rows[["epoch", "step", "sample_id"]][at].item()) in errors
    early |= moved
    ends = [place_of(span) for span in spans]
    for at in np.flatnonzero(moved | ~early):
        row = rows[at]
        # The first that ends behind it.
        place = bisect_right(ends, (int(row["epoch"]), int(row["step"])))
        if place == len(spans):
            continue  # its span was killed half way
        stratum, length = str(row["stratum"]), int(row["length"])
        for name, amount in (("counts", 1), ("tokens", length)):
            told = spans[place][name]
            from_ = told.setdefault(outcomes[row["outcome"]], {})
            from_[stratum] = max(0, from_.get(stratum, 0) - scale * amount)
            if early[at]:
                to = told.setdefault(outcomes[withdrawn], {})
                to[stratum] = to.get(stratum, 0) + scale * amount
    rows = rows.copy()
    rows["outcome"][moved] = withdrawn
    left: Rows = rows[early]
    return left


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


def delivered_of(event: Event) -> Place:
    """The same, of batches delivered before."""
    epoch, step = event["delivered"]
    return int(epoch), int(step)


def last_place(begins: Iterable[Event], session: Session) -> tuple[Place, Place]:
    """Up to where what a session has written counts, composed and delivered: later ones have begun
    again there."""
    later = [begin for begin in begins if session_of(begin) > session]
    never: Place = (2**62, 0)
    return (
        min(map(place_of, later), default=never),
        min(map(delivered_of, later), default=never),
    )


def surviving(events: Sequence[Event], begins: Sequence[Event]) -> tuple[list[Event], int]:
    """Events of a file without those that did not happen, given all ranks' beginnings.

    Returns:
        The events, beginnings included, and the spans that were left out though a part of them had
        happened.
    """
    kept: list[Event] = []
    straddling, last = 0, ((2**62, 0), (2**62, 0))
    lasts = []
    for event in events:
        if event["kind"] == "begin":
            last = last_place(begins, session_of(event))
        lasts.append(last)
    # Where states were saved that were gone on with: at the same place, what comes behind is not in
    # them, such as a candidate that was withdrawn before the next batch was composed.
    saved = {
        last: number
        for number, (event, last) in enumerate(zip(events, lasts, strict=True))
        if event.get("saved") and (place_of(event), delivered_of(event)) == last
    }
    for number, (event, last) in enumerate(zip(events, lasts, strict=True)):
        if event["kind"] == "begin":
            pass
        # At an epoch's end batches are delivered, and nothing is composed.
        elif place_of(event) > last[0] or delivered_of(event) > last[1]:
            straddling += event["kind"] == "span" and tuple(event["from"]) < last[0]
            continue
        elif event["kind"] in ("span", "withdrawn") and number > saved.get(last, number):
            continue
        kept.append(event)
    return kept, straddling


def surviving_rows(
    rows: Rows, own: Sequence[Event], begins: Sequence[Event], causes: Causes
) -> Rows:
    """Rows of a file without those that did not happen.

    Args:
        rows: (n,) rows.
        own: Beginnings in the file of the same rank; `session` of a row names one by its index.
        begins: All ranks' beginnings.
        causes: Of what was withdrawn, by the rank's events that have happened.
    """
    keep = np.zeros(len(rows), bool)
    for begin in own:
        epoch, step = last_place(begins, session_of(begin))[0]
        # A row at step s has left with batch s, after which s + 1 are composed.
        before = (rows["epoch"] < epoch) | ((rows["epoch"] == epoch) & (rows["step"] < step))
        # One at step s that was withdrawn from a pool has left after batch s - 1, and before s.
        at_end = (rows["epoch"] == epoch) & (rows["step"] == step)
        at_end &= rows["outcome"] == begin["outcomes"].index("withdrawn")
        for place in np.flatnonzero(at_end):
            at_end[place] = tuple(rows[["epoch", "step", "sample_id"]][place].item()) in causes
        keep |= (rows["session"] == begin["index"]) & (before | at_end)
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


def thinned(events: Sequence[Event], level: int = 0) -> list[Event]:
    """Fewer events that say the same: half of `MAX_SPANS` spans, of equally many batches.

    Spans that end where one of the latest checkpoints was saved still end there. Of samples that
    were withdrawn those stay whose rows do.
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
            if event["kind"] == "withdrawn":
                stay = sampled(np.array([one[0] for one in event["samples"]], np.int64), level)
                left = [one for one, stays in zip(event["samples"], stay, strict=True) if stays]
                event = {**event, "samples": left}
                dropped |= set() if left else {id(event)}
            if id(event) not in dropped:
                # What was noted in the middle of a span may as well come before it.
                result.insert(len(result) - open_, event)
            continue
        result.append(joined(result.pop(), event) if open_ else event)
        open_ = id(event) not in saved and result[-1]["batches"] < least
    return result


def replace(path: Path, data: bytes) -> None:
    """Put a file in a file's place, as a whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def lines_of(events: Iterable[Event]) -> bytes:
    """Events as a file of them has them."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)
