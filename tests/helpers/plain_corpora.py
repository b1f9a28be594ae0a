"""Corpora of plain text, for tests that start processes: importing streaming takes seconds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slap_stream.corpus.convert import ConvertReport, convert


class PlainWriter:
    """Takes samples for one shard of JSON lines."""

    def __init__(self, delay_seconds: float) -> None:
        self.lines: list[str] = []
        self._delay_seconds = delay_seconds

    def write(self, sample: dict[str, Any]) -> None:
        time.sleep(self._delay_seconds)
        plain = {k: v if isinstance(v, str | list) else v.tolist() for k, v in sample.items()}
        self.lines.append(json.dumps(plain))


@contextmanager
def open_plain_writer(
    out_dir: Path, columns: Mapping[str, str], *, shard_bytes: int, delay_seconds: float = 0.0
) -> Iterator[PlainWriter]:
    out_dir.mkdir()
    writer = PlainWriter(delay_seconds)
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


@contextmanager
def open_deadly_writer(
    out_dir: Path, columns: Mapping[str, str], *, shard_bytes: int
) -> Iterator[PlainWriter]:
    """Ends its process as a system without memory does."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield PlainWriter(0.0)


def read_plain(out: Path) -> list[dict[str, Any]]:
    """The samples of a corpus, in sample-id order."""
    index = json.loads((out / "index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    texts = [(out / name).read_text(encoding="utf-8") for name in names]
    return [json.loads(line) for text in texts for line in text.split("\n")]


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


def plain_convert(paths: list[Path], out: Path, **options: Any) -> ConvertReport:
    options = {"open_writer": open_plain_writer, "num_workers": 1, **options}
    return convert(paths, out, **options)
