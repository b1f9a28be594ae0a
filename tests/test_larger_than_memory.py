"""A corpus half as large again as the memory that its processes may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

LIMIT_BYTES = 80 << 20


def write_corpus(path: Path, least_bytes: int) -> int:
    """Instruction records of long words that repeat themselves; how many.

    Such are quick to make, to count and to compress.
    """
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) * 60 for _ in range(500)]
    records = 0
    with path.open("w") as file:
        while file.tell() < least_bytes:
            said = [words[i] for i in rng.integers(0, 500, 34)]
            messages = [
                {"role": "user", "content": " ".join(said[:17])},
                {"role": "assistant", "content": " ".join(said[17:])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
            records += 1
    return records


def test_trains_on_a_corpus_half_as_large_again_as_its_memory(tmp_path: Path) -> None:
    records = write_corpus(tmp_path / "corpus.jsonl", 3 * LIMIT_BYTES // 2)
    script = Path(__file__).parent / "helpers" / "limited_run.py"
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(LIMIT_BYTES)],
        capture_output=True,
        text=True,
        timeout=480,
        # Each thread would take a buffer of 32 MB for itself.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert metrics["offered"] == records
    assert metrics["fitted"] == 1
    assert metrics["last_loss"] < metrics["first_loss"] - 0.5
