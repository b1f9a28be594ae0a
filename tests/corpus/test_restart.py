"""A conversion that is cut off, by whatever, ends as an unbroken one when it is called again."""

from __future__ import annotations

import functools
import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.core.processes import WorkerDied
from slap_stream.corpus import convert as corpus
from slap_stream.corpus import inputs, shuffle
from slap_stream.errors import CorpusError
from tests.helpers.plain_corpora import (
    PlainWriter,
    files_of,
    open_deadly_writer,
    open_plain_writer,
    plain_convert,
    shards_of,
    write_pairs,
)


@pytest.fixture(autouse=True)
def _many_pieces_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough for tiny inputs to be cut. Decided in the parent, so workers agree.
    monkeypatch.setattr(inputs, "PIECE_BYTES", 2048)
    monkeypatch.setattr(corpus, "_SMALL_PART_BYTES", 2048)
    monkeypatch.setattr(shuffle, "_RUN_BYTES", 700)
    monkeypatch.setattr(shuffle, "_WINDOW_BYTES", 500)


@pytest.fixture
def two_inputs(tmp_path: Path) -> list[Path]:
    first = write_pairs(tmp_path / "first.jsonl", range(150))
    second = tmp_path / "second.jsonl.gz"
    second.write_bytes(gzip.compress(write_pairs(tmp_path / "x", range(150, 200)).read_bytes()))
    return [first, second]


class CutOff(Exception):
    """Stands for whatever ends a run."""


@contextmanager
def fails_after(
    out_dir: Path, columns: Mapping[str, str], *, shard_bytes: int, budget: list[int]
) -> Iterator[PlainWriter]:
    class Failing(PlainWriter):
        def write(self, sample: dict[str, Any]) -> None:
            budget[0] -= 1
            if budget[0] < 0:
                raise CutOff
            super().write(sample)

    with open_plain_writer(out_dir, columns, shard_bytes=shard_bytes) as writer:
        failing = Failing(0.0)
        failing.lines = writer.lines
        yield failing


@settings(max_examples=8, deadline=None)
@given(budgets=st.lists(st.integers(0, 120), min_size=1, max_size=4))
def test_run_that_is_cut_off_anywhere_ends_as_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, budgets: list[int]
) -> None:
    root = tmp_path_factory.mktemp("cut")
    path = write_pairs(root / "a.jsonl", range(100))
    plain_convert([path], root / "whole")
    for budget in budgets:
        writer = functools.partial(fails_after, budget=[budget])
        try:
            plain_convert([path], root / "broken", open_writer=writer)
        except CutOff:
            assert not (root / "broken" / "index.json").exists()
    report = plain_convert([path], root / "broken")
    assert report.resumed > 0
    assert shards_of(root / "broken") == shards_of(root / "whole")


@pytest.mark.parametrize("name", ["write_json", "merge_indexes", "shutil"])
def test_run_that_is_cut_off_at_the_very_end_ends_as_an_unbroken_one(
    tmp_path: Path, two_inputs: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise CutOff

    plain_convert(two_inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stand_in = SimpleNamespace(rmtree=fail) if name == "shutil" else fail
        patch.setattr(f"slap_stream.corpus.convert.{name}", stand_in)
        with pytest.raises(CutOff):
            plain_convert(two_inputs, tmp_path / "broken")
    report = plain_convert(two_inputs, tmp_path / "broken")
    assert report.resumed == report.num_pieces + report.num_parts
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_part_whose_files_changed_is_written_again(
    tmp_path: Path, two_inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_convert(two_inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.delattr("slap_stream.corpus.convert.merge_indexes")
        with pytest.raises(NameError):
            plain_convert(two_inputs, tmp_path / "broken")
    shard = next((tmp_path / "broken").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    plain_convert(two_inputs, tmp_path / "broken")
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_finished_call_made_again_returns_its_report(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    first = plain_convert(two_inputs, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "embeddings.zarr").mkdir()
    again = plain_convert(two_inputs, tmp_path / "out")
    assert again.counts == first.counts
    assert again.resumed == first.num_pieces + first.num_parts
    assert files_of(tmp_path / "out") == before


# Slow enough to be caught in the middle; the guard is what spawn asks of a script.
SCRIPT = """
import functools, sys
from slap_stream.corpus import convert as corpus
from slap_stream.corpus import inputs
from slap_stream.corpus.convert import convert
from tests.helpers.plain_corpora import open_plain_writer

if __name__ == "__main__":
    inputs.PIECE_BYTES = corpus._SMALL_PART_BYTES = 2048
    *paths, out = sys.argv[1:]
    writer = functools.partial(open_plain_writer, delay_seconds=0.01)
    convert(paths, out, open_writer=writer, num_workers=2)
"""


def start_script(root: Path, paths: list[Path]) -> subprocess.Popen[str]:
    script = root / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, paths), str(root / "broken")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for 60 seconds in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ["piece-*.bin", "part-*.json"])
def test_kill_9_leaves_no_process_and_a_run_that_goes_on(
    tmp_path: Path, two_inputs: list[Path], stage: str
) -> None:
    plain_convert(two_inputs, tmp_path / "whole")
    process = start_script(tmp_path, two_inputs)
    work_dir = tmp_path / "broken" / ".convert"
    wait_until(lambda: any(work_dir.glob(stage)))
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert not (tmp_path / "broken" / "index.json").exists()

    report = plain_convert(two_inputs, tmp_path / "broken")
    if stage == "part-*.json":
        assert report.resumed > report.num_pieces
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_ctrl_c_reaches_all_processes_and_the_run_goes_on(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    plain_convert(two_inputs, tmp_path / "whole")
    process = start_script(tmp_path, two_inputs)
    wait_until(lambda: any((tmp_path / "broken" / ".convert").glob("part-*.json")))
    workers = psutil.Process(process.pid).children(recursive=True)
    # To the whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("Traceback") == 1, errors
    assert "KeyboardInterrupt" in errors
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    plain_convert(two_inputs, tmp_path / "broken")
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_worker_that_dies_is_an_error_with_a_cure(tmp_path: Path, two_inputs: list[Path]) -> None:
    with pytest.raises(WorkerDied, match=r"got 2 and a worker that ended .*with fewer workers"):
        plain_convert(two_inputs, tmp_path / "out", open_writer=open_deadly_writer, num_workers=2)
    assert plain_convert(two_inputs, tmp_path / "out").num_samples == 200


def test_unfinished_call_with_other_options_is_refused_by_name(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    writer = functools.partial(fails_after, budget=[10])
    with pytest.raises(CutOff):
        plain_convert(two_inputs, tmp_path / "out", open_writer=writer)
    with pytest.raises(CorpusError, match=r"left by one with other seed, shard_bytes; make the"):
        plain_convert(two_inputs, tmp_path / "out", seed=1, shard_bytes=1000)
    write_pairs(two_inputs[0], range(151))
    with pytest.raises(CorpusError, match="left by one with other inputs"):
        plain_convert(two_inputs, tmp_path / "out")


def test_two_processes_do_not_write_one_corpus(tmp_path: Path, two_inputs: list[Path]) -> None:
    process = start_script(tmp_path, two_inputs)
    try:
        wait_until((tmp_path / "broken" / ".convert" / "plan.json").is_file)
        with pytest.raises(CorpusError, match=r"must not be in use, got .*another process"):
            plain_convert(two_inputs, tmp_path / "broken")
    finally:
        process.kill()
        process.communicate()
