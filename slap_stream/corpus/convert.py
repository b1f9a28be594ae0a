"""Inputs of any known kind to one shuffled corpus of MDS shards; can be cut off and started again.

All work happens in a hidden folder of the output directory until it is done: `plan.json` (what is
asked for), one manifest per piece of the inputs, one per part of the corpus. What has a manifest is
never done again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from slap_stream.core.checks import require_whole
from slap_stream.core.files import writable
from slap_stream.core.processes import usable_cores
from slap_stream.core.room import require_room, told_when_full
from slap_stream.core.work_dir import claimed, run_missing
from slap_stream.corpus.field_map import FieldMap
from slap_stream.corpus.inputs import Input, cut, find_inputs, read_together
from slap_stream.corpus.loaded import check_tokenizer, loaded_kind
from slap_stream.corpus.messages import RecordDropped
from slap_stream.corpus.peeking import peek
from slap_stream.corpus.readers import Piece
from slap_stream.corpus.records import check_map, normalise
from slap_stream.corpus.report import ConvertReport, describe, finished
from slap_stream.corpus.shuffle import (
    GatherJob,
    ScatterJob,
    gather,
    scatter,
)
from slap_stream.corpus.tally import Tally
from slap_stream.corpus.token_rows import holds_tokens
from slap_stream.corpus.tokenising import find_tokenizer, load_tokenizer, tokenizer_digest
from slap_stream.corpus.work_files import part_manifest, part_name, piece_manifest
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.remote.output import output_to
from slap_stream.shards.index import INDEX_NAME, SHARD_BYTES, merge_indexes
from slap_stream.text.chat import ATTENTION, Truncate, check_truncate, encode

logger = logging.getLogger(__name__)

WORK_NAME = ".convert"

_PLAN_VERSION, _WORK_VERSION = 2, 3
_SHARDS_PER_PART = 4
_SOURCE_FIELD = "source"
_MAX_PARTS = 512
# A small corpus is still cut into some parts, so that it can be written by several processes.
_SMALL_PARTS, _SMALL_PART_BYTES = 8, 1 << 20
# Below this much text, starting processes takes longer than the work.
_ALONE_BYTES = 128 << 20
_ALONE_BYTES_TOKENISED = 16 << 20


def convert(
    inputs: Any,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    truncate: Truncate = "right",
    seed: int = 0,
    num_workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    source_field: str | None = _SOURCE_FIELD,
    fields: Mapping[str, str] | None = None,
    scratch_dir: str | Path | None = None,
    progress: bool | None = None,
    command: str | None = None,
) -> ConvertReport:
    """Convert inputs to one corpus of MDS shards, shuffled across all of them.

    The order depends on the inputs and the seed only. Memory depends neither on the size of the
    inputs nor on that of their files; a copy of the text lies in `out` until the end. A call that
    was cut off, by whatever, goes on when it is made again; one that had ended returns its report.

    Args:
        inputs: JSON (a record a line or one array; plain, gz, zst), CSV and TSV likewise, Parquet,
            Arrow or Feather files, Hugging Face datasets saved to disk, or directories of such
            files, or `datasets.Dataset`s and `IterableDataset`s that are loaded: one or several.
            `records.KNOWN_SHAPES` is what they may hold.
        out: Directory of the corpus, new or empty or left by the same call; or a URL of an object
            store, where the corpus is put when it is whole here.
        tokenizer: Path or name of a Hugging Face tokenizer; None keeps messages.
        max_length: Tokens kept of a record; None keeps all.
        truncate: What is done with a longer record: "right" keeps its start, "left" its end with
            the token of the beginning, "drop" leaves it out.
        seed: Of the shuffle.
        num_workers: Processes; None means one per core, or none but this for little text.
        shard_bytes: Size above which a new shard is started.
        source_field: Field that names a record's source; None: all of an input is one source.
        fields: What known names are called in the data, where it has others: `{"instruction":
            "question", "output": "answers.0"}`; dots lead into what lies inside of a field.
        scratch_dir: Where to work for a URL, on a local disk with room for the corpus and a copy of
            the text; None: a folder of this user's in the one for temporary files.
        progress: Whether to show a bar on stderr; None means if that is a terminal.
        command: What to write into corpus.json as the command that made it.

    Raises:
        ConfigError: If an option is out of range.
        CorpusError: If an input cannot be used, nothing is left of the inputs, or `out` holds
            something else.
        RemoteError: If a file of an object store or of the web cannot be had or written.
    """
    started = time.monotonic()
    seed = require_whole("seed", seed, 0)
    shard_bytes = require_whole("shard_bytes", shard_bytes, 1)
    if num_workers is not None:
        num_workers = require_whole("num_workers", num_workers, 0)
    if max_length is not None and tokenizer is None:
        raise ConfigError(
            f"max_length must be None without a tokenizer, got {max_length!r}; it counts tokens."
        )
    if max_length is not None:
        max_length = require_whole("max_length", max_length, 2)
    check_truncate(truncate, max_length)
    mapped = check_map(fields)
    place = output_to("out", out, scratch_dir, last=INDEX_NAME)
    out = place.local
    found = find_inputs(_several(inputs), mapped, tokenised=tokenizer is not None)
    for entry in found:
        check_tokenizer(entry.dataset, tokenizer, mapped)
    pieces_of = [cut(entry) for entry in found]
    name = None if tokenizer is None else find_tokenizer(tokenizer)
    tokens, masked = _try_first_records(found, pieces_of, name, max_length, source_field, mapped)

    text_bytes = sum(entry.text_bytes for entry in found)
    num_parts = _num_parts(text_bytes, shard_bytes)
    plan: dict[str, Any] = {
        "plan_version": _PLAN_VERSION,
        "inputs": [entry.fingerprint() for entry in found],
        "tokenizer": name,
        "tokenizer_digest": None if name is None else tokenizer_digest(name),
        "max_length": max_length,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "source_field": source_field,
        "num_parts": num_parts,
    }
    # Left out where they say nothing, so that corpora of before are found again.
    if truncate != "right":
        plan["truncate"] = truncate
    if mapped is not None:
        plan["fields"] = mapped.to_dict()
    if tokens:
        # Texts beside them were what counted once.
        plan["tokens"] = True
    earlier = finished(place, WORK_NAME, plan, progress)
    if earlier is not None:
        return earlier
    place.claim(plan)
    alone_bytes = _ALONE_BYTES if name is None else _ALONE_BYTES_TOKENISED
    readers = writers = num_workers
    if readers is None:
        readers = 1 if text_bytes < alone_bytes else usable_cores()
    if not all(entry.travels for entry in found):
        readers = 1

    pieces = [piece for group in pieces_of for piece in group]
    work_dir = out / WORK_NAME
    _require_ours(out)
    # How the work is laid out says nothing about what comes of it: a finished corpus is the same.
    work = plan | {"work_version": _WORK_VERSION}
    # A copy of the text, and the shards.
    needed = 2 * text_bytes
    with (
        claimed(
            work_dir,
            work,
            result=out,
            name="out",
            overwrite=None,
            derived=("num_parts", "work_version"),
        ),
        told_when_full("out", out, needed),
    ):
        # Of processes that were killed.
        for unfinished in work_dir.glob("part-*.*/"):
            shutil.rmtree(unfinished)
        scatter_jobs = [
            ScatterJob(
                pieces=tuple(pieces[first:last]),
                first=first,
                num_parts=num_parts,
                seed=seed,
                source_field=source_field,
                fields=mapped,
                tokenised=name is not None,
                work_dir=work_dir,
            )
            for first, last in pairwise(read_together(pieces))
        ]
        resumed = sum(len(job.pieces) for job in scatter_jobs if _job_manifest(job))
        if not resumed:
            require_room("out", out, needed, exact=False)
        # Of a stream nothing but the rows can be told, and those only of one that is read alone.
        sizes_known = any(piece.num_bytes for piece in pieces)
        read, _ = run_missing(
            scatter,
            scatter_jobs,
            [job.num_bytes for job in scatter_jobs],
            _job_manifest,
            num_workers=readers,
            bar_options=_bar_options("read", "B" if sizes_known else " rows", progress),
        )
        dropped = Tally.total(read)
        first_rows = _first_rows(pieces_of, read)
        name_place = _place_namer(pieces, first_rows)
        _require_samples(dropped, name_place, work_dir)
        _warn_of_nothing(found, pieces_of, read)

        gather_jobs = [
            GatherJob(
                number=number,
                scattered=tuple(job.first for job in scatter_jobs),
                stems=tuple(piece.stem for piece in pieces),
                first_rows=first_rows,
                seed=seed,
                tokenizer=name,
                max_length=max_length,
                truncate=truncate,
                masked=masked,
                shard_bytes=shard_bytes,
                work_dir=work_dir,
                out=out,
            )
            for number in range(num_parts)
        ]
        if writers is None:
            # Known by now, also where the inputs could not tell.
            read_bytes = sum(sum(manifest["part_bytes"]) for manifest in read)
            writers = 1 if read_bytes < alone_bytes else usable_cores()
        left = [n for n in range(num_parts) if part_manifest(work_dir, out, n) is None]
        part_bytes = [sum(manifest["part_bytes"][n] for manifest in read) for n in left]
        # Messages are in shards what they are in the copy, to the byte; of tokens it is a guess.
        require_room("out", out, sum(part_bytes), exact=name is None)
        part_sizes = [manifest["part_sizes"] for manifest in read]
        written, resumed_parts = run_missing(
            gather,
            gather_jobs,
            [sum(sizes[number] for sizes in part_sizes) for number in range(num_parts)],
            lambda job: part_manifest(work_dir, out, job.number),
            num_workers=writers,
            bar_options=_bar_options("write", " records", progress),
        )
        tally = Tally.total(written)
        tally.add_dropped(dropped)
        _require_samples(tally, name_place, work_dir)
        if source_field not in (None, _SOURCE_FIELD) and tally.counts.keys() <= {
            entry.stem for entry in found
        }:
            logger.warning(
                "no record has a field %r, so that each input is a source; source_field names the "
                "one that says where a record is from.",
                source_field,
            )
        parts = [out / part_name(n) for n, part in enumerate(written) if part["files"]]
        report = ConvertReport(
            out=str(place),
            format="messages" if name is None else "tokens",
            num_samples=tally.counts.total(),
            counts=dict(sorted(tally.counts.items())),
            dropped=dict(sorted(tally.dropped.items())),
            examples=tally.name_places(name_place),
            truncated=tally.truncated,
            shared=tally.shared,
            unused=dict(sorted((dropped.unused).items())),
            num_pieces=len(pieces),
            num_parts=len(parts),
            resumed=resumed + resumed_parts,
            seconds=round(time.monotonic() - started, 3),
        )
        describe(out, report, plan, command)
        # Last: a directory with an index is a whole corpus.
        merge_indexes(out, parts)
        shutil.rmtree(work_dir)
    place.publish(progress=progress)
    return report


def _job_manifest(job: ScatterJob) -> dict[str, Any] | None:
    return piece_manifest(
        job.work_dir, job.first, num_pieces=len(job.pieces), num_parts=job.num_parts
    )


def _several(inputs: Any) -> list[Any]:
    one = isinstance(inputs, str | Path) or loaded_kind(inputs) is not None
    return [inputs] if one else list(inputs)


def _require_ours(out: Path) -> None:
    held = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    if held and WORK_NAME not in held:
        raise CorpusError(
            f"out must be new, empty or left by the same call, got {str(out)!r} with {held[:5]!r} "
            f"({len(held)} in all); choose another directory."
        )


def _num_parts(text_bytes: int, shard_bytes: int) -> int:
    by_size = -(-text_bytes // (_SHARDS_PER_PART * shard_bytes))
    return max(1, min(by_size, _MAX_PARTS), min(text_bytes // _SMALL_PART_BYTES, _SMALL_PARTS))


def _try_first_records(
    found: Sequence[Input],
    pieces_of: Sequence[Sequence[Piece]],
    tokenizer: str | None,
    max_length: int | None,
    source_field: str | None,
    mapped: FieldMap | None,
) -> tuple[bool, bool]:
    """Find out on a few records what would fail on all, before any work is done.

    Returns:
        Whether some of them are tokens; whether some of those have an attention mask.
    """
    tokens, masked, tokenised = False, False, tokenizer is not None
    for entry, pieces in zip(found, pieces_of, strict=True):
        failure: CorpusError | None = None
        for row in peek(entry, pieces, mapped, tokenised=tokenised):
            tokens = tokens or (tokenised and mapped is None and holds_tokens(row))
            try:
                record = normalise(
                    row, source_field=source_field, fields=mapped, tokenised=tokenised
                )
                if record.tokens is not None:
                    masked = masked or ATTENTION in record.tokens
                elif tokenizer is not None:
                    encode(load_tokenizer(tokenizer), record.messages, max_length=max_length)
            except RecordDropped:
                continue
            except CorpusError as error:
                failure = error
            else:
                break
        else:
            if failure is not None:
                raise CorpusError(
                    f"tokenizer must fit the records of {entry.name!r}, got {tokenizer!r}, "
                    f"which fits none of the first: {failure}"
                ) from failure
    return tokens, masked


def _bar_options(stage: str, unit: str, progress: bool | None) -> dict[str, Any]:
    hidden = None if progress is None else not progress
    return {"desc": stage, "unit": unit, "unit_scale": True, "disable": hidden}


def _first_rows(
    pieces_of: Sequence[Sequence[Piece]], manifests: Sequence[Mapping[str, Any]]
) -> tuple[int, ...]:
    """(num_pieces,) rows of its input before each piece."""
    rows = iter([n for manifest in manifests for n in manifest["rows"]])
    first_rows: list[int] = []
    for pieces in pieces_of:
        before = 0
        for _ in pieces:
            first_rows.append(before)
            before += next(rows)
    return tuple(first_rows)


def _warn_of_nothing(
    found: Sequence[Input],
    pieces_of: Sequence[Sequence[Piece]],
    manifests: Sequence[Mapping[str, Any]],
) -> None:
    """Name the inputs without a record, which may be what a failed download left behind."""
    rows = iter([n for manifest in manifests for n in manifest["rows"]])
    read = [sum(next(rows) for _ in pieces) for pieces in pieces_of]
    empty = [entry.name for entry, count in zip(found, read, strict=True) if not count]
    if empty:
        logger.warning("%d inputs hold no records: %s.", len(empty), ", ".join(empty[:5]))


def _require_samples(tally: Tally, name_place: Callable[[int, int], str], work_dir: Path) -> None:
    if tally.counts:
        return
    examples = tally.name_places(name_place)
    reasons = [f"{reason}: {n} ({examples[reason][0]})" for reason, n in tally.dropped.items()]
    # Trying again would change nothing, so that it is not worth being kept.
    shutil.rmtree(work_dir)
    raise CorpusError(
        f"inputs must hold at least one record that can be used, got none; left out were "
        f"{'; '.join(reasons) or 'no records at all'}."
    )


def _place_namer(pieces: Sequence[Piece], first_rows: Sequence[int]) -> Callable[[int, int], str]:
    def name(piece: int, row: int) -> str:
        number = first_rows[piece] + row
        path = writable(str(pieces[piece].path))
        return f"{path}:{number + 1}" if pieces[piece].kind == "lines" else f"{path}[{number}]"

    return name
