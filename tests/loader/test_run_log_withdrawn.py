"""Candidates that leave a pool otherwise than by being chosen or pruned stand in the run's log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slap_stream.loader import run_log
from slap_stream.loader.run_files import RunEvents, read_log
from slap_stream.report.run_facts import RunFacts
from slap_stream.selection.departures import OUTCOMES
from slap_stream.selection.feedback import NOT_FINITE
from tests.laws import config_of
from tests.loader.test_bad_samples import loader_of, run
from tests.loader.test_loader import LOSSES, NUM_SAMPLES, make

FAILING = frozenset(range(0, NUM_SAMPLES, 3))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A span for each batch, however quick."""
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_SPANS", 0.0)


def probe(loader: Any) -> list[int]:
    """Probe some candidates; those that cannot be read, which leave the pool."""
    host = loader.probe_host()
    ids = host.probe_candidates(20)
    host.read_batch(ids)
    host.update(ids, LOSSES[ids], None, {})
    return [int(sample_id) for sample_id in set(ids.tolist()) & FAILING]


def withdrawn(events: RunEvents) -> Counter[int]:
    """Times that each sample was withdrawn, by the rows; as often as by the counts."""
    rows = events.rows[events.rows["outcome"] == OUTCOMES.index("withdrawn")]
    for row in rows[["epoch", "step", "sample_id"]]:
        assert row.item() in events.errors
    assert RunFacts(events).withdrawn == len(rows)
    return Counter(rows["sample_id"].tolist())


@pytest.mark.parametrize("order", [["probe", "save"], ["save", "probe"]])
def test_what_the_probe_withdraws_is_told_once_also_after_a_resume(
    corpus: Path, tmp_path: Path, order: Sequence[str]
) -> None:
    loader = loader_of(corpus, FAILING, run_dir=tmp_path)
    run(loader, 4)
    state: Any = None
    for what in order:
        if what == "save":
            state = loader.state_dict()
            saved = withdrawn(read_log(tmp_path))
        else:
            gone = probe(loader)
            assert gone
    run(loader, 2)  # and is killed
    assert set(gone) <= set(withdrawn(read_log(tmp_path)))
    again = loader_of(corpus, FAILING, run_dir=tmp_path)
    again.load_state_dict(state)
    assert withdrawn(read_log(tmp_path)) == saved
    assert (set(gone) <= set(saved)) == (order[0] == "probe")
    if order[0] == "save":
        assert probe(again) == gone
    run(again, 3)
    again.note(held_out_loss=1.0)
    found = withdrawn(read_log(tmp_path))
    assert set(gone) <= set(found)
    assert set(found.values()) == {1}


def test_candidates_withdrawn_for_their_losses_are_told_of(corpus: Path, tmp_path: Path) -> None:
    loader = make(corpus, run_dir=tmp_path, config=config_of(num_lanes=2, lookahead=0))
    bad: list[int] = []
    for step, batch in enumerate(loader):
        ids = batch["sample_id"].numpy()
        loader.observe(ids, LOSSES[ids])
        if step % 4 == 1:
            host = loader.probe_host()
            probed = np.unique(host.probe_candidates(4))
            bad += probed.tolist()
            host.update(probed, np.full(len(probed), np.nan), None, {})
    metrics, events = loader.metrics(), read_log(tmp_path)
    assert sorted(withdrawn(events).elements()) == sorted(bad)
    assert metrics["withdrawn"] == len(bad)
    assert len(events.rows) == metrics["offered"] == NUM_SAMPLES
    assert set(events.errors.values()) == {NOT_FINITE}
