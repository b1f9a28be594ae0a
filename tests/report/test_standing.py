"""Whether a run goes on is told by its process, and by its log's age where that cannot be seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from slap_stream.loader.run_files import RunEvents
from slap_stream.report.standing import standing
from slap_stream.selection.departures import ROW

NOW = time.time()
# Started before this test, and lives.
MINE = os.getpid()


def events_of(
    *, process: int, host: str = "", began: float = NOW, silent: float = 0.0, ended: bool = False
) -> RunEvents:
    begin = {"process": process, "host": host or socket.gethostname(), "time": began}
    return RunEvents(
        about=begin,
        begins=[begin],
        spans=[],
        values=[],
        rows=np.zeros(0, ROW),
        level=0,
        errors={},
        last=NOW - silent,
        ended=ended,
        unreadable=0,
        straddling=0,
    )


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


@pytest.mark.parametrize(
    ("log", "state", "said"),
    [
        ({}, "going on", "going on"),
        # A long evaluation, or a run that was stopped with Ctrl-Z: its age alone says nothing.
        ({"silent": 1200.0}, "still", "its process lives, but has told nothing for 20.0 min"),
        ({"ended": True}, "closed", "ended"),
        ({"host": "elsewhere"}, "going on", "going on, on elsewhere"),
        ({"host": "elsewhere", "silent": 300.0}, "unknown", "can be seen on elsewhere only"),
        # Another process has its number now.
        ({"began": NOW - 1e9}, "gone", "its process is gone: it was killed, or ended by an error"),
    ],
)
def test_a_run_stands_as_its_process_does(log: dict[str, Any], state: str, said: str) -> None:
    found = standing(events_of(process=MINE, **log), now=NOW)
    assert found.state == state
    assert said in found.said


def test_a_run_that_was_killed_this_second_does_not_go_on(gone: int) -> None:
    assert standing(events_of(process=gone), now=NOW).state == "gone"
