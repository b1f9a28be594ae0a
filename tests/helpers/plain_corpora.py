"""Stands in for `slap_stream.shards.writer` in tests that start processes, which would each need
seconds to load streaming; and the records that such tests write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPLACED = "slap_stream.shards.writer"


def stand_in() -> None:
    """Be the module of the writer, in this process."""
    sys.modules[REPLACED] = sys.modules[__name__]


class PlainWriter:
    """Takes samples for one shard of JSON lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, sample: dict[str, Any]) -> None:
        self.lines.append(json.dumps(sample))


@contextmanager
def open_writer(
    out_dir: Path, columns: Mapping[str, str], *, shard_bytes: int
) -> Iterator[PlainWriter]:
    out_dir.mkdir()
    writer = PlainWriter()
    yield writer
    text = "\n".join(writer.lines)
    (out_dir / "shard.00000.mds").write_text(text, encoding="utf-8")
    shard = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [None] * len(columns),
        "compression": None,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(text), "hashes": {}},
        "samples": len(writer.lines),
        "size_limit": shard_bytes,
        "version": 2,
        "zip_data": None,
    }
    (out_dir / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))


def pair(n: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": f"answer {n}"},
        ]
    }


def write_pairs(path: Path, numbers: range) -> Path:
    path.write_text("".join(json.dumps(pair(n)) + "\n" for n in numbers))
    return path


def files_of(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def shards_of(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(out).items() if name != "corpus.json"}
