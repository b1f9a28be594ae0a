"""Ranks that wait while one of them prepares a dataset."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.dying_ranks import DEATHS, WORK_SECONDS
from tests.loader.test_ranks import run_module


def test_a_rank_that_dies_at_any_point_is_an_error_and_no_wait_of_days(tmp_path: Path) -> None:
    run_module("tests.helpers.dying_ranks", tmp_path)
    told = {
        death: json.loads((tmp_path / f"{death[0]}{death[1]}-rank0.json").read_text())
        for death in DEATHS
    }
    # Longer than it would be waited for without a sign of life.
    assert told.pop(("never", 0))["told"] == "found"
    for death, found in told.items():
        message, _, reason = found["told"].partition(" until it is there, got an error on ")
        assert message == "all ranks must come to prepare their dataset and stay", death
        assert reason.endswith("; see what the others say."), death
        assert found["seconds"] < WORK_SECONDS + 20
