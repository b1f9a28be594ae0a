"""What a conversion did, as it tells its caller and as corpus.json keeps it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from slap_stream import __version__
from slap_stream.core.files import write_json
from slap_stream.remote.output import Output
from slap_stream.shards.index import INDEX_NAME

CORPUS_NAME = "corpus.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertReport:
    """What `convert` made, and what it left out.

    Attributes:
        out: Directory of the corpus.
        format: Whether samples hold messages or tokens.
        num_samples: In the corpus.
        counts: Samples per source.
        dropped: Records left out, per reason; a reason names the value that is to blame.
        examples: A few of the places of dropped records per reason: `file:line` (from 1; where
            records are not lines, their number) or, in tables, `file[row]` (from 0).
        truncated: Samples cut to max_length.
        shared: Answers that begin with blanks and share their first token with the header before
            them, which the model never says alone; learnt.
        unused: Records in which a field says something and was not used, per field.
        num_pieces: Pieces that the inputs were read in.
        num_parts: Parts that the corpus was written in.
        resumed: Pieces and parts that an earlier run had done.
        seconds: Taken by this run.
    """

    out: str
    format: Literal["messages", "tokens"]
    num_samples: int
    counts: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    truncated: int
    shared: int
    unused: dict[str, int]
    num_pieces: int
    num_parts: int
    resumed: int = 0
    seconds: float = field(default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return asdict(self)


# Of what corpus.json has of a report.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    **dict.fromkeys(["counts", "dropped", "examples", "unused"], dict),
    **dict.fromkeys(["num_samples", "truncated", "shared", "num_pieces", "num_parts"], int),
    "resumed": int,
    "seconds": (int, float),
}


def describe(
    out: Path, report: ConvertReport, plan: Mapping[str, Any], command: str | None
) -> None:
    """Write down beside the shards what they are."""
    described = report.to_dict() | {
        "tokenizer": plan["tokenizer"],
        "max_length": plan["max_length"],
        "truncate": plan.get("truncate", "right"),
        "seed": plan["seed"],
        "version": __version__,
        "command": command,
        "plan_digest": digest_of(plan),
    }
    # The corpus may be moved.
    del described["out"]
    write_json(out / CORPUS_NAME, described)


def finished(
    place: Output, work_name: str, plan: Mapping[str, Any], progress: bool | None
) -> ConvertReport | None:
    """The report of the same call, if it has ended, here or where its results go."""
    elsewhere = place.described(CORPUS_NAME)
    if elsewhere is not None:
        told = elsewhere.get(CORPUS_NAME, b"{}")
    elif (place.local / INDEX_NAME).is_file() and (place.local / CORPUS_NAME).is_file():
        told = (place.local / CORPUS_NAME).read_bytes()
    else:
        return None
    try:
        saved = json.loads(told)
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict) or saved.get("plan_digest") != digest_of(plan):
        return None
    if not all(isinstance(saved.get(name), kinds) for name, kinds in _KINDS.items()):
        return None
    shutil.rmtree(place.local / work_name, ignore_errors=True)
    if elsewhere is None:
        # By now the place may be another call's.
        place.claim(plan)
        place.publish(progress=progress)
    else:
        place.close()
    report = {name: saved[name] for name in _KINDS}
    report["resumed"] = saved["num_pieces"] + saved["num_parts"]
    return ConvertReport(out=str(place), **report)


def digest_of(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
