"""The log of a run tells what has happened: after kills and resumes, bounded, and for all ranks."""

from __future__ import annotations

import gc
import json
import logging
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.errors import ConfigError, RunLogError
from slap_stream.integrations.trainer_callbacks import held_out_losses
from slap_stream.loader import run_files, run_log
from slap_stream.loader.loader import SlapDataLoader
from slap_stream.loader.run_files import (
    Event,
    RunEvents,
    event_file,
    read_log,
    row_file,
    sampled,
    surviving,
    thinned,
)
from slap_stream.report.run_facts import RunFacts
from slap_stream.selection.departures import OUTCOMES, ROW
from tests.laws import config_of
from tests.loader.test_bad_samples import loader_of
from tests.loader.test_loader import BATCH, NUM_SAMPLES, make, run


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A span for each batch, however quick."""
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_SPANS", 0.0)


def logged(corpus: Path, folder: Path, **options: Any) -> SlapDataLoader:
    return make(corpus, config=config_of(num_lanes=2, lookahead=4), run_dir=folder, **options)


def sums(events: RunEvents) -> Counter[str]:
    """Counts by outcome and stratum, over all spans."""
    total: Counter[str] = Counter()
    for span in events.spans:
        for outcome, by_stratum in span["counts"].items():
            total.update({f"{outcome} {stratum}": n for stratum, n in by_stratum.items()})
    return total


def told(events: RunEvents) -> list[tuple[Any, ...]]:
    """The rows, without which session wrote them."""
    names = [name for name in events.rows.dtype.names or () if name != "session"]
    return sorted(row.item() for row in events.rows[names])


def test_the_log_says_what_the_metrics_do_and_changes_no_batch(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    loader = logged(corpus, tmp_path)
    assert run(loader, len(loader)) == unbroken[: len(loader)]
    loader.note(held_out_loss=2.5, broken=float("nan"))
    events, metrics = read_log(tmp_path), loader.metrics()
    assert metrics["run_log_failed"] == 0
    by_outcome = Counter(row["outcome"] for row in events.rows)
    assert by_outcome[0] == metrics["trained"] == sum(map(len, unbroken[: len(loader)]))
    assert by_outcome.total() == sum(sums(events).values()) == NUM_SAMPLES
    assert sum(span["losses"][1] for span in events.spans) == metrics["observed"]
    assert sum(span["batches"] for span in events.spans) == len(loader)
    assert [(value["name"], value["value"]) for value in events.values] == [("held_out_loss", 2.5)]
    assert events.about["about"]["corpora"] == [str(corpus)]


@pytest.mark.parametrize("cut", [1, 9, 17, 21])
def test_after_a_kill_and_a_resume_the_log_is_that_of_the_unbroken_run(
    corpus: Path, tmp_path: Path, cut: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(logged(corpus, whole), 34)
    loader = logged(corpus, broken)
    run(loader, cut)
    state = loader.state_dict()
    saved = [path(broken / "_slap_log", 0).stat().st_size for path in (event_file, row_file)]
    run(loader, 7)
    # Killed in the middle of writing: what was written since the checkpoint is there in part.
    for path, size in zip((event_file, row_file), saved, strict=True):
        file = path(broken / "_slap_log", 0)
        file.write_bytes(file.read_bytes()[: (size + file.stat().st_size) // 2 + 1])
    half = read_log(broken)
    assert half.unreadable == 0
    again = logged(corpus, broken)
    again.load_state_dict(state)
    run(again, 34 - cut)
    ours, theirs = read_log(broken), read_log(whole)
    assert told(ours) == told(theirs)
    assert sums(ours) == sums(theirs)
    assert ours.straddling == 0
    assert len(ours.begins) == 2


@pytest.mark.parametrize(("handed", "more"), [(1, 3), (7, 6), (17, 4)])
def test_the_log_calls_trained_what_the_loop_was_handed_and_nothing_that_is_ahead(
    corpus: Path, tmp_path: Path, handed: int, more: int
) -> None:
    """Also after a kill and a resume, with samples that turn out to be of no use."""
    failing = frozenset(range(3, NUM_SAMPLES, 11))

    def new() -> Any:
        return loader_of(corpus, failing, run_dir=tmp_path, config={"keep": 0.7})

    def check(batches: list[list[int]]) -> None:
        events = read_log(tmp_path)
        rows, facts = events.rows, RunFacts(events)
        trained = [sample_id for batch in batches for sample_id in batch]
        assert sorted(rows["sample_id"][rows["outcome"] == 0]) == sorted(trained)
        assert facts.trained == len(trained)
        withdrawn = rows[rows["outcome"] == OUTCOMES.index("withdrawn")]
        assert set(withdrawn["sample_id"]) <= failing
        assert facts.withdrawn == len(withdrawn) == len(batches) * BATCH - len(trained)
        for row in withdrawn:
            key = int(row["epoch"]), int(row["step"]), int(row["sample_id"])
            assert events.errors[key] == f"ValueError: no {row['sample_id']}"
        # What spans count is what rows hold.
        by_row: Counter[str] = Counter()
        for row in rows:
            by_row[f"{OUTCOMES[row['outcome']]} {row['stratum']}"] += 1
        assert +sums(events) == by_row
        assert facts.tokens.total() == rows["length"].sum()
        # A number that is noted stands where the run is, not where it has composed up to.
        assert facts.noted["here"][0][-1] == len(trained)

    loader = new()
    batches = run(loader, handed)
    loader.note(here=1.0)
    check(batches)
    state = loader.state_dict()
    run(loader, 5)  # and is killed
    again = new()
    again.load_state_dict(state)
    batches += run(again, more)
    again.note(here=2.0)
    check(batches)


def test_the_last_batches_of_an_epoch_are_told_of_without_feedback(
    corpus: Path, tmp_path: Path
) -> None:
    loader = logged(corpus, tmp_path)
    ids = [sample_id for batch in loader for sample_id in batch["sample_id"].tolist()]
    events = read_log(tmp_path)
    assert sorted(events.rows["sample_id"][events.rows["outcome"] == 0]) == sorted(ids)
    assert not events.ended
    loader.close()
    # As a Trainer that evaluates after its training does.
    loader.note(eval_loss=2.0)
    events = read_log(tmp_path)
    assert events.ended
    assert events.values[-1]["value"] == 2.0


def test_losses_of_batches_that_are_trained_on_again_are_counted_once(
    corpus: Path, tmp_path: Path
) -> None:
    """After an epoch's last batch is composed nothing tells later losses apart by what is."""
    loader = logged(corpus, tmp_path)
    run(loader, len(loader) - 2)
    state = loader.state_dict()
    run(loader, 2)
    again = logged(corpus, tmp_path)
    again.load_state_dict(state)
    run(again, 2)
    events = read_log(tmp_path)
    assert sum(span["losses"][1] for span in events.spans) == len(loader) * BATCH
    assert events.straddling == 0


def test_a_clock_that_is_behind_takes_nothing_from_the_log(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 5)
    state = loader.state_dict()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 60.0)
    again = logged(corpus, tmp_path)
    again.load_state_dict(state)
    run(again, 6)
    again.state_dict()
    events = read_log(tmp_path)
    assert events.spans[-1]["at"][1] == again.sampler.step > 11
    starts = [begin["session"][0] for begin in events.begins]
    assert len(starts) == 2
    assert starts == sorted(starts)


def test_what_is_noted_before_the_first_batch_is_kept_and_may_be_of_numpy(
    corpus: Path, tmp_path: Path
) -> None:
    loader = logged(corpus, tmp_path)
    loader.note(first=np.float32(0.5), whole=np.int64(3))
    run(loader, 2)
    assert {v["name"]: v["value"] for v in read_log(tmp_path).values} == {"first": 0.5, "whole": 3}
    state, step = loader.state_dict(), loader.sampler.step
    again = logged(corpus, tmp_path)
    again.note(second=1.0)
    again.load_state_dict(state)
    assert read_log(tmp_path).values[-1]["name"] == "second"
    assert read_log(tmp_path).values[-1]["at"] == [0, step]
    logs = {"eval_loss": np.float32(0.5), "eval_loss_of": "cross-entropy", "loss": 1.0}
    assert held_out_losses(logs) == {"eval_loss": 0.5}


def test_a_state_loaded_again_in_one_process_takes_back_what_was_written_after_it(
    corpus: Path, tmp_path: Path
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 5)
    state, before = loader.state_dict(), told(read_log(tmp_path))
    run(loader, 6)
    assert len(told(read_log(tmp_path))) > len(before)
    loader.load_state_dict(state)
    assert told(read_log(tmp_path)) == before


def test_a_loader_that_nobody_has_any_more_is_gone_at_once(corpus: Path, tmp_path: Path) -> None:
    loader = logged(corpus, tmp_path)
    next(iter(loader))
    left, collecting = weakref.ref(loader), gc.isenabled()
    gc.disable()
    try:
        del loader
        assert left() is None
    finally:
        if collecting:
            gc.enable()


def test_a_loader_that_nobody_has_any_more_leaves_a_log_and_no_warning(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 3)
    log = loader._log
    del loader
    # A batch was just composed, in the loader's thread.
    log.composed(0.0)
    assert "not written any more" not in caplog.text
    assert not log.failed
    assert len(read_log(tmp_path).spans) >= 3
    assert read_log(tmp_path).ended


def test_a_run_from_the_start_moves_the_log_of_another_aside(corpus: Path, tmp_path: Path) -> None:
    run(logged(corpus, tmp_path), 17)
    first = told(read_log(tmp_path))
    run(logged(corpus, tmp_path), 3)
    assert len(told(read_log(tmp_path))) < len(first)
    assert (tmp_path / "_slap_log" / "rank-0.rows.previous").stat().st_size == ROW.itemsize * len(
        first
    )


@settings(max_examples=60)
@given(data=st.data())
def test_what_did_not_happen_is_left_out_whichever_rank_wrote_it(data: st.DataObject) -> None:
    """Sessions of one to three ranks, each going on from any place before the end of the last."""
    files: dict[int, list[Event]] = {rank: [] for rank in range(3)}
    happened: dict[tuple[int, int], int] = {}
    end = 0
    for session in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, end))
        end = start + data.draw(st.integers(0, 6))
        happened = {key: who for key, who in happened.items() if key[1] <= start}
        for rank in range(data.draw(st.integers(1, 3))):
            # Three more are composed than delivered, until an epoch of six ends.
            began = {"kind": "begin", **place_at(start), "session": (float(session), 0)}
            files[rank].append(began)
            for step in range(start, end):
                span = {"kind": "span", "from": place_at(step)["at"], **place_at(step + 1)}
                span["by"] = session
                files[rank].append(span)
                happened[rank, step + 1] = session
    begins = [event for events in files.values() for event in events if event["kind"] == "begin"]
    found = {
        (rank, event["delivered"][1]): event["by"]
        for rank, events in files.items()
        for event in surviving(events, begins)[0]
        if event["kind"] == "span"
    }
    assert found == happened


def place_at(delivered: int) -> dict[str, tuple[int, int]]:
    return {"at": (0, min(6, delivered + 3)), "delivered": (0, delivered)}


def span(step: int, *, saved: bool = False) -> Event:
    numbers = dict.fromkeys(("seconds", "compose_seconds", "probe_seconds", "probed"), 1.0)
    place = {"from": (0, step), "at": (0, step + 1), "batches": 1, "saved": saved, **numbers}
    place["delivered"] = (0, max(0, step - 3))
    counts = {"counts": {"trained": {"0": 2, str(step % 3): 1}}, "tokens": {"copy": {"1": 5}}}
    return {"kind": "span", "losses": [float(step), 1], **place, **counts}


def test_a_long_log_is_thinned_and_its_sums_stay() -> None:
    events = [span(step, saved=step % 100 == 99) for step in range(run_files.MAX_SPANS + 1)]
    noted = {"kind": "value", "at": (0, 500)}
    fewer = thinned([{"kind": "begin"}, *events[:500], noted, *events[500:]])
    spans = [event for event in fewer if event["kind"] == "span"]
    assert len(spans) <= run_files.MAX_SPANS / 2 + run_files.MAX_SAVED
    assert fewer[0]["kind"] == "begin"
    assert noted in fewer
    for name in ("batches", "seconds", "probed"):
        assert sum(event[name] for event in spans) == len(events)
    assert sum(s["counts"]["trained"]["0"] for s in spans) == sum(
        s["counts"]["trained"]["0"] for s in events
    )
    assert [s["from"] for s in spans[1:]] == [s["at"] for s in spans[:-1]]
    # A run can still go on from each checkpoint.
    ends = {s["at"] for s in spans}
    assert {s["at"] for s in events if s["saved"]} <= ends


def test_files_stay_bounded_and_what_is_left_is_all_of_some_samples(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(logged(corpus, tmp_path / "whole"), 51)
    monkeypatch.setattr(run_log, "MAX_ROWS", 300)
    monkeypatch.setattr(run_log, "MAX_SPANS", 10)
    monkeypatch.setattr(run_files, "MAX_SPANS", 10)
    run(logged(corpus, tmp_path / "few"), 51)
    whole, few = read_log(tmp_path / "whole"), read_log(tmp_path / "few")
    assert len(few.rows) <= 300 < len(whole.rows) == 3 * NUM_SAMPLES
    assert few.level >= 2
    stay = whole.rows[sampled(whole.rows["sample_id"], few.level)]
    assert sorted(few.rows["sample_id"]) == sorted(stay["sample_id"])
    assert len(few.spans) <= 11
    assert sums(few) == sums(whole)


def test_rows_that_were_thinned_are_known_to_be_after_a_kill_and_a_resume(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 3)
    state = loader.state_dict()
    monkeypatch.setattr(run_log, "MAX_ROWS", 20)

    def killed(self: Any, rows: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr(run_log.RunLog, "_replace_rows", killed)
    run(loader, 6)
    monkeypatch.undo()
    level = read_log(tmp_path).level
    assert level > 0
    again = logged(corpus, tmp_path)
    again.load_state_dict(state)
    assert read_log(tmp_path).level == level


@pytest.mark.parametrize(
    ("where", "error", "told"),
    [
        ("_append", OSError(28, "No space left on device"), "[Errno 28] No space left"),
        ("_flush", ValueError("no OSError"), "ValueError('no OSError')"),
    ],
)
def test_a_log_that_cannot_be_written_ends_and_training_goes_on(
    corpus: Path,
    unbroken: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    error: Exception,
    told: str,
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 3)

    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_log.RunLog, where, broken)
    with caplog.at_level(logging.DEBUG, run_log.__name__):
        assert run(loader, 20) == unbroken[3:23]
    assert caplog.text.count(f"is not written any more: {told}") == 1
    assert caplog.text.count("Traceback") == 1
    assert loader.metrics()["run_log_failed"] == 1


def test_no_fault_of_the_log_loses_a_batch(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Even where the log does not catch it, the batch is there.
    faults = [ValueError("once")]

    def composed(self: Any, seconds: float) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(run_log.RunLog, "composed", composed)
    loader = logged(corpus, tmp_path)
    with pytest.raises(ValueError, match="once"):
        run(loader, 1)
    assert run(loader, 20) == unbroken[:20]


@pytest.mark.parametrize("fault", ["a span of nothing", "another version", "no JSON"])
def test_a_log_that_cannot_be_read_is_moved_aside_and_the_run_goes_on(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path, fault: str
) -> None:
    loader = logged(corpus, tmp_path)
    run(loader, 5)
    state, step = loader.state_dict(), loader.sampler.step
    path = event_file(tmp_path / "_slap_log", 0)
    text = path.read_text()
    faulty = {
        "a span of nothing": text + '{"kind": "span"}\n',
        "another version": text.replace('"version": 2', '"version": 99', 1),
        "no JSON": "nonsense\n" + text,
    }[fault]
    path.write_text(faulty)
    again = logged(corpus, tmp_path)
    again.load_state_dict(state)
    assert run(again, 9) == unbroken[5:14]
    assert again.metrics()["run_log_failed"] == 0
    assert path.with_name(f"{path.name}.previous").read_text() == faulty
    assert read_log(tmp_path).spans[0]["from"] == [0, step]


def test_what_cannot_be_a_log_is_refused(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"run_dir must be a directory, new or old, .* no log\."):
        logged(corpus, file)
    with pytest.raises(
        ConfigError, match="run_dir must be a path on a local disk, got 's3://b/run'"
    ):
        logged(corpus, "s3://b/run")  # type: ignore[arg-type]
    with pytest.raises(RunLogError, match=r"run_dir must hold the log of a run .* which has none"):
        read_log(tmp_path)
    loader = logged(corpus, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"loss must be a number, got tensor\(1\.\); .*item\(\)"):
        loader.note(loss=torch.tensor(1.0))  # type: ignore[arg-type]  # as users do
    make(corpus).note(loss=1.0)  # without a log: nothing
    next(iter(loader))
    path = event_file(tmp_path / "run" / "_slap_log", 0)
    path.write_text("nonsense\n" + path.read_text())
    assert read_log(tmp_path / "run").unreadable == 1
    path.write_text(json.dumps({"kind": "begin", "version": 99}) + "\n")
    with pytest.raises(RunLogError, match="must be a log of version 2, got 99"):
        read_log(tmp_path / "run")


def test_the_share_of_samples_that_stay_is_what_is_said() -> None:
    ids = np.arange(100_000)
    for level in (0, 1, 3, 6):
        stay = sampled(ids, level)
        assert stay.mean() == pytest.approx(0.5**level, rel=0.1)
        assert np.all(stay <= sampled(ids, max(level - 1, 0)))
