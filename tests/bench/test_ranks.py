"""The benchmark of ranks, on a run small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tools.bench import ranks as bench_ranks


def test_ranks_are_compared_and_exchange_in_processes() -> None:
    small = ["--dim", "8", "--features", "1", "--lane-batch", "8", "--steps", "64"]
    # As a script, whose functions worker processes cannot find.
    command = [sys.executable, "-m", "tools.bench.ranks", *small, "--ranks", "2", "--lanes", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("composing", "refreshing", "together"):
        median, low, high = result[f"ratio_{name}"]
        assert 0 < low <= median <= high
    # Joined once, then a refresh every 16th of 32 + 64 batches.
    assert result["each_process"]["exchanges"] == 1 + 6


def test_the_interval_holds_the_median_in_about_19_of_20_samples() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for sample in rng.exponential(size=(1000, 60)):
        median, low, high = bench_ranks.median_with_interval(sample)
        assert low <= median <= high
        held += low <= np.log(2) <= high
    # Of 950 to 970 expected, four standard deviations of a count of 1000.
    assert 920 < held < 995
