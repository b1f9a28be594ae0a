"""External shuffle: records are scattered over parts on disk, then each part is put in its order.

A record goes to a part that is drawn uniformly, and a part is permuted uniformly: together that is
a uniform permutation of all records. It depends on the seed and the inputs only, not on the number
of processes or on how often the work was cut off.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.files import read_json, write_json
from slap_stream.core.rng import Purpose, generator
from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.readers import Piece, other_columns, read
from slap_stream.corpus.records import COLUMNS, normalise
from slap_stream.corpus.tally import Tally
from slap_stream.corpus.tokenising import tokenise
from slap_stream.text.chat import Truncate
from slap_stream.types import IntArray

RAW_COLUMNS = {"id": "str", "source": "str", "messages": "json"}
TOKEN_COLUMNS = {
    "id": "str",
    "source": "str",
    "input_ids": "ndarray:int32",
    "supervised": "ndarray:uint8",
}

_REPORT_RECORDS = 64
# What a process holds at a time: records that wait to be written to their parts, and records of
# a part that were read to be put in order.
_RUN_BYTES = 32 << 20
_WINDOW_BYTES = 16 << 20
_DRAWS_AT_ONCE = 4096
_PLACE = np.dtype([("piece", np.int64), ("offset", np.int64), ("size", np.int64)])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterJob:
    """Read one piece into records that know their part.

    Attributes:
        piece: What to read.
        number: Of the piece among all.
        num_parts: Parts that records are drawn to.
        seed: Of the draw.
        source_field: Field that names a record's source, or None.
        work_dir: Where the results go.
    """

    piece: Piece
    number: int
    num_parts: int
    seed: int
    source_field: str | None
    work_dir: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherJob:
    """Write one part as shards.

    Attributes:
        number: Of the part.
        stems: (num_pieces,) name of the input of each piece.
        first_rows: (num_pieces,) rows of its input that come before each piece.
        seed: Of the order inside the part.
        tokenizer: Path or name to load it by; None leaves messages as they are.
        max_length: Tokens kept of a record; None keeps all.
        truncate: What is done with a longer one.
        shard_bytes: Limit of a shard.
        work_dir: Where the pieces are, and the manifest goes.
        out: Directory of the corpus.
    """

    number: int
    stems: tuple[str, ...]
    first_rows: tuple[int, ...]
    seed: int
    tokenizer: str | None
    max_length: int | None
    truncate: Truncate
    shard_bytes: int
    work_dir: Path
    out: Path


def scatter(job: ScatterJob, advance: Callable[[int], None]) -> None:
    """Write a piece's records to one file, in runs that are sorted by part.

    Leaves the records in `piece-N.bin`, where each of them ends in `piece-N.ends`, how many there
    are of each run and part in `piece-N.npy` and, when all that is on disk, the manifest
    `piece-N.json`.
    """
    tally = Tally()
    columns = [*COLUMNS, *([job.source_field] if job.source_field else [])]
    draws = generator(job.seed, Purpose.CORPUS_PARTS, job.number)
    parts: IntArray = np.zeros(0, dtype=np.int64)
    name = _piece_file(job.work_dir, job.number, "")
    with open(f"{name}.bin", "wb") as data, open(f"{name}.ends", "wb") as ends:
        runs = _Runs(data, ends, job.num_parts)
        for row, fields in enumerate(read(job.piece, columns, advance)):
            tally.rows += 1
            # One draw per row, kept or not: no record's part hangs on what becomes of others.
            if row % _DRAWS_AT_ONCE == 0:
                parts = draws.integers(job.num_parts, size=_DRAWS_AT_ONCE)
            if fields is None:
                continue
            try:
                if isinstance(fields, DropReason):
                    raise RecordDropped(fields)
                record = normalise(fields, source_field=job.source_field)
                source = job.piece.stem if record.source is None else record.source
                text = _pack([job.number, row, record.id, source, record.messages])
            except RecordDropped as dropped:
                tally.drop(dropped.reason, job.number, row, dropped.detail)
                continue
            tally.pass_over(record.unused)
            runs.add(int(parts[row % _DRAWS_AT_ONCE]), text)
            tally.keep(source)
        # Whole columns of tables are not even read.
        tally.pass_over(other_columns(job.piece, columns), tally.counts.total())
        counts = runs.finish()
        for file in (data, ends):
            file.flush()
            os.fsync(file.fileno())
    with open(f"{name}.npy", "wb") as index:
        np.save(index, counts)
        os.fsync(index.fileno())
    manifest = {"part_sizes": counts.sum(axis=0).tolist(), "tally": tally.to_dict()}
    write_json(Path(f"{name}.json"), manifest)


def gather(job: GatherJob, advance: Callable[[int], None]) -> None:
    """Write one part as shards, in its drawn order.

    Leaves the directory `part-N` in the corpus, unless nothing is kept, and then its manifest.
    """
    # Not on top: it takes streaming seconds to load, which those who only read need not wait for.
    from slap_stream.shards.writer import open_writer

    tally = Tally()
    name = part_name(job.number)
    places = _places_of_part(job)
    order = generator(job.seed, Purpose.CORPUS_PLACES, job.number).permutation(len(places))
    # Of this process only: a worker that outlives its parent by a moment must not meet its heir.
    unfinished = job.work_dir / f"{name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    columns = RAW_COLUMNS if job.tokenizer is None else TOKEN_COLUMNS
    with open_writer(unfinished, columns, shard_bytes=job.shard_bytes) as writer:
        for done, text in enumerate(_texts(job, places[order])):
            if done % _REPORT_RECORDS == 0:
                advance(done)
            piece, row, own_id, source, messages = json.loads(text)
            number = job.first_rows[piece] + row
            sample_id = f"{job.stems[piece]}-{number}" if own_id is None else own_id
            sample = {"id": sample_id, "source": source}
            try:
                if job.tokenizer is None:
                    sample["messages"] = messages
                else:
                    tokens, encoded = tokenise(
                        job.tokenizer, messages, job.max_length, job.truncate
                    )
                    sample |= tokens
                    tally.truncated += encoded.truncated
                    tally.shared += encoded.shared
            except RecordDropped as dropped:
                tally.drop(dropped.reason, piece, row, dropped.detail)
                continue
            writer.write(sample)
            tally.keep(source)
    files: dict[str, int] = {}
    if tally.counts:
        files = _settle(unfinished, job.out / name)
    else:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json(job.work_dir / f"{name}.json", {"files": files, "tally": tally.to_dict()})


def part_name(number: int) -> str:
    """Directory of a part inside the corpus."""
    return f"part-{number:05d}"


def piece_manifest(work_dir: Path, number: int) -> dict[str, Any] | None:
    """What `scatter` left of a piece; None if it has not ended."""
    return read_json(_piece_file(work_dir, number, ".json"))


def part_manifest(work_dir: Path, out: Path, number: int) -> dict[str, Any] | None:
    """What `gather` left of a part; None if it has not ended, or its files are not as they were."""
    manifest = read_json(work_dir / f"{part_name(number)}.json")
    if manifest is None:
        return None
    directory = out / part_name(number)
    for name, size in manifest["files"].items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return manifest


class _Runs:
    """Records that wait for being written, sorted by part; state: those of the current run."""

    def __init__(self, data: IO[bytes], ends: IO[bytes], num_parts: int) -> None:
        self._data = data
        self._ends = ends
        self._written = 0
        self._num_parts = num_parts
        self._parts: list[int] = []
        self._texts: list[bytes] = []
        self._num_bytes = 0
        self._counts: list[IntArray] = []

    def add(self, part: int, text: bytes) -> None:
        self._parts.append(part)
        self._texts.append(text)
        self._num_bytes += len(text)
        if self._num_bytes >= _RUN_BYTES:
            self._flush()

    def finish(self) -> IntArray:
        """Write what waits; (num_runs, num_parts) records of each run and part."""
        self._flush()
        return np.array(self._counts, dtype=np.int64).reshape(-1, self._num_parts)

    def _flush(self) -> None:
        order = np.argsort(np.array(self._parts, dtype=np.int64), kind="stable")
        texts = [self._texts[place] for place in order]
        self._data.writelines(texts)
        ends = self._written + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._ends.write(ends.tobytes())
        self._written += self._num_bytes
        self._counts.append(np.bincount(self._parts, minlength=self._num_parts).astype(np.int64))
        self._parts, self._texts, self._num_bytes = [], [], 0


def _places_of_part(job: GatherJob) -> NDArray[Any]:
    """(records of the part,) where they are, in the order of the pieces."""
    found = [np.zeros(0, dtype=_PLACE)]
    for piece in range(len(job.stems)):
        counts = np.load(_piece_file(job.work_dir, piece, ".npy"))
        firsts = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        with open(_piece_file(job.work_dir, piece, ".ends"), "rb") as file:
            for run in range(len(counts)):
                slot = run * counts.shape[1] + job.number
                low, high = int(firsts[slot]), int(firsts[slot + 1])
                # A record starts where the one before it ends, be that of another part.
                file.seek(8 * max(low - 1, 0))
                bounds = np.frombuffer(file.read(8 * (high - max(low - 1, 0))), dtype=np.int64)
                if low == 0:
                    bounds = np.concatenate([[0], bounds])
                places = np.zeros(high - low, dtype=_PLACE)
                places["piece"] = piece
                places["offset"] = bounds[: high - low]
                places["size"] = np.diff(bounds)
                found.append(places)
    return np.concatenate(found)


def _texts(job: GatherJob, places: NDArray[Any]) -> Iterator[bytes]:
    """The records at these places, in this order; a window of them is in memory at a time."""
    ends = np.cumsum(places["size"])
    start = 0
    while start < len(places):
        limit = int(ends[start] - places["size"][start]) + _WINDOW_BYTES
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        window = places[start:stop]
        texts: list[bytes] = [b""] * len(window)
        # By file and place: each file is opened once, and read forwards.
        by_place = np.lexsort((window["offset"], window["piece"]))
        for group in np.split(by_place, np.flatnonzero(np.diff(window["piece"][by_place])) + 1):
            piece = int(window["piece"][group[0]])
            with open(_piece_file(job.work_dir, piece, ".bin"), "rb", buffering=0) as data:
                for n in group:
                    size, offset = int(window["size"][n]), int(window["offset"][n])
                    texts[n] = os.pread(data.fileno(), size, offset)
        yield from texts
        start = stop


def _settle(unfinished: Path, directory: Path) -> dict[str, int]:
    """Move a written part to where it belongs; name and size in bytes of each of its files."""
    files = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
    for name in files:
        with (unfinished / name).open("rb") as file:
            os.fsync(file.fileno())
    # Left by a run that was cut off between this and its manifest.
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.replace(directory)
    return files


def _pack(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise RecordDropped(DropReason.NOT_UNICODE) from error
    except TypeError as error:
        # Texts are texts by now; tools of a table may hold dates.
        raise RecordDropped(DropReason.BAD_TOOLS, str(error)) from error


def _piece_file(work_dir: Path, number: int, end: str) -> Path:
    return work_dir / f"piece-{number:05d}{end}"
