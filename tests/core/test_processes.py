"""Jobs over worker processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tqdm import tqdm

from slap_stream.core.processes import run_jobs


def test_work_of_a_script_is_refused() -> None:
    def work(job: int, advance: Callable[[int], None]) -> None:
        raise AssertionError("no worker could find it")

    work.__module__ = "__main__"
    with tqdm(disable=True) as bar, pytest.raises(ValueError, match=r"work must be of a module"):
        run_jobs(work, [1, 2], [1, 1], num_workers=2, bar=bar)
