"""A corpus twice as large as the memory that its processes may use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

LIMIT_BYTES = 112 << 20


def write_corpus(path: Path, least_bytes: int) -> int:
    """Instruction records of long words, which are quick to make and to count; how many."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 100)) for _ in range(500)]
    records = 0
    with path.open("w") as file:
        while file.tell() < least_bytes:
            prompt, target = (" ".join(words[i] for i in rng.integers(0, 500, 50)) for _ in "pt")
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": target},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
            records += 1
    return records


def test_trains_on_a_corpus_twice_as_large_as_its_memory(tmp_path: Path) -> None:
    records = write_corpus(tmp_path / "corpus.jsonl", 2 * LIMIT_BYTES)
    script = Path(__file__).parent / "limited_run.py"
    for stage in ("convert", "embed", "train"):
        result = subprocess.run(
            [sys.executable, str(script), stage, str(tmp_path), str(LIMIT_BYTES)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f"{stage}: {result.stderr[-2000:]}"
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert metrics["offered"] == records
    assert metrics["fitted"] == 1
    assert metrics["last_loss"] < metrics["first_loss"] - 0.5
