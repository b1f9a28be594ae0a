"""A loader that nobody closes ends its log when it goes, or its process does."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest

from slap_stream.loader import leaving, run_log
from slap_stream.loader.loader import SlapDataLoader
from slap_stream.loader.run_files import event_file, read_log
from tests.loader.test_loader import make, run


def process_ends(loader: SlapDataLoader) -> None:
    """What is called then."""
    leaving._leave(weakref.ref(loader), loader._log, loader._owner, os.getpid())


@pytest.fixture
def no_span_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_SPANS", 1e9)


@pytest.mark.usefixtures("no_span_yet")
def test_the_end_of_the_process_writes_what_was_not_yet_and_the_end(
    corpus: Path, tmp_path: Path
) -> None:
    loader = make(corpus, run_dir=tmp_path)
    trained = sum(map(len, run(loader, 3)))
    assert len(read_log(tmp_path).rows) == 0
    assert not read_log(tmp_path).ended
    process_ends(loader)
    events = read_log(tmp_path)
    assert events.ended
    assert (events.rows["outcome"] == 0).sum() == trained
    size = event_file(tmp_path / "_slap_log", 0).stat().st_size
    loader.close()
    del loader
    gc.collect()
    assert event_file(tmp_path / "_slap_log", 0).stat().st_size == size


def test_a_loader_that_nobody_has_any_more_has_ended_its_log(corpus: Path, tmp_path: Path) -> None:
    loader = make(corpus, run_dir=tmp_path)
    run(loader, 3)
    assert not read_log(tmp_path).ended
    del loader
    gc.collect()
    assert read_log(tmp_path).ended


def test_an_error_that_ends_the_process_leaves_the_log_open(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(corpus, run_dir=tmp_path)
    run(loader, 3)
    monkeypatch.setattr(sys, "last_value", ValueError("not caught"), raising=False)
    process_ends(loader)
    assert not read_log(tmp_path).ended


def test_a_log_that_another_loader_has_taken_up_is_left_to_it(corpus: Path, tmp_path: Path) -> None:
    first = make(corpus, run_dir=tmp_path)
    run(first, 3)
    state = first.state_dict()
    second = make(corpus, run_dir=tmp_path)
    second.load_state_dict(state)
    run(first, 2)  # and is forgotten
    process_ends(first)
    assert not read_log(tmp_path).ended
    process_ends(second)
    assert read_log(tmp_path).ended
