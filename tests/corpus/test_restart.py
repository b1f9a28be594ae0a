"""A conversion that is cut off, by whatever, ends as an unbroken one when it is called again."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream import convert
from slap_stream.corpus import convert as corpus
from slap_stream.corpus import inputs, shuffle
from slap_stream.errors import CorpusError
from tests.helpers.plain_corpora import files_of, shards_of, write_pairs


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
def cut_off_after(num_records: int) -> Iterator[None]:
    """What is called inside is cut off when it has written so many records."""
    texts, left = shuffle._texts, num_records

    def few(job: shuffle.GatherJob, places: Any) -> Iterator[bytes]:
        nonlocal left
        for text in texts(job, places):
            left -= 1
            if left < 0:
                raise CutOff
            yield text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_texts", few)
        yield


@settings(max_examples=8, deadline=None)
@given(budgets=st.lists(st.integers(0, 120), min_size=1, max_size=4))
def test_run_that_is_cut_off_anywhere_ends_as_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, budgets: list[int]
) -> None:
    root = tmp_path_factory.mktemp("cut")
    path = write_pairs(root / "a.jsonl", range(100))
    convert([path], root / "whole")
    for budget in budgets:
        with cut_off_after(budget):
            try:
                convert([path], root / "broken")
            except CutOff:
                assert not (root / "broken" / "index.json").exists()
    report = convert([path], root / "broken")
    assert report.resumed > 0
    assert shards_of(root / "broken") == shards_of(root / "whole")


@pytest.mark.parametrize("name", ["describe", "merge_indexes", "shutil"])
def test_run_that_is_cut_off_at_the_very_end_ends_as_an_unbroken_one(
    tmp_path: Path, two_inputs: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise CutOff

    convert(two_inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stand_in = SimpleNamespace(rmtree=fail) if name == "shutil" else fail
        patch.setattr(f"slap_stream.corpus.convert.{name}", stand_in)
        with pytest.raises(CutOff):
            convert(two_inputs, tmp_path / "broken")
    report = convert(two_inputs, tmp_path / "broken")
    assert report.resumed == report.num_pieces + report.num_parts
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_part_whose_files_changed_is_written_again(
    tmp_path: Path, two_inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(two_inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.delattr("slap_stream.corpus.convert.merge_indexes")
        with pytest.raises(NameError):
            convert(two_inputs, tmp_path / "broken")
    shard = next((tmp_path / "broken").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    convert(two_inputs, tmp_path / "broken")
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_what_another_version_has_half_done_is_not_gone_on_with(
    tmp_path: Path, two_inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # The last one that read rows of JSON otherwise, and the texts beside token ids.
        patch.setattr(corpus, "_WORK_VERSION", 2)
        with cut_off_after(20), pytest.raises(CutOff):
            convert(two_inputs, tmp_path / "out")
    with pytest.raises(CorpusError, match="left by one with other work_version; make the same"):
        convert(two_inputs, tmp_path / "out")


@pytest.mark.parametrize("name", ["counts", "num_parts", "seconds"])
@pytest.mark.parametrize("wrong", [None, [1]])
def test_a_damaged_description_is_none_of_the_same_call(
    tmp_path: Path, two_inputs: list[Path], name: str, wrong: Any
) -> None:
    convert(two_inputs, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "corpus.json").read_text())
    described[name] = wrong
    if wrong is None:
        del described[name]
    (tmp_path / "out" / "corpus.json").write_text(json.dumps(described))
    with pytest.raises(CorpusError, match="out must be new, empty or left by the same call"):
        convert(two_inputs, tmp_path / "out")


def test_finished_call_made_again_returns_its_report(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    first = convert(two_inputs, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "embeddings.zarr").mkdir()
    again = convert(two_inputs, tmp_path / "out")
    assert again.counts == first.counts
    assert again.resumed == first.num_pieces + first.num_parts
    assert files_of(tmp_path / "out") == before


# Slow enough to be caught in the middle, in workers too, which run this and not the script.
SLOWLY = """
import time
from slap_stream.corpus import convert as corpus, inputs, shuffle

def slow(job, places, texts=shuffle._texts):
    for text in texts(job, places):
        time.sleep(0.01)
        yield text

shuffle._texts = slow
inputs.PIECE_BYTES = corpus._SMALL_PART_BYTES = 2048
"""
# As people write them: without a guard against being run again.
SCRIPT = """
import sys
from slap_stream import convert
*paths, out = sys.argv[1:]
convert(paths, out, num_workers=2)
"""


def start_script(root: Path, paths: list[Path]) -> subprocess.Popen[str]:
    script = root / "script.py"
    script.write_text(SCRIPT)
    (root / "sitecustomize.py").write_text(SLOWLY)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, paths), str(root / "broken")],
        env={**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parents[2]}"},
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
    convert(two_inputs, tmp_path / "whole")
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

    report = convert(two_inputs, tmp_path / "broken")
    if stage == "part-*.json":
        assert report.resumed > report.num_pieces
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


@pytest.mark.parametrize("when", ["workers start", "workers work"])
def test_ctrl_c_reaches_all_processes_and_the_run_goes_on(
    tmp_path: Path, two_inputs: list[Path], when: str
) -> None:
    convert(two_inputs, tmp_path / "whole")
    process = start_script(tmp_path, two_inputs)
    if when == "workers start":
        # The first child keeps count of the semaphores.
        wait_until(lambda: len(psutil.Process(process.pid).children()) > 1)
    else:
        wait_until(lambda: any((tmp_path / "broken" / ".convert").glob("part-*.json")))
    workers = psutil.Process(process.pid).children(recursive=True)
    # To the whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("Traceback") == 1, errors
    assert "KeyboardInterrupt" in errors
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    convert(two_inputs, tmp_path / "broken")
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_worker_that_dies_is_an_error_with_a_cure(tmp_path: Path, two_inputs: list[Path]) -> None:
    convert(two_inputs, tmp_path / "whole")
    process = start_script(tmp_path, two_inputs)
    wait_until(lambda: any((tmp_path / "broken" / ".convert").glob("part-*.json")))
    # The first child keeps count of the semaphores.
    psutil.Process(process.pid).children()[-1].kill()
    _, errors = process.communicate(timeout=30)
    assert re.search("WorkerDied: num_workers .*got 2 and a worker that .*with fewer work", errors)
    assert convert(two_inputs, tmp_path / "broken").resumed > 0
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_unfinished_call_with_other_options_is_refused_by_name(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    with pytest.raises(CutOff), cut_off_after(10):
        convert(two_inputs, tmp_path / "out")
    with pytest.raises(CorpusError, match=r"left by one with other seed, shard_bytes; make the"):
        convert(two_inputs, tmp_path / "out", seed=1, shard_bytes=1000)
    # So much more that there are more parts, which nobody has asked for.
    write_pairs(two_inputs[0], range(40_000))
    with pytest.raises(CorpusError, match="left by one with other inputs; make the same call"):
        convert(two_inputs, tmp_path / "out")


def test_two_processes_do_not_write_one_corpus(tmp_path: Path, two_inputs: list[Path]) -> None:
    process = start_script(tmp_path, two_inputs)
    try:
        wait_until((tmp_path / "broken" / ".convert" / "plan.json").is_file)
        with pytest.raises(CorpusError, match=r"out must not be in use, got .*another process"):
            convert(two_inputs, tmp_path / "broken")
    finally:
        process.kill()
        process.communicate()
