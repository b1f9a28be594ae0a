"""The file of results: one JSON line a run, appended when the run is done."""

from __future__ import annotations

import fcntl
import json
import logging
from pathlib import Path
from typing import Any

from slap_stream.errors import CorpusError
from tools.bench.selection.schedule import RunKey

RESULTS = "results.jsonl"
Row = dict[str, Any]
logger = logging.getLogger(__name__)


def read_rows(results: Path) -> list[Row]:
    """Rows of a file; none if there is no file. A last line that a kill cut short is left out.

    Raises:
        CorpusError: If another line is no result.
    """
    if not results.exists():
        return []
    text = results.read_text()
    lines, rows = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                logger.warning("%s ends with half a line, which is left out.", results)
                break
            raise CorpusError(
                f"results must hold one run a line, got {line[:60]!r} in line {number} of "
                f"{results}; take it out."
            ) from error
        rows.append(row)
    return rows


def append_row(results: Path, row: Row) -> None:
    """Add a run; half a line that a kill left behind is cut off first."""
    with results.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def key_of(row: Row) -> Row:
    """What identifies the run of a row.

    Raises:
        KeyError: If the row lacks a part of it.
    """
    return {name: row[name] for name in RunKey.__slots__}
