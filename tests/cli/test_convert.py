"""The command line converts, says what it dropped, ends in JSON, and goes on after a cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from slap_stream import convert
from slap_stream.cli.convert import main
from slap_stream.errors import ConfigError
from slap_stream.shards.index import corpus_columns, corpus_size
from slap_stream.shards.reader import iter_corpus
from tests.helpers.plain_corpora import shards_of


def pair(n: int) -> dict[str, Any]:
    return {"prompt": f"question {n}", "completion": f"answer {n} " + "so " * (n % 9)}


def write_inputs(root: Path) -> list[Path]:
    """JSON lines, zst, Parquet and a saved dataset, of 60 records each and in as many shapes."""
    plain, packed = root / "plain.jsonl", root / "packed.jsonl.zst"
    table, saved = root / "table.parquet", root / "saved"
    bad = ['{"messages": [{"role": "user", "content": "hi"}]}', "{"]
    plain.write_text("\n".join([*(json.dumps(pair(n)) for n in range(60)), *bad]))
    turns = [
        {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}]}
        for n in range(60)
    ]
    text = "\n".join(json.dumps(turn) for turn in turns)
    packed.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    alpaca = [{"instruction": f"do {n}", "input": "", "output": "done"} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(alpaca), table)
    Dataset.from_list([{"text": f"document {n}"} for n in range(60)]).save_to_disk(saved)
    return [plain, packed, table, saved]


def test_inputs_of_all_kinds_become_one_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_inputs(tmp_path)
    out = tmp_path / "out"
    # A shard of a few records, and one record that is larger than that.
    with paths[0].open("a") as file:
        file.write("\n" + json.dumps({"id": "large", "text": "word " * 2000}))
    capsys.readouterr()
    assert main([*map(str, paths), str(out), "--shard-bytes", "4096", "--seed", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary["num_samples"] == corpus_size(out) == 241
    assert summary["num_sources"] == 4
    assert summary["dropped"] == {"line that is not JSON": 1, "no assistant turn": 1}
    assert summary["examples"]["no assistant turn"] == [f"{paths[0]}:61"]
    assert any("1  dropped: no assistant turn, as in" in line for line in table)
    assert any("61    plain" in line for line in table)
    columns = {"id": "str", "source": "str", "messages": "json"}
    assert corpus_columns(out) == columns
    samples = {sample["id"]: sample for sample in iter_corpus(out, 0, 241)}
    assert len(samples) == 241
    assert samples["large"]["messages"] == [{"role": "text", "content": "word " * 2000}]
    assert samples["saved-7"]["messages"] == [{"role": "text", "content": "document 7"}]
    assert samples["table-7"]["messages"][0] == {"role": "user", "content": "do 7"}
    assert samples["packed-7"]["messages"][1] == {"role": "assistant", "content": "a"}
    assert samples["plain-7"]["messages"][0]["content"] == "question 7"
    described = json.loads((out / "corpus.json").read_text())
    assert described["command"].startswith("slap-convert ")
    assert described["counts"] == {"packed": 60, "plain": 61, "saved": 60, "table": 60}


def test_python_writes_what_the_tool_writes(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    options = ["--seed", "3", "--shard-bytes", "4096", "--source-field", "", "--quiet"]
    assert main([*map(str, paths), str(tmp_path / "tool"), *options]) == 0
    given: dict[str, Any] = {"seed": 3, "shard_bytes": 4096, "source_field": None}
    report = convert(paths, tmp_path / "python", **given, progress=False)
    assert report.num_samples == 240
    assert shards_of(tmp_path / "python") == shards_of(tmp_path / "tool")
    for wrong in ("seed", "num_workers", "shard_bytes"):
        with pytest.raises(ConfigError, match=f"{wrong} must be a whole number >= ., got -1"):
            convert(paths, tmp_path / "none", **{wrong: -1})


def test_errors_are_one_line_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("slap-convert: inputs must exist, got ")
    assert captured.err.count("\n") == 1


def test_quiet_prints_the_summary_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({**pair(n), "source": "x"}) for n in range(5)))
    command = [str(path), str(tmp_path / "out"), "--quiet", "--source-field", ""]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_samples"] == 5
    assert captured.err == ""
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["counts"] == {"a": 5}


def test_fields_of_other_names_are_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("q;best;id\nhi;yo;7\n")
    command = [str(tmp_path / "a.csv"), str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--map", "prompt=q,answer=best", "--map", "id"]) == 1
    assert capsys.readouterr().err.startswith("slap-convert: --map must be NAME=FIELD, or several")
    assert main([*command, "--map", "prompt=q", "--map", "answer=best"]) == 0
    (sample,) = iter_corpus(tmp_path / "out")
    assert [turn["content"] for turn in sample["messages"]] == ["hi", "yo"]
    assert sample["id"] == "7"


def test_command_that_is_interrupted_says_so_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(pair(n)) for n in range(60_000)))
    out = tmp_path / "out"
    tool = Path(__file__).parents[2] / "tools" / "convert.py"
    command = [sys.executable, str(tool), str(path), str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 60
    while not (out / ".convert" / "piece-00000.bin").exists():
        assert time.monotonic() < deadline, "waited for 60 seconds in vain"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.endswith("slap-convert: interrupted; run the same command to go on.\n")
    assert main(command[2:]) == 0
    assert corpus_size(out) == 60_000
