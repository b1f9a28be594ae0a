"""The bar shows where an epoch is, and changes no batch, whatever becomes of its terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from slap_stream.loader.progress_bar import ProgressBar
from tests.laws import config_of
from tests.loader.test_loader import BATCH, NUM_SAMPLES, feed, make, run


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        """Everything that was drawn, the latest last."""
        return [line.strip() for line in re.split(r"[\r\n]", self.getvalue()) if line.strip()]


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What stands for stderr in a test. (No fixture: pytest sets stderr anew after it.)"""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def drawn(line: str) -> dict[str, float]:
    """Numbers of a bar."""
    found = re.match(
        r"epoch (?P<epoch>\d+): +(?P<share>\d+)%\|.*\| (?P<done>\d+)/(?P<all>\d+) \[.*"
        r"kept=(?P<kept>\d+)%, pruned=(?P<pruned>\d+), loss=(?P<loss>[\d.]+)\]",
        line,
    )
    assert found is not None, line
    return {name: float(value) for name, value in found.groupdict().items()}


def test_an_epoch_of_as_many_steps_as_full_data_is_counted_in_samples(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_of(monkeypatch)
    config = config_of(num_lanes=2, lookahead=4, keep=0.5, steps="full")
    loader = make(corpus, config=config, progress=True)
    for batch in loader:
        feed(loader, batch)
    last = terminal.lines[-1]
    assert f" {NUM_SAMPLES}/{NUM_SAMPLES} [" in last
    # How many it was offered is another number, of which the share that is kept would be.
    assert "samples/s" in last
    assert "kept" not in last


@pytest.mark.parametrize("keep", [0.7, "auto"])
def test_the_bar_ends_with_all_candidates_and_changes_no_batch(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    terminal = terminal_of(monkeypatch)

    def new(**options: Any) -> Any:
        # Early, so that "auto" has found something before the epoch is over.
        config = config_of(num_lanes=2, lookahead=4, keep=keep, keep_min=0.3)
        return make(corpus, config=config, **options)

    plain, shown = new(), new(progress=True)
    for epoch in range(2):
        # Broken off and gone on with, as after an evaluation.
        batches = [feed(shown, batch) for batch in islice(shown, 5)]
        batches += [feed(shown, batch) for batch in shown]
        assert batches == [feed(plain, batch) for batch in plain]
        last = drawn(terminal.lines[-1])
        trained = sum(map(len, batches))
        assert (last["epoch"], last["share"]) == (epoch, 100)
        assert last["done"] == last["all"] == NUM_SAMPLES
        assert last["pruned"] == NUM_SAMPLES - trained
        assert last["kept"] == pytest.approx(100 * trained / NUM_SAMPLES, abs=0.5)
        # One bar an epoch, not one an iteration.
        assert sum("| 0/400" in line for line in terminal.lines) == epoch + 1
    shown.close()


def test_a_resumed_run_shows_what_the_unbroken_one_does(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_of(monkeypatch)
    loader = make(corpus, progress=True)
    run(loader, 5)
    state = loader.state_dict()
    run(loader, len(loader) - 5)
    unbroken = drawn(terminal.lines[-1])
    again = make(corpus, progress=True)
    again.load_state_dict(state)
    run(again, len(loader) - 5)
    resumed = drawn(terminal.lines[-1])
    assert {**resumed, "loss": 0} == {**unbroken, "loss": 0}


def test_a_terminal_that_is_gone_costs_the_bar_and_no_batch(
    corpus: Path,
    unbroken: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    terminal = terminal_of(monkeypatch)
    loader = make(corpus, progress=True)
    assert run(loader, 3) == unbroken[:3]
    terminal.gone = True
    with caplog.at_level(logging.WARNING):
        # Its last line is drawn whatever the time.
        assert run(loader, len(loader) - 3) == unbroken[3 : len(loader)]
    assert caplog.text.count("the progress bar is not drawn any more: BrokenPipeError") == 1


def test_where_there_is_no_terminal_nothing_is_drawn(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make(corpus, progress=True), 3)
    assert capsys.readouterr().err == ""


def test_the_bar_counts_what_all_ranks_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    bar = ProgressBar(10 * BATCH, 2)
    bar.begin(0, 0, 0.0)
    for step in range(1, 4):
        bar.count(BATCH, step / 3)
    bar.close()
    assert "160/160" in terminal.lines[-1]
    assert "kept=60%, pruned=64]" in terminal.lines[-1]
