"""The progress line: quiet unless asked for, and then not too often."""

from __future__ import annotations

import logging

import pytest

from slap_stream.loader.status_line import StatusLine

METRICS = {"trained": 1280.0, "pruned": 549.0}


class Clock:
    """Time that passes when it is told to."""

    now = 5.0

    def __call__(self) -> float:
        return self.now


def _run(caplog: pytest.LogCaptureFixture, metrics: dict[str, float]) -> list[str]:
    """Ten batches of 64, one a second, then the epoch's last after a pause that is not counted."""
    clock = Clock()
    line = StatusLine(3.0, clock)
    for step in range(1, 11):
        clock.now += 1.0
        line.count(64, step / 20, lambda step=step: {**metrics, "epoch": 2 + step / 20})  # type: ignore[misc]
    clock.now += 100.0
    line.restart()
    clock.now += 4.0
    line.count(64, 1.0, lambda: {**metrics, "epoch": 3.0})
    return [record.getMessage() for record in caplog.records]


def test_nothing_is_said_and_nothing_counted_unless_somebody_listens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="slap_stream"):
        # Metrics that lack everything: asking for them would raise.
        assert _run(caplog, {}) == []


def test_a_line_says_how_fast_and_how_far(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="slap_stream"):
        lines = _run(caplog, METRICS)
    counts = "1,280 trained on, 549 pruned"
    assert lines == [
        f"epoch 2, 15%: 64 samples/s, {counts}",
        f"epoch 2, 30%: 64 samples/s, {counts}",
        f"epoch 2, 45%: 64 samples/s, {counts}",
        f"epoch 2, 100%: 16 samples/s, {counts}",
    ]


def test_the_probes_cost_is_told_where_there_is_a_probe(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="slap_stream"):
        lines = _run(caplog, {**METRICS, "probe_seconds": 7.25})
    assert lines[0].endswith("549 pruned; probe 7.2 s so far")
