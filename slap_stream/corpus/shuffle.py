"""External shuffle: records are scattered over parts on disk, then each part is put in its order.

A record goes to a part that is drawn uniformly, and a part is permuted uniformly: together that is
a uniform permutation of all records. It depends on the seed and the inputs only, not on the number
of processes or on how often the work was cut off.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.files import write_json
from slap_stream.core.rng import Purpose, generator
from slap_stream.corpus.field_map import FieldMap
from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.readers import Piece, other_columns, read
from slap_stream.corpus.records import Record, columns_to_read, normalise
from slap_stream.corpus.tally import Tally
from slap_stream.corpus.tokenising import take_tokens, tokenise
from slap_stream.corpus.work_files import part_name, piece_file, records_of_runs, require_ours
from slap_stream.shards.writer import open_writer
from slap_stream.text.chat import ATTENTION, Truncate
from slap_stream.types import IntArray

RAW_COLUMNS = {"id": "str", "source": "str", "messages": "json"}
TOKEN_COLUMNS = {
    "id": "str",
    "source": "str",
    "input_ids": "ndarray:int32",
    "supervised": "ndarray:uint8",
}
# What records hold on their way as shards do; tokens are arrays.
_ENCODED = frozenset(("id", "source", "messages"))
_REPORT_RECORDS = 64
# What a process holds at a time: records that wait to be written to their parts, and records of
# a part that were read to be put in order.
_RUN_BYTES = 32 << 20
_WINDOW_BYTES = 16 << 20
# Bytes between two records that are read and thrown away: one more read costs about as much.
_BRIDGE_BYTES = 8 << 10
# Records that lie together are read together, this much at a time.
_SPAN_BYTES = 1 << 20
_DRAWS_AT_ONCE = 256
_PLACE = np.dtype([("file", np.int64), ("offset", np.int64), ("size", np.int64)])
# A record on its way: its piece, its row in it, bytes of its own id and of its source; then these
# two, and its messages or tokens.
_HEAD = struct.Struct("<IQII")
_NO_ID = (1 << 32) - 1
# Messages as shards hold them, so that they are encoded once; to be tokenised they need not be.
_escaped = json.JSONEncoder().encode
_plain = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterJob:
    """Read some pieces into records that know their part.

    Attributes:
        pieces: What to read, one after the other.
        first: Number of the first of them among all.
        num_parts: Parts that records are drawn to.
        seed: Of the draw.
        source_field: Field that names a record's source, or None.
        fields: Names in the data for known ones.
        tokenised: Whether the messages become tokens, and not what shards hold.
        work_dir: Where the results go.
    """

    pieces: tuple[Piece, ...]
    first: int
    num_parts: int
    seed: int
    source_field: str | None
    fields: FieldMap | None
    tokenised: bool
    work_dir: Path

    @property
    def num_bytes(self) -> int:
        """On disk, about."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherJob:
    """Write one part as shards.

    Attributes:
        number: Of the part.
        scattered: (num_jobs,) number of the first piece of each job that has read some.
        stems: (num_pieces,) name of the input of each piece.
        first_rows: (num_pieces,) rows of its input that come before each piece.
        seed: Of the order inside the part.
        tokenizer: Path or name to load it by; None leaves messages as they are.
        max_length: Tokens kept of a record; None keeps all.
        truncate: What is done with a longer one.
        masked: Whether samples have an attention mask: rows that were tokenised before may hold
            padding, and a collator that does not pad needs it.
        shard_bytes: Limit of a shard.
        work_dir: Where the pieces are, and the manifest goes.
        out: Directory of the corpus.
    """

    number: int
    scattered: tuple[int, ...]
    stems: tuple[str, ...]
    first_rows: tuple[int, ...]
    seed: int
    tokenizer: str | None
    max_length: int | None
    truncate: Truncate
    masked: bool
    shard_bytes: int
    work_dir: Path
    out: Path


def scatter(job: ScatterJob, advance: Callable[[int], None]) -> None:
    """Write the records of some pieces to one file, in runs that are sorted by part.

    Leaves the records in `piece-N.bin`, where each of them ends in `piece-N.ends`, how many there
    are of each run and part in `piece-N.npy` and, when all that is on disk, the manifest
    `piece-N.json`. N is the number of the first piece: small files would cost more to be synced to
    disk one by one than to be read.
    """
    tally, rows, before = Tally(), [], 0
    name = piece_file(job.work_dir, job.first, "")
    with open(f"{name}.bin", "wb") as data, open(f"{name}.ends", "wb") as ends:
        runs = _Runs(data, ends, job.num_parts)
        for number, piece in enumerate(job.pieces, start=job.first):
            report = partial(_advance_from, advance, before)
            rows.append(_scatter_piece(job, piece, number, runs, tally, report))
            before += piece.num_bytes
        counts = runs.finish()
        for file in (data, ends):
            file.flush()
            os.fsync(file.fileno())
    with open(f"{name}.npy", "wb") as index:
        np.save(index, counts)
        os.fsync(index.fileno())
    sizes, records = runs.part_bytes.tolist(), counts.sum(axis=0).tolist()
    manifest = {"part_sizes": records, "part_bytes": sizes, "rows": rows, "tally": tally.to_dict()}
    write_json(Path(f"{name}.json"), manifest)


def _scatter_piece(
    job: ScatterJob,
    piece: Piece,
    number: int,
    runs: _Runs,
    tally: Tally,
    advance: Callable[[int], None],
) -> int:
    """Rows of the piece, whose records have been added to the runs."""
    columns = columns_to_read(job.fields, job.source_field, tokenised=job.tokenised)
    draws = generator(job.seed, Purpose.CORPUS_PARTS, number)
    parts: list[int] = []
    row, kept = -1, tally.counts.total()
    for row, found in enumerate(read(piece, columns, advance)):
        # One draw per row, kept or not: no record's part hangs on what becomes of others.
        if row % _DRAWS_AT_ONCE == 0:
            parts = draws.integers(job.num_parts, size=_DRAWS_AT_ONCE).tolist()
        if found is None:
            continue
        try:
            if isinstance(found, DropReason):
                raise RecordDropped(found)
            record = normalise(
                found,
                source_field=job.source_field,
                fields=job.fields,
                tokenised=job.tokenised,
            )
            source = piece.stem if record.source is None else record.source
            packed = _pack(number, row, record, source, job.tokenised)
        except RecordDropped as dropped:
            tally.drop(dropped.reason, number, row, dropped.detail)
            continue
        if record.unused:
            tally.pass_over(record.unused)
        runs.add(parts[row % _DRAWS_AT_ONCE], packed)
        tally.keep(source)
    tally.rows += row + 1
    # Whole columns of tables are not even read.
    tally.pass_over(other_columns(piece, columns), tally.counts.total() - kept)
    return row + 1


def gather(job: GatherJob, advance: Callable[[int], None]) -> None:
    """Write one part as shards, in its drawn order.

    Leaves the directory `part-N` in the corpus, unless nothing is kept, and then its manifest.
    """
    tally = Tally()
    name = part_name(job.number)
    places = _places_of_part(job)
    order = generator(job.seed, Purpose.CORPUS_PLACES, job.number).permutation(len(places))
    # Of this process only: a worker that outlives its parent by a moment must not meet its heir.
    unfinished = job.work_dir / f"{name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    columns = RAW_COLUMNS if job.tokenizer is None else TOKEN_COLUMNS
    if job.masked:
        columns = {**columns, ATTENTION: "ndarray:uint8"}
    with open_writer(unfinished, columns, shard_bytes=job.shard_bytes) as writer:
        for done, packed in enumerate(_texts(job, places[order])):
            if done % _REPORT_RECORDS == 0:
                advance(done)
            piece, row, own_id, source, messages = _unpack(packed)
            if own_id is None:
                own_id = f"{job.stems[piece]}-{job.first_rows[piece] + row}".encode()
            sample: dict[str, Any] = {"id": own_id, "source": source}
            try:
                if job.tokenizer is None:
                    sample["messages"] = messages
                else:
                    told, options = json.loads(messages), (job.max_length, job.truncate)
                    if isinstance(told, list):
                        tokens, encoded = tokenise(job.tokenizer, told, *options)
                    else:
                        tokens, encoded = take_tokens(
                            job.tokenizer, told, *options, masked=job.masked
                        )
                    if job.masked:
                        tokens.setdefault(ATTENTION, np.ones_like(tokens["supervised"]))
                    sample |= tokens
                    tally.truncated += encoded.truncated
                    tally.shared += encoded.shared
            except RecordDropped as dropped:
                tally.drop(dropped.reason, piece, row, dropped.detail)
                continue
            writer.write_encoded(sample, _ENCODED)
            tally.keep(source.decode())
    files: dict[str, int] = {}
    if tally.counts:
        files = _settle(unfinished, job.out / name)
    else:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json(job.work_dir / f"{name}.json", {"files": files, "tally": tally.to_dict()})


class _Runs:
    """Records that wait for being written, sorted by part.

    State: those of the current run, and the bytes of each part so far.
    """

    def __init__(self, data: IO[bytes], ends: IO[bytes], num_parts: int) -> None:
        self._data = data
        self._ends = ends
        self._written = 0
        self.part_bytes: IntArray = np.zeros(num_parts, dtype=np.int64)
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
        return np.array(self._counts, dtype=np.int64).reshape(-1, len(self.part_bytes))

    def _flush(self) -> None:
        parts = np.array(self._parts, dtype=np.int64)
        order = np.argsort(parts, kind="stable")
        texts = [self._texts[place] for place in order.tolist()]
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        self._data.writelines(texts)
        self._ends.write((self._written + np.cumsum(sizes)).tobytes())
        self._written += self._num_bytes
        self._counts.append(np.bincount(parts, minlength=len(self.part_bytes)).astype(np.int64))
        np.add.at(self.part_bytes, parts[order], sizes)
        self._parts, self._texts, self._num_bytes = [], [], 0


def _places_of_part(job: GatherJob) -> NDArray[Any]:
    """(records of the part,) where they are, in the order of the pieces."""
    found = [np.zeros(0, dtype=_PLACE)]
    for file in job.scattered:
        counts, most = records_of_runs(job.work_dir, file, job.number)
        firsts = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        with open(piece_file(job.work_dir, file, ".ends"), "rb") as ends:
            for run in range(len(counts)):
                slot = run * counts.shape[1] + job.number
                low, high = int(firsts[slot]), int(firsts[slot + 1])
                # A record starts where the one before it ends, be that of another part.
                ends.seek(8 * max(low - 1, 0))
                bounds = np.frombuffer(ends.read(8 * (high - max(low - 1, 0))), dtype=np.int64)
                if low == 0:
                    bounds = np.concatenate([[0], bounds])
                ascending = len(bounds) > high - low and bool(np.all(np.diff(bounds) >= 0))
                require_ours(Path(ends.name), ascending and 0 <= bounds[0] <= bounds[-1] <= most)
                places = np.zeros(high - low, dtype=_PLACE)
                places["file"] = file
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
        yield from _window(job.work_dir, places[start:stop])
        start = stop


def _window(work_dir: Path, places: NDArray[Any]) -> list[bytes]:
    """The records at these places, in this order; read file by file, and forwards."""
    texts: list[bytes] = [b""] * len(places)
    order = np.lexsort((places["offset"], places["file"]))
    file, begin = places["file"][order], places["offset"][order]
    end = begin + places["size"][order]
    new_file = file[1:] != file[:-1]
    far = begin[1:] - end[:-1] > _BRIDGE_BYTES
    new_span = new_file | far | (begin[1:] // _SPAN_BYTES != begin[:-1] // _SPAN_BYTES)
    files = [0, *(np.flatnonzero(new_file) + 1).tolist(), len(order)]
    spans = [*(np.flatnonzero(new_span) + 1).tolist(), len(order)]
    wanted, begins, ends = order.tolist(), begin.tolist(), end.tolist()
    low = 0
    for first, last in pairwise(files):
        with open(piece_file(work_dir, int(file[first]), ".bin"), "rb", buffering=0) as data:
            while low < last:
                high = spans.pop(0)
                base = begins[low]
                span = os.pread(data.fileno(), ends[high - 1] - base, base)
                for n in range(low, high):
                    texts[wanted[n]] = span[begins[n] - base : ends[n] - base]
                low = high
    return texts


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


def _pack(
    piece: int,
    row: int,
    record: Record,
    source: str,
    tokenised: bool,
) -> bytes:
    own_id = record.id
    try:
        told = (_plain if tokenised else _escaped)(record.tokens or record.messages)
        # Escaped, half a character passes for one.
        if not tokenised and "\\ud" in told:
            _plain(record.messages).encode()
        ids = b"" if own_id is None else own_id.encode()
        sources = source.encode()
        head = _HEAD.pack(piece, row, _NO_ID if own_id is None else len(ids), len(sources))
        return b"".join((head, ids, sources, told.encode()))
    except UnicodeEncodeError as error:
        raise RecordDropped(DropReason.NOT_UNICODE) from error
    except TypeError as error:
        # Texts are texts by now; tools of a table may hold dates.
        raise RecordDropped(DropReason.BAD_TOOLS, str(error)) from error


def _unpack(packed: bytes) -> tuple[int, int, bytes | None, bytes, bytes]:
    """Piece, row, own id, source and messages of a record."""
    piece, row, id_bytes, source_bytes = _HEAD.unpack_from(packed)
    begin = _HEAD.size + (0 if id_bytes == _NO_ID else id_bytes)
    own_id = None if id_bytes == _NO_ID else packed[_HEAD.size : begin]
    return piece, row, own_id, packed[begin : begin + source_bytes], packed[begin + source_bytes :]


def _advance_from(advance: Callable[[int], None], before: int, done: int) -> None:
    advance(before + done)
