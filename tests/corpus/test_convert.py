"""A corpus holds the records of its inputs, uniformly shuffled, and says what was left out."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slap_stream import __version__, convert
from slap_stream.corpus import convert as corpus
from slap_stream.corpus import inputs, shuffle, tally
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.chat import encode
from tests.helpers.plain_corpora import (
    files_of,
    pair,
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


def test_corpus_holds_every_record_once_with_its_source_and_id(
    tmp_path: Path, two_inputs: list[Path]
) -> None:
    report = convert(two_inputs, tmp_path / "out", command="slap-convert a b")
    samples = list(iter_corpus(tmp_path / "out"))
    assert report.num_samples == len(samples) == 200
    assert report.num_parts > 1
    assert report.num_pieces > 2
    assert report.counts == {"first": 150, "second": 50}
    assert report.dropped == {}
    for sample in samples:
        source, number = sample["id"].split("-")
        n = int(number) + (150 if source == "second" else 0)
        assert sample == {"id": sample["id"], "source": source, **pair(n)}
    assert len({sample["id"] for sample in samples}) == 200
    described = json.loads((tmp_path / "out" / "corpus.json").read_text())
    expected = {
        "format": "messages",
        "tokenizer": None,
        "max_length": None,
        "seed": 0,
        "counts": {"first": 150, "second": 50},
        "dropped": {},
        "truncated": 0,
        "command": "slap-convert a b",
        "version": __version__,
    }
    assert described.items() >= expected.items()
    assert not (tmp_path / "out" / ".convert").exists()


def test_order_depends_on_the_seed_only_and_progress_reaches_the_end(
    tmp_path: Path, two_inputs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, num_workers in (("alone", 1), ("workers", 2)):
        convert(two_inputs, tmp_path / name, num_workers=num_workers, progress=True)
        stages = capsys.readouterr().err.split("\n")
        assert "read: 100%" in stages[0].split("\r")[-1]
        assert "write: 100%" in stages[1].split("\r")[-1]
        assert "200/200" in stages[1].split("\r")[-1]
    convert(two_inputs, tmp_path / "other", seed=1)
    assert shards_of(tmp_path / "alone") == shards_of(tmp_path / "workers")
    assert shards_of(tmp_path / "alone") != shards_of(tmp_path / "other")


def test_names_of_any_bytes_and_fields_of_any_letters_are_told(tmp_path: Path) -> None:
    # As another system's encoding leaves them.
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    records = [{**pair(0), "half \ud83d\n": 1, "x" * 500: 2}, {"no": "shape"}]
    path.write_text("\n".join(map(json.dumps, records)))
    report = convert(path, tmp_path / "out")
    assert report.counts == {"caf\\udce9": 1}
    assert report.unused == {"half ?": 1, "x" * 80: 1}
    (places,) = report.examples.values()
    assert places == [f"{tmp_path}/caf\\udce9.jsonl:2"]
    (sample,) = iter_corpus(tmp_path / "out")
    assert (sample["id"], sample["source"]) == ("caf\\udce9-0", "caf\\udce9")
    assert convert(path, tmp_path / "out").resumed


def test_shuffle_is_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIECE_BYTES", 60_000)
    # Of 4,000 records, how many of each eighth come into each eighth: 64 counts of about 62.5.
    # Their chi-square has 49 degrees of freedom and exceeds 95 with a chance below 1e-4; the seed
    # is fixed.
    path = write_pairs(tmp_path / "a.jsonl", range(4000))
    convert([path], tmp_path / "out")
    order = np.array([int(s["id"].split("-")[1]) for s in list(iter_corpus(tmp_path / "out"))])
    counts = np.histogram2d(np.arange(4000), order, bins=8)[0]
    assert ((counts - 62.5) ** 2 / 62.5).sum() < 95
    # A neighbour follows its neighbour 1 time in 4,000: twice in all, and not more than 12 times.
    assert (np.abs(np.diff(order)) == 1).sum() <= 12


def test_every_stretch_sees_every_source(tmp_path: Path) -> None:
    # 1,200 records of three inputs: a stretch of 100 without one of them has a chance of 3e-18.
    paths = [write_pairs(tmp_path / f"{name}.jsonl", range(400)) for name in "abc"]
    convert(paths, tmp_path / "out")
    sources = [sample["source"] for sample in list(iter_corpus(tmp_path / "out"))]
    for start in range(0, 1200, 100):
        assert set(sources[start : start + 100]) == {"a", "b", "c"}


def test_rows_whose_fields_have_no_value_hide_none_of_those_that_have(tmp_path: Path) -> None:
    empty = {"prompt": "a", "completion": None}
    lines = [json.dumps(empty)] * 20 + [json.dumps(pair(0))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = convert(tmp_path / "a.jsonl", tmp_path / "out")
    assert report.num_samples == 1
    assert report.dropped == {"field without a value: completion": 20}
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:20]))
    with pytest.raises(CorpusError, match="left out were field without a value: completion: 20"):
        convert(tmp_path / "b.jsonl", tmp_path / "none")


def test_dropped_records_are_counted_by_reason_with_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(pair(0))
    bad = {
        "line that is not JSON": '{"text": ',
        "not an object of fields": "[1]",
        "unknown shape: the fields question": '{"question": "hi"}',
        "no assistant turn": '{"messages": [{"role": "user", "content": "hi"}]}',
        "empty turn: assistant": '{"prompt": "hi", "completion": " "}',
        "text that is not valid Unicode": '{"text": "\\ud800"}',
    }
    lines = [good, "", *[line for line in bad.values() for _ in range(7)], good]
    path.write_text("\n".join(lines))
    report = convert([path], tmp_path / "out")
    assert report.num_samples == 2
    assert report.dropped == dict.fromkeys(sorted(bad), 7)
    for place, reason in enumerate(bad):
        first = 3 + 7 * place
        assert report.examples[reason] == [f"{path}:{n}" for n in range(first, first + 5)]
    ids = {sample["id"] for sample in list(iter_corpus(tmp_path / "out"))}
    assert ids == {"a-0", f"a-{len(lines) - 1}"}


@pytest.mark.parametrize("text", ["", "\n\n", '{"messages": []}\n' * 3])
def test_empty_corpus_is_an_error_and_leaves_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    expected = r"at least one record that can be used, got none; left out were (no rec|no assist)"
    with pytest.raises(CorpusError, match=expected):
        convert([path], tmp_path / "out")
    assert files_of(tmp_path / "out") == {}
    write_pairs(path, range(3))
    assert convert([path], tmp_path / "out").num_samples == 3


def test_sources_are_bounded_and_the_field_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "MAX_SOURCES", 3)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({**pair(n), "source": f"page {n}"}) for n in range(60)]
    path.write_text("\n".join(lines))
    with pytest.raises(CorpusError, match=r"at most 3 groups of records.*source_field=None"):
        convert([path], tmp_path / "out")
    report = convert(path, tmp_path / "inputs", source_field=None)
    assert report.counts == {"a": 60}


def test_out_that_holds_something_else_is_refused(tmp_path: Path, two_inputs: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CorpusError, match=r"new, empty or left by the same call.*thesis\.tex"):
        convert(two_inputs, tmp_path / "out")
    convert(two_inputs, tmp_path / "done")
    with pytest.raises(CorpusError, match="new, empty or left by the same call"):
        convert(two_inputs, tmp_path / "done", seed=1)
    with pytest.raises(CorpusError, match=r"must be a directory, new or old.* is a file"):
        convert(two_inputs, two_inputs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 8}, "max_length must be None without a tokenizer, got 8"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"num_workers": 1.5}, "num_workers must be a whole number >= 0, got 1.5"),
        ({"shard_bytes": 0}, "shard_bytes must be a whole number >= 1, got 0"),
        ({"tokenizer": "x", "max_length": 1}, "max_length must be a whole number >= 2, got 1"),
        ({"tokenizer": object()}, "tokenizer must be a path or a name, got a object"),
        ({"tokenizer": Path("nowhere")}, "tokenizer must exist, got 'nowhere'"),
    ],
)
def test_options_are_checked_before_any_work(
    tmp_path: Path, two_inputs: list[Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(two_inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_whole_numbers_of_numpy_are_whole_numbers(tmp_path: Path, two_inputs: list[Path]) -> None:
    convert(two_inputs, tmp_path / "out", seed=np.int64(3), num_workers=np.int8(1))
    convert(two_inputs, tmp_path / "same", seed=3)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "same")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["<unk>", "<eos>", "question", "answer", *map(str, range(200))]
    vocabulary = {word: n for n, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<eos>"
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


def test_tokenised_corpus_holds_what_encode_gives(
    tmp_path: Path, two_inputs: list[Path], tokenizer_dir: Path
) -> None:
    report = convert(two_inputs, tmp_path / "out", tokenizer=tokenizer_dir)
    assert report.format == "tokens"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    samples = list(iter_corpus(tmp_path / "out"))
    assert len(samples) == 200
    for sample in samples:
        source, number = sample["id"].split("-")
        n = int(number) + (150 if source == "second" else 0)
        encoded = encode(tokenizer, pair(n)["messages"])
        assert sample["input_ids"].tolist() == encoded.input_ids
        assert sample["supervised"].tolist() == [int(flag) for flag in encoded.supervised]
    described = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert described["tokenizer"] == str(tokenizer_dir)


def test_fields_that_are_not_used_are_counted(tmp_path: Path) -> None:
    lines, table = tmp_path / "lines.jsonl", tmp_path / "table.parquet"
    tagged = [{**pair(n), "topic": "x", "note": None} for n in range(5)]
    lines.write_text("\n".join(json.dumps(record) for record in [*tagged, {"topic": "lost"}]))
    rows = [{"prompt": "hi", "answer": "yo", "topic": "x", "grade": n} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), table)
    report = convert([lines, table], tmp_path / "out")
    # Of records that are kept. Columns of a table are counted, and not read.
    assert report.unused == {"topic": 9, "grade": 4}
    assert report.dropped == {"unknown shape: the fields topic": 1}
    assert convert([lines, table], tmp_path / "out").unused == report.unused


def test_answers_that_share_a_token_with_the_header_are_counted(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.save_pretrained(tmp_path / "doubled")
    path = tmp_path / "a.jsonl"
    said = ("yes", "\nyes", "no")
    path.write_text("\n".join(json.dumps({"prompt": "hi", "answer": text}) for text in said))
    report = convert([path], tmp_path / "out", tokenizer=tmp_path / "doubled")
    assert report.shared == 1
    assert convert([path], tmp_path / "none", tokenizer=tokenizer_dir).shared == 0


def test_truncation_and_what_it_leaves_nothing_of_are_counted(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.jsonl"
    long_prompt = {"prompt": "question " * 50, "completion": "answer"}
    long_answer = {"prompt": "question", "completion": "answer " * 50}
    short = {"prompt": "question", "completion": "answer"}
    path.write_text("\n".join(json.dumps(r) for r in (long_prompt, long_answer, short)))
    report = convert([path], tmp_path / "out", tokenizer=tokenizer_dir, max_length=24)
    assert report.num_samples == 2
    assert report.truncated == 1
    assert report.dropped == {"no supervised token within max_length": 1}
    lengths = Counter(len(sample["input_ids"]) for sample in list(iter_corpus(tmp_path / "out")))
    assert lengths[24] == 1
    left = convert(
        [path], tmp_path / "left", tokenizer=tokenizer_dir, max_length=24, truncate="left"
    )
    assert (left.num_samples, left.truncated, left.dropped) == (3, 2, {})
    assert all(sample["supervised"].any() for sample in iter_corpus(tmp_path / "left"))
    drop = convert(
        [path], tmp_path / "drop", tokenizer=tokenizer_dir, max_length=24, truncate="drop"
    )
    assert (drop.num_samples, drop.truncated) == (1, 0)
    assert drop.dropped == {"longer than max_length": 2}
    # Each is found again, and is no other's.
    again = convert(
        [path], tmp_path / "drop", tokenizer=tokenizer_dir, max_length=24, truncate="drop"
    )
    assert again.resumed
    with pytest.raises(CorpusError, match="out must be new, empty or left by the same call"):
        convert([path], tmp_path / "drop", tokenizer=tokenizer_dir, max_length=24)
    with pytest.raises(ConfigError, match="truncate must be 'right' without max_length"):
        convert([path], tmp_path / "none", tokenizer=tokenizer_dir, truncate="drop")


def test_records_that_do_not_fit_the_template_are_dropped_unless_all_are(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    strict = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    )
    strict.save_pretrained(tmp_path / "strict")
    path = tmp_path / "a.jsonl"
    system = {**pair(0), "messages": [{"role": "system", "content": "s"}, *pair(0)["messages"]]}
    path.write_text("\n".join(json.dumps(r) for r in (system, pair(1))))
    report = convert([path], tmp_path / "out", tokenizer=tmp_path / "strict")
    assert report.num_samples == 1
    assert report.dropped == {"does not fit the chat template: no system": 1}
    path.write_text(json.dumps(system))
    with pytest.raises(CorpusError, match=r"tokenizer must fit the records of .*no system"):
        convert([path], tmp_path / "none", tokenizer=tmp_path / "strict")
    assert not (tmp_path / "none").exists()


MEMORY_SCRIPT = """
import resource, sys
from slap_stream import __version__, convert
import pyarrow.parquet, streaming, zstandard

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

if __name__ == "__main__":
    before = peak()
    convert(sys.argv[1], sys.argv[2], num_workers=1)
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    # 400 MB of text in one file that cannot be cut, in 130 kB records for the sake of speed.
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for n in range(3000):
            line = json.dumps({"text": f"{n} " + "word " * 26_000})
            file.write(line.encode() + b"\n")
    script = tmp_path / "script.py"
    script.write_text(MEMORY_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 400e6 / 2


def test_small_files_share_their_syncs_and_a_part_is_read_in_few_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3,000 small files took 12,035 syncs, and each record a read of its own.
    monkeypatch.setattr(inputs, "PIECE_BYTES", 64 << 20)
    monkeypatch.setattr(shuffle, "_WINDOW_BYTES", 16 << 20)
    (tmp_path / "in").mkdir()
    for number in range(60):
        numbers = range(5 * number, 5 * number + 5)
        write_pairs(tmp_path / "in" / f"{number:02}.jsonl", numbers)
    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        call = getattr(os, name)

        def count(*args: Any) -> Any:
            calls[name] += 1
            return call(*args)

        monkeypatch.setattr(os, name, count)

    counted("fsync")
    counted("pread")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert report.num_samples == 300
    assert report.num_pieces == 60
    assert calls["fsync"] < 10 + 6 * report.num_parts
    assert calls["pread"] <= 4 * report.num_parts


@settings(max_examples=10, deadline=None)
@given(
    smallest=st.sampled_from([1, 2, 16, 1 << 20]),
    run_bytes=st.integers(100, 5000),
    bridge=st.integers(0, 2000),
    span=st.integers(1, 3000),
)
def test_how_the_work_is_laid_out_changes_no_byte(
    tmp_path_factory: pytest.TempPathFactory, smallest: int, run_bytes: int, bridge: int, span: int
) -> None:
    root = tmp_path_factory.mktemp("laid")
    paths = [write_pairs(root / f"{n}.jsonl", range(20 * n, 20 * n + 20)) for n in range(4)]
    convert(paths, root / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_SMALLEST", smallest)
        patch.setattr(shuffle, "_RUN_BYTES", run_bytes)
        patch.setattr(shuffle, "_BRIDGE_BYTES", bridge)
        patch.setattr(shuffle, "_SPAN_BYTES", span)
        convert(paths, root / "other")
    assert shards_of(root / "other") == shards_of(root / "one")
