"""Small inputs of `convert`, and what it has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
