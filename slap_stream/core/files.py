"""Files that are found whole or not at all, and what stands for their content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file that is found whole, old or new, whatever ends this process."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with `write_text`."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that `write_json` wrote, or None if it did not get that far."""
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return manifest


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256, in hex, of the bytes of a file (an index.json, which stands for its dataset)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
